"""Residual + dropout + RMS normalisation by csrc/cpu/add_rms_norm.cpp; see backends/reference/add_rms_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ._call import DTYPES, empty_like, row_statistic

FEATURES = frozenset({"dropout"})
__all__ = ["DTYPES", "FEATURES", "backward", "forward", "plain"]


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
    statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, residual (*, cols) -> out, summed (*, cols), rstd (rows)."""
    out, summed = empty_like(x), empty_like(x)
    rstd = row_statistic(x) if statistics else None
    _C.add_rms_norm_forward(x, residual, weight, bias, out, summed, None, rstd, eps, dropout_p, seed)
    return out, summed, rstd


def plain(
    x: Tensor, residual: Tensor, normalized_shape: object, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor] | None:
    """out and summed of ``forward``, without dropout; None if anything about the call is unusual or wrong."""
    out, summed = torch.empty_like(x), torch.empty_like(x)
    found = _C.add_rms_norm_plain(x, residual, normalized_shape, weight, bias, eps, out, summed)
    return (out, summed) if found else None


def backward(
    dout: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dropout_p: float,
    seed: int,
    need_dweight: bool,
    need_dbias: bool,
    param_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dx, dresidual, dweight, dbias). Without dropout dx and dresidual are the same tensor."""
    dresidual = empty_like(summed)
    dx = empty_like(summed) if dropout_p > 0 else None
    dweight = torch.empty(summed.shape[-1], dtype=param_dtype) if need_dweight else None
    dbias = torch.empty(summed.shape[-1], dtype=param_dtype) if need_dbias else None
    _C.add_rms_norm_backward(dout, dsummed, summed, weight, None, rstd, dx, dresidual, dweight, dbias, dropout_p, seed)
    return dx if dx is not None else dresidual, dresidual, dweight, dbias
