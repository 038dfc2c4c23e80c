"""Residual + dropout + norm by csrc/cuda/add_layer_norm.cu; signatures as in backends/reference/add_layer_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _norm
from ._call import DTYPES, empty_like, library, on_device, row_statistics, stream

FEATURES = frozenset({"dropout"})
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


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
    out, summed, (mean, rstd) = empty_like(x), empty_like(x), row_statistics(x)
    with on_device(x):
        library().add_layer_norm_forward(
            x, residual, weight, bias, out, summed, mean, rstd, eps, dropout_p, seed, stream(x)
        )
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
    tensors, options = (dout, dsummed, summed, weight, mean, rstd), (dropout_p, seed)
    return _norm.add_backward("add_layer_norm", tensors, options, need_dweight, need_dbias, param_dtype)
