"""Attention against a key/value cache on the CPU (csrc/cpu/decode_attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ..attention_options import DecodeOptions, empty_out
from ._call import DTYPES, acc_dtype

FEATURES: frozenset[str] = frozenset()
__all__ = ["DTYPES", "FEATURES", "forward"]


def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, options: DecodeOptions
) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Sq, D) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq). Lengths, rows and pages out of range: ValueError."""
    out = empty_out(q, v_cache)
    lse = torch.empty(q.shape[:3], dtype=acc_dtype(q.dtype))
    _C.decode_attention((q, k_cache, v_cache, out, lse, cache_seqlens), options)
    return out, lse
