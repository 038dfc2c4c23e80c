"""summed = residual + dropout(x); out = rms_norm(summed), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import rms_norm
from .add_layer_norm import add, split
from .layer_norm import acc_dtype

DTYPES = rms_norm.DTYPES
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
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual (*, cols) -> out, summed (*, cols), rstd (rows). ``statistics`` as in layer_norm."""
    summed = add(x, residual, dropout_p, seed)
    out, rstd = rms_norm.forward(summed, weight, bias, eps)
    return out, summed, rstd


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
    acc = acc_dtype(summed.dtype)
    d, dweight, dbias = rms_norm.backward(
        dout.to(acc), summed.to(acc), weight, rstd, True, need_dweight, need_dbias, param_dtype
    )
    assert d is not None
    return *split(d, dsummed, summed, dropout_p, seed), dweight, dbias
