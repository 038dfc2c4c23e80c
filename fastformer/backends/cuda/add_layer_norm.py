"""Residual + dropout + norm by csrc/cuda/add_layer_norm.cu; signatures as in backends/reference/add_layer_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import row_layout
from ._call import DTYPE, DTYPES, empty, empty_like, library, on_device, pointer, stream

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
    rows, cols, stride = row_layout(x)
    out, summed = empty_like(x), empty_like(x)
    mean, rstd = empty(x, rows, dtype=torch.float32), empty(x, rows, dtype=torch.float32)
    parameter = weight if weight is not None else bias
    with on_device(x):
        library().add_layer_norm_forward(
            DTYPE[x.dtype],
            DTYPE[x.dtype if parameter is None else parameter.dtype],
            rows,
            cols,
            stride,
            row_layout(residual)[2],
            eps,
            dropout_p,
            seed,
            x.data_ptr(),
            residual.data_ptr(),
            pointer(weight),
            pointer(bias),
            out.data_ptr(),
            summed.data_ptr(),
            mean.data_ptr(),
            rstd.data_ptr(),
            stream(x),
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
    rows, cols, _ = row_layout(summed)
    code, kernels = DTYPE[summed.dtype], library()
    dresidual = empty_like(summed)
    dx = empty_like(summed) if dropout_p > 0 else None
    dweight = empty(summed, cols, dtype=param_dtype) if need_dweight else None
    dbias = empty(summed, cols, dtype=param_dtype) if need_dbias else None
    with on_device(summed):
        workspace = None
        if need_dweight or need_dbias:
            workspace = empty(summed, kernels.add_layer_norm_backward_workspace(code, rows, cols), dtype=torch.uint8)
        kernels.add_layer_norm_backward(
            code,
            DTYPE[param_dtype],
            rows,
            cols,
            row_layout(dout)[2],
            0 if dsummed is None else row_layout(dsummed)[2],
            dropout_p,
            seed,
            pointer(weight),
            summed.data_ptr(),
            mean.data_ptr(),
            rstd.data_ptr(),
            dout.data_ptr(),
            pointer(dsummed),
            pointer(dx),
            dresidual.data_ptr(),
            pointer(dweight),
            pointer(dbias),
            pointer(workspace),
            stream(summed),
        )
    return dresidual if dx is None else dx, dresidual, dweight, dbias
