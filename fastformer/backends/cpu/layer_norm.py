"""Layer normalisation by csrc/cpu/layer_norm.cpp; signatures as in backends/reference/layer_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ..layout import row_layout
from ._call import DTYPE, DTYPES, acc_dtype, empty_like, pointer, workspace

FEATURES: frozenset[str] = frozenset()
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, statistics: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x (*, cols), weight and bias (cols) or None -> out (*, cols), mean (rows), rstd (rows)."""
    rows, cols, stride = row_layout(x)
    out = empty_like(x)
    mean = rstd = None
    if statistics:
        mean = torch.empty(
            rows, dtype=acc_dtype(x.dtype)
        )  # two allocations: an operator's outputs may not share memory
        rstd = torch.empty(rows, dtype=acc_dtype(x.dtype))
    parameter = weight if weight is not None else bias
    code = DTYPE[x.dtype]
    _C.layer_norm_forward(
        code,
        code if parameter is None else DTYPE[parameter.dtype],
        rows,
        cols,
        stride,
        eps,
        x.data_ptr(),
        pointer(weight),
        pointer(bias),
        out.data_ptr(),
        pointer(mean),
        pointer(rstd),
    )
    return out, mean, rstd


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    param_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx in x's dtype, dweight and dbias in ``param_dtype``), None for those not needed."""
    rows, cols, stride = row_layout(x)
    code = DTYPE[x.dtype]
    dx = empty_like(x) if need_dx else None
    dweight = torch.empty(cols, dtype=param_dtype) if need_dweight else None
    dbias = torch.empty(cols, dtype=param_dtype) if need_dbias else None
    scratch = None
    if need_dweight or need_dbias:
        scratch = workspace(_C.layer_norm_backward_workspace(code, rows, cols))
    _C.layer_norm_backward(
        code,
        DTYPE[param_dtype],
        rows,
        cols,
        stride,
        row_layout(dout)[2],
        x.data_ptr(),
        pointer(weight),
        mean.data_ptr(),
        rstd.data_ptr(),
        dout.data_ptr(),
        pointer(dx),
        pointer(dweight),
        pointer(dbias),
        pointer(scratch),
    )
    return dx, dweight, dbias
