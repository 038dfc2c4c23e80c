"""Attention on the CPU (csrc/cpu/attention.cpp, attention_backward.cpp). Signatures: backends/attention_options.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ..attention_options import FEATURES as ALL_FEATURES
from ..attention_options import Gradients, Options, empty_like_input, empty_out
from ._call import DTYPES, acc_dtype, on_huge_pages

FEATURES = frozenset(ALL_FEATURES)
__all__ = ["DTYPES", "FEATURES", "backward", "forward", "forward_only", "plain"]


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq)."""
    out = empty_out(q, v)
    lse = torch.empty(q.shape[:3], dtype=acc_dtype(q.dtype))
    _C.attention_forward((q, k, v, out, lse), options)
    return out, lse


def forward_only(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """``forward`` where no backward follows: a few queries then read keys and values as they lie."""
    out = empty_out(q, v)
    _C.attention_forward((q, k, v, out, None), options)
    return out


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    needs: tuple[bool, bool] = (False, False),
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> Gradients:
    """Gradients of q, k and v, written into dq, dk, dv where given, and of the bias and the distance bias if needed."""
    dq = empty_like_input(q) if dq is None else dq
    dk = empty_like_input(k) if dk is None else dk
    dv = empty_like_input(v) if dv is None else dv
    dbias = ddistance = None
    if needs[0]:
        assert options.bias is not None
        make = torch.empty if q.numel() else torch.zeros  # nothing is written for an empty batch
        dbias = on_huge_pages(make(options.bias.shape, dtype=acc_dtype(q.dtype)))
    if needs[1]:
        assert options.distance_bias is not None
        ddistance = torch.zeros_like(options.distance_bias)
    _C.attention_backward((q, k, v, out, lse), options, (dout, dlse, dq, dk, dv, dbias, ddistance))
    return Gradients(dq, dk, dv, dbias, ddistance)


def plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, with_lse: bool
) -> tuple[Tensor, Tensor | None] | None:
    """``forward``, the log-sum-exp only on request, where there is nothing beside q, k and v; None if anything about
    them is unusual or wrong.

    For calls so small that the Python of the general way would take longer than the kernel.
    """
    if q.dim() != 4 or v.dim() != 4:
        return None
    out = empty_out(q, v)
    lse = torch.empty(q.shape[:3], dtype=acc_dtype(q.dtype)) if with_lse else None
    return (out, lse) if _C.attention_plain(q, k, v, out, lse, scale, causal) else None
