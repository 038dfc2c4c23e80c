"""Drop-in modules: the constructors, forward arguments, state_dict keys and initialisation of ``torch.nn``, fused."""

from .activation import GELU, LogSoftmax, Softmax
from .attention import MultiheadAttention
from .feed_forward import FeedForward
from .loss import CrossEntropyLoss, LinearCrossEntropyLoss
from .norm import LayerNorm

__all__ = [
    "GELU",
    "CrossEntropyLoss",
    "FeedForward",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "MultiheadAttention",
    "Softmax",
]
