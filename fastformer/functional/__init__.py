"""Functions with the signatures of ``torch.nn.functional``, and the transformer operations torch does not have."""

from .add_layer_norm import add_layer_norm
from .add_rms_norm import add_rms_norm
from .attention import RelativeBias, attention, attention_qkvpacked
from .attention_varlen import attention_varlen
from .cross_entropy import cross_entropy
from .decode_attention import decode_attention, update_kv_cache
from .embedding import embedding, transformer_embedding
from .feed_forward import feed_forward
from .gelu import bias_gelu, gelu
from .layer_norm import layer_norm
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
    "bias_gelu",
    "cross_entropy",
    "decode_attention",
    "embedding",
    "feed_forward",
    "gelu",
    "layer_norm",
    "log_softmax",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "sinusoidal_positions",
    "softmax",
    "transformer_embedding",
    "update_kv_cache",
]
