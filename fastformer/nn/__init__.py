"""Drop-in modules: the constructors, forward arguments, state_dict keys and initialisation of ``torch.nn``, fused."""

from .activation import GELU, LogSoftmax, ReLU, SiLU, Softmax
from .attention import MultiheadAttention
from .feed_forward import FeedForward, GatedFeedForward
from .loss import CrossEntropyLoss
from .norm import LayerNorm

__all__ = [
    "GELU",
    "CrossEntropyLoss",
    "FeedForward",
    "GatedFeedForward",
    "LayerNorm",
    "LogSoftmax",
    "MultiheadAttention",
    "ReLU",
    "SiLU",
    "Softmax",
]
