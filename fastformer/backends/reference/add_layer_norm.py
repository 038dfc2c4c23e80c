"""summed = residual + dropout(x); out = layer_norm(summed), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual (rows, cols) -> out, summed (rows, cols), mean, rstd (rows)."""
    acc = layer_norm.acc_dtype(x.dtype)
    xf = x.to(acc)
    if dropout_p > 0:
        xf = xf * dropout_scales(seed, *x.shape, dropout_p, x.device, acc)
    summed = (residual.to(acc) + xf).to(x.dtype)
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
    if dsummed is not None:
        d = d + dsummed.to(acc)
    dresidual = d.to(summed.dtype)
    if dropout_p == 0:
        return dresidual, dresidual, dweight, dbias
    dx = (d * dropout_scales(seed, *summed.shape, dropout_p, summed.device, acc)).to(summed.dtype)
    return dx, dresidual, dweight, dbias
