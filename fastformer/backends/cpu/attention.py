"""Attention by csrc/cpu/attention.cpp and attention_backward.cpp; signatures as in backends/reference/attention.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ._call import DTYPE, DTYPES, acc_dtype, pointer, workspace

FEATURES = frozenset({"causal", "key_padding_mask", "grouped_heads"})
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    batch, heads, seqlen_q, head_dim = q.shape
    return batch, heads, k.shape[1], seqlen_q, k.shape[2], head_dim, v.shape[3]


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq)."""
    sizes = _sizes(q, k, v)
    batch, heads, _, seqlen_q, _, _, head_dim_v = sizes
    code = DTYPE[q.dtype]
    out = _transposed(batch, heads, seqlen_q, head_dim_v, q.dtype)
    lse = torch.empty(batch, heads, seqlen_q, dtype=acc_dtype(q.dtype))
    mask = None if key_padding_mask is None else key_padding_mask.contiguous()
    scratch = workspace(_C.attention_forward_workspace(code, *sizes, causal, mask is not None))
    _C.attention_forward(
        code,
        *sizes,
        scale,
        causal,
        pointer(mask),
        0 if mask is None else mask.stride(0),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        q.stride(),
        k.stride(),
        v.stride(),
        out.stride(),
        scratch.data_ptr(),
    )
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    key_padding_mask: Tensor | None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, written into dq, dk, dv where given."""
    sizes = _sizes(q, k, v)
    code = DTYPE[q.dtype]
    dq = _like_input(q) if dq is None else dq
    dk = _like_input(k) if dk is None else dk
    dv = _like_input(v) if dv is None else dv
    mask = None if key_padding_mask is None else key_padding_mask.contiguous()
    scratch = workspace(_C.attention_backward_workspace(code, *sizes, causal, mask is not None))
    _C.attention_backward(
        code,
        *sizes,
        scale,
        causal,
        pointer(mask),
        0 if mask is None else mask.stride(0),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        q.stride(),
        k.stride(),
        v.stride(),
        out.stride(),
        dout.data_ptr(),
        pointer(dlse),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        dout.stride(),
        dq.stride(),
        dk.stride(),
        dv.stride(),
        scratch.data_ptr(),
    )
    return dq, dk, dv


def _like_input(t: Tensor) -> Tensor:
    # (B, S, H, D) in memory when the input is a transposed view of that: its gradient then needs no copy to reshape.
    return _transposed(*t.shape, t.dtype) if t.stride(1) < t.stride(2) else torch.empty(t.shape, dtype=t.dtype)


def _transposed(b: int, h: int, s: int, d: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised (B, H, S, D) that is (B, S, H, D) in memory."""
    return torch.empty_strided((b, h, s, d), (s * h * d, d, h * d, 1), dtype=dtype)
