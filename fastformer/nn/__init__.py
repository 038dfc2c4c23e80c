"""Drop-in modules: the constructors, forward arguments, state_dict keys and initialisation of ``torch.nn``, fused."""

from .activation import GELU, LogSoftmax, Softmax
from .attention import MultiheadAttention
from .embedding import Embedding
from .feed_forward import FeedForward
from .loss import CrossEntropyLoss
from .norm import LayerNorm, RMSNorm
from .positions import LearnedPositionalEncoding, RotaryEmbedding, SinusoidalPositionalEncoding

__all__ = [
    "GELU",
    "CrossEntropyLoss",
    "Embedding",
    "FeedForward",
    "LayerNorm",
    "LearnedPositionalEncoding",
    "LogSoftmax",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "SinusoidalPositionalEncoding",
    "Softmax",
]
