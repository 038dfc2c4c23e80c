"""Residual + dropout + norm by csrc/cuda/add_layer_norm.cu; signatures as in backends/reference/add_layer_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ._call import DTYPES, empty, empty_like, library, on_device, row_statistics, stream

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
    kernels, cols = library(), summed.shape[-1]
    dresidual = empty_like(summed)
    dx = empty_like(summed) if dropout_p > 0 else None
    dweight = empty(summed, cols, dtype=param_dtype) if need_dweight else None
    dbias = empty(summed, cols, dtype=param_dtype) if need_dbias else None
    tensors = (dout, dsummed, summed, weight, mean, rstd, dx, dresidual, dweight, dbias)
    with on_device(summed):
        workspace = None
        if need_dweight or need_dbias:
            workspace = empty(summed, kernels.add_layer_norm_backward_workspace(summed), dtype=torch.uint8)
        kernels.add_layer_norm_backward(*tensors, dropout_p, seed, workspace, stream(summed))
    return dresidual if dx is None else dx, dresidual, dweight, dbias
