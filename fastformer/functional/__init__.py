"""Functions with the signatures of ``torch.nn.functional``, and the transformer operations torch does not have."""

from .add_layer_norm import add_layer_norm
from .attention import attention, attention_qkvpacked, scaled_dot_product_attention
from .cross_entropy import cross_entropy
from .feed_forward import feed_forward
from .gelu import bias_gelu, gelu
from .layer_norm import layer_norm
from .softmax import log_softmax, softmax

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_qkvpacked",
    "bias_gelu",
    "cross_entropy",
    "feed_forward",
    "gelu",
    "layer_norm",
    "log_softmax",
    "scaled_dot_product_attention",
    "softmax",
]
