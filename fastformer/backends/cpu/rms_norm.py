"""RMS normalisation by csrc/cpu/rms_norm.cpp; signatures as in backends/reference/rms_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ._call import DTYPES, empty_like, row_statistic

FEATURES: frozenset[str] = frozenset()
__all__ = ["DTYPES", "FEATURES", "backward", "forward", "plain"]


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, statistics: bool = True
) -> tuple[Tensor, Tensor | None]:
    """x (*, cols), weight and bias (cols) or None -> out (*, cols), rstd (rows)."""
    out = empty_like(x)
    rstd = row_statistic(x) if statistics else None
    _C.rms_norm_forward(x, weight, bias, out, None, rstd, eps)
    return out, rstd


def plain(x: Tensor, normalized_shape: object, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor | None:
    """``forward`` without what backward needs; None if anything about the call is unusual or wrong."""
    out = torch.empty_like(x)
    return out if _C.rms_norm_plain(x, normalized_shape, weight, bias, eps, out) else None


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    param_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx in x's dtype, dweight and dbias in ``param_dtype``), None for those not needed."""
    dx = empty_like(x) if need_dx else None
    dweight = torch.empty(x.shape[-1], dtype=param_dtype) if need_dweight else None
    dbias = torch.empty(x.shape[-1], dtype=param_dtype) if need_dbias else None
    _C.rms_norm_backward(dout, x, weight, None, rstd, dx, dweight, dbias)
    return dx, dweight, dbias
