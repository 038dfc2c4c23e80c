"""summed = residual + dropout(x); out = layer_norm(summed), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import as_matrix
from . import layer_norm
from .philox import dropout_scales

DTYPES = layer_norm.DTYPES
FEATURES = frozenset({"dropout"})


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
    statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual (*, cols) -> out, summed (*, cols), mean, rstd (rows). ``statistics`` as in layer_norm."""
    summed = add(x, residual, dropout_p, seed)
    out, mean, rstd = layer_norm.forward(summed, weight, bias, eps)
    return out, summed, mean, rstd


def backward(
    dout: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: int,
    need_dweight: bool,
    need_dbias: bool,
    param_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dx, dresidual, dweight, dbias). Without dropout dx and dresidual are the same tensor."""
    acc = layer_norm.acc_dtype(summed.dtype)
    d, dweight, dbias = layer_norm.backward(
        dout.to(acc), summed.to(acc), weight, mean, rstd, True, need_dweight, need_dbias, param_dtype
    )
    assert d is not None
    return *split(d, dsummed, summed, dropout_p, seed), dweight, dbias


def add(x: Tensor, residual: Tensor, dropout_p: float, seed: int) -> Tensor:
    """residual + dropout(x)."""
    acc = layer_norm.acc_dtype(x.dtype)
    xf = as_matrix(x).to(acc)
    if dropout_p > 0:
        xf = xf * dropout_scales(seed, *xf.shape, dropout_p, x.device, acc)
    return (as_matrix(residual).to(acc) + xf).to(x.dtype).view(x.shape)


def split(d: Tensor, dsummed: Tensor | None, summed: Tensor, dropout_p: float, seed: int) -> tuple[Tensor, Tensor]:
    """(dx, dresidual) from the gradient ``d`` that came through the norm and the sum's own, or None."""
    rows = as_matrix(d)
    if dsummed is not None:
        rows = rows + as_matrix(dsummed).to(d.dtype)
    dresidual = rows.to(summed.dtype).view(summed.shape)
    if dropout_p == 0:
        return dresidual, dresidual
    dx = rows * dropout_scales(seed, *rows.shape, dropout_p, d.device, d.dtype)
    return dx.to(summed.dtype).view(summed.shape), dresidual
