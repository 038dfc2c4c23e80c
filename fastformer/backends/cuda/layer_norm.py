"""Layer normalisation by csrc/cuda/layer_norm.cu; signatures as in backends/reference/layer_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ._call import DTYPES, empty, empty_like, library, on_device, row_statistics, stream

FEATURES: frozenset[str] = frozenset()
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, statistics: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """x (*, cols), weight and bias (cols) or None -> out (*, cols), mean (rows), rstd (rows)."""
    out, (mean, rstd) = empty_like(x), row_statistics(x)
    with on_device(x):
        library().layer_norm_forward(x, weight, bias, out, mean, rstd, eps, stream(x))
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
    kernels, cols = library(), x.shape[-1]
    dx = empty_like(x) if need_dx else None
    dweight = empty(x, cols, dtype=param_dtype) if need_dweight else None
    dbias = empty(x, cols, dtype=param_dtype) if need_dbias else None
    with on_device(x):
        workspace = None
        if need_dweight or need_dbias:
            workspace = empty(x, kernels.layer_norm_backward_workspace(x), dtype=torch.uint8)
        kernels.layer_norm_backward(dout, x, weight, mean, rstd, dx, dweight, dbias, workspace, stream(x))
    return dx, dweight, dbias
