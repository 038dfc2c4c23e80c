"""Residual + dropout + norm by csrc/cuda/add_layer_norm.cu; signatures as in backends/reference/add_layer_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ._call import DTYPE, DTYPES, empty, library, on_device, pointer, stream

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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual (rows, cols) -> out, summed (rows, cols), mean, rstd (rows)."""
    rows, cols = x.shape
    out, summed = empty(x, rows, cols), empty(x, rows, cols)
    mean, rstd = empty(x, 2, rows, dtype=torch.float32).unbind()
    parameter = weight if weight is not None else bias
    with on_device(x):
        library().add_layer_norm_forward(
            DTYPE[x.dtype],
            DTYPE[x.dtype if parameter is None else parameter.dtype],
            rows,
            cols,
            x.stride(0),
            residual.stride(0),
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
    rows, cols = summed.shape
    code, kernels = DTYPE[summed.dtype], library()
    dresidual = empty(summed, rows, cols)
    dx = empty(summed, rows, cols) if dropout_p > 0 else None
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
            dout.stride(0),
            0 if dsummed is None else dsummed.stride(0),
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
