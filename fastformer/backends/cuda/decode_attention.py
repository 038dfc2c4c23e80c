"""Attention against a key/value cache by csrc/cuda/decode_attention.cu, in half precision.

Cache and queries are read as they lie; head sizes or strides that are no multiples of 8 cost time, no copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_options import empty_out
from ._call import DTYPE, empty, library, on_device, pointer, stream

DTYPES = frozenset({torch.bfloat16, torch.float16})
FEATURES: frozenset[str] = frozenset()
__all__ = ["DTYPES", "FEATURES", "forward"]


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    page_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Sq, D) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq) float32; see backends/reference/decode_attention.py.

    A length, row or page out of range gives NaN for its sequence: looking at them first would mean waiting.
    """
    batch, heads, queries, head_dim = q.shape
    cache_rows, heads_kv, capacity, head_dim_v = v_cache.shape
    page_size = 0
    if page_table is not None:
        page_size, capacity = capacity, capacity * page_table.shape[1]
    out = empty_out(q, v_cache)
    lse = empty(q, batch, heads, queries, dtype=torch.float32)
    arguments = (
        DTYPE[q.dtype],
        (batch, heads, heads_kv, queries, head_dim, head_dim_v, cache_rows, capacity, page_size),
        scale,
        softcap,
        causal,
        window_left,
        window_right,
        (q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(), lse.data_ptr()),
        (q.stride(), k_cache.stride(), v_cache.stride(), out.stride()),
        (
            cache_seqlens.data_ptr(),
            pointer(cache_leftpad),
            pointer(cache_batch_idx),
            pointer(page_table),
            0 if page_table is None else page_table.stride(0),
            pointer(alibi_slopes),
            0 if alibi_slopes is None or len(alibi_slopes) == 1 else alibi_slopes.stride(0),
        ),
    )
    kernels = library()
    with on_device(q):
        workspace = empty(q, kernels.decode_attention_workspace(*arguments), dtype=torch.uint8)
        kernels.decode_attention(*arguments, workspace.data_ptr(), stream(q))
    return out, lse
