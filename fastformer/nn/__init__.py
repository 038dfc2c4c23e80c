"""Drop-in modules: the constructors, forward arguments, state_dict keys and initialisation of ``torch.nn``, fused."""

from .activation import GELU, LogSoftmax, ReLU, SiLU, Softmax
from .attention import MultiheadAttention
from .embedding import Embedding
from .feed_forward import FeedForward, GatedFeedForward
from .linear import Linear
from .loss import CrossEntropyLoss, LinearCrossEntropyLoss
from .norm import LayerNorm, RMSNorm
from .positions import LearnedPositionalEncoding, RelativePositionBias, RotaryEmbedding, SinusoidalPositionalEncoding
from .transformer import Transformer, TransformerDecoder, TransformerEncoder
from .transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GELU",
    "CrossEntropyLoss",
    "Embedding",
    "FeedForward",
    "GatedFeedForward",
    "LayerNorm",
    "LearnedPositionalEncoding",
    "Linear",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "MultiheadAttention",
    "RMSNorm",
    "ReLU",
    "RelativePositionBias",
    "RotaryEmbedding",
    "SiLU",
    "SinusoidalPositionalEncoding",
    "Softmax",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
