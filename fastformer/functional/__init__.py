"""Functions with the signatures of ``torch.nn.functional``, and the transformer operations torch does not have."""

from .activation import bias_activation, gated_activation, gelu, relu, silu
from .add_layer_norm import add_layer_norm
from .add_rms_norm import add_rms_norm
from .attention import RelativeBias, attention, attention_qkvpacked
from .attention_varlen import attention_varlen
from .cross_entropy import cross_entropy
from .decode_attention import decode_attention, update_kv_cache
from .embedding import embedding, transformer_embedding
from .feed_forward import feed_forward, gated_feed_forward
from .layer_norm import layer_norm
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .positions import sinusoidal_positions
from .rms_norm import rms_norm
from .rotary import rotary_embedding
from .scaled_dot_product_attention import scaled_dot_product_attention
from .softmax import log_softmax, softmax

__all__ = [
    "RelativeBias",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_qkvpacked",
    "attention_varlen",
    "bias_activation",
    "cross_entropy",
    "decode_attention",
    "embedding",
    "feed_forward",
    "gated_activation",
    "gated_feed_forward",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "relu",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "silu",
    "sinusoidal_positions",
    "softmax",
    "transformer_embedding",
    "update_kv_cache",
]
