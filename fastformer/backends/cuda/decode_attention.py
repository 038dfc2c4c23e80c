"""Attention against a key/value cache by csrc/cuda/decode_attention.cu, in half precision.

Cache and queries are read as they lie; head sizes or strides that are no multiples of 8 cost time, no copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_options import DecodeOptions, empty_out
from ._call import empty, library, on_device, stream

DTYPES = frozenset({torch.bfloat16, torch.float16})
FEATURES: frozenset[str] = frozenset()
__all__ = ["DTYPES", "FEATURES", "forward"]


def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, options: DecodeOptions
) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Sq, D) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq) float32; see backends/reference/decode_attention.py.

    A length, row or page out of range gives NaN for its sequence: looking at them first would mean waiting.
    """
    out = empty_out(q, v_cache)
    lse = empty(q, *q.shape[:3], dtype=torch.float32)
    arguments = ((q, k_cache, v_cache, out, lse, cache_seqlens), options)
    kernels = library()
    with on_device(q):
        workspace = empty(q, kernels.decode_attention_workspace(*arguments), dtype=torch.uint8)
        kernels.decode_attention(*arguments, workspace, stream(q))
    return out, lse
