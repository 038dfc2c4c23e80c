"""summed = residual + dropout(x); out = layer_norm(summed), one pass forward and one backward.

The kernels are those of layer_norm.py, given a second input; the dropout mask is recomputed in backward from the seed
(dropout.py), so nothing but ``summed``, the mean and rstd is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import layer_norm
from .dropout import dropout
from .launch import DTYPES as DTYPES
from .launch import Configuration

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
    """x, residual (*, cols) -> out, summed (*, cols), mean, rstd (rows)."""
    dropped = dropout(dropout_p, seed) if dropout_p > 0 else None
    out, summed, mean, rstd = layer_norm.run_forward(x, residual, weight, bias, eps, dropped)
    assert summed is not None and mean is not None
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
    dropped = dropout(dropout_p, seed) if dropout_p > 0 else None
    dx, dresidual, dweight, dbias = layer_norm.run_backward(
        dout, dsummed, summed, weight, mean, rstd, dropped, True, need_dweight, need_dbias, param_dtype
    )
    assert dresidual is not None
    return dresidual if dx is None else dx, dresidual, dweight, dbias


def configurations() -> Iterator[Configuration]:
    """Every build with a residual, with and without dropout."""
    for with_dropout in (False, True):
        label = "add_layer_norm" + ("+dropout" if with_dropout else "")
        yield from layer_norm.build_configurations(label, residual=True, dropout=with_dropout)
