"""Layer normalisation by csrc/cuda/layer_norm.cu; signatures as in backends/reference/layer_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import row_layout
from ._call import DTYPE, DTYPES, empty, empty_like, library, on_device, pointer, stream

FEATURES: frozenset[str] = frozenset()
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, statistics: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """x (*, cols), weight and bias (cols) or None -> out (*, cols), mean (rows), rstd (rows)."""
    rows, cols, stride = row_layout(x)
    out = empty_like(x)
    mean, rstd = empty(x, rows, dtype=torch.float32), empty(x, rows, dtype=torch.float32)
    parameter = weight if weight is not None else bias
    with on_device(x):
        library().layer_norm_forward(
            DTYPE[x.dtype],
            DTYPE[x.dtype if parameter is None else parameter.dtype],
            rows,
            cols,
            stride,
            eps,
            x.data_ptr(),
            pointer(weight),
            pointer(bias),
            out.data_ptr(),
            mean.data_ptr(),
            rstd.data_ptr(),
            stream(x),
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
    code, kernels = DTYPE[x.dtype], library()
    dx = empty_like(x) if need_dx else None
    dweight = empty(x, cols, dtype=param_dtype) if need_dweight else None
    dbias = empty(x, cols, dtype=param_dtype) if need_dbias else None
    with on_device(x):
        workspace = None
        if need_dweight or need_dbias:
            workspace = empty(x, kernels.layer_norm_backward_workspace(code, rows, cols), dtype=torch.uint8)
        kernels.layer_norm_backward(
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
            pointer(workspace),
            stream(x),
        )
    return dx, dweight, dbias
