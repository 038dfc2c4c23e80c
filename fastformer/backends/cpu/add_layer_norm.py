"""Residual + dropout + layer normalisation by csrc/cpu/add_layer_norm.cpp; see backends/reference/add_layer_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ..layout import row_layout
from ._call import DTYPE, DTYPES, acc_dtype, empty_like, pointer, workspace

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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, residual (*, cols) -> out, summed (*, cols), mean, rstd (rows)."""
    rows, cols, stride = row_layout(x)
    out, summed = empty_like(x), empty_like(x)
    mean = rstd = None
    if statistics:
        mean = torch.empty(
            rows, dtype=acc_dtype(x.dtype)
        )  # two allocations: an operator's outputs may not share memory
        rstd = torch.empty(rows, dtype=acc_dtype(x.dtype))
    parameter = weight if weight is not None else bias
    code = DTYPE[x.dtype]
    _C.add_layer_norm_forward(
        code,
        code if parameter is None else DTYPE[parameter.dtype],
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
        pointer(mean),
        pointer(rstd),
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
    code = DTYPE[summed.dtype]
    dresidual = empty_like(summed)
    dx = empty_like(summed) if dropout_p > 0 else None
    dweight = torch.empty(cols, dtype=param_dtype) if need_dweight else None
    dbias = torch.empty(cols, dtype=param_dtype) if need_dbias else None
    scratch = None
    if need_dweight or need_dbias:
        scratch = workspace(_C.layer_norm_backward_workspace(code, rows, cols))
    _C.add_layer_norm_backward(
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
        pointer(scratch),
    )
    return dx if dx is not None else dresidual, dresidual, dweight, dbias
