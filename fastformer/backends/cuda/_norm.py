"""The backward calls that layer_norm and rms_norm share; rms_norm's mean is None."""

from __future__ import annotations

import torch
from torch import Tensor

from ._call import empty, empty_like, library, on_device, stream


def backward(
    op: str,
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
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
            workspace = empty(x, getattr(kernels, f"{op}_backward_workspace")(x), dtype=torch.uint8)
        getattr(kernels, f"{op}_backward")(
            dout, x, weight, mean, rstd, dx, dweight, dbias, workspace, stream(x)
        )  # fmt: skip
    return dx, dweight, dbias


def add_backward(
    op: str,
    tensors: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor],
    options: tuple[float, int],
    need_dweight: bool,
    need_dbias: bool,
    param_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dx, dresidual, dweight, dbias) of (dout, dsummed, summed, weight, mean, rstd) and (dropout_p, seed)."""
    kernels, summed = library(), tensors[2]
    cols = summed.shape[-1]
    dresidual = empty_like(summed)
    dx = empty_like(summed) if options[0] > 0 else None
    dweight = empty(summed, cols, dtype=param_dtype) if need_dweight else None
    dbias = empty(summed, cols, dtype=param_dtype) if need_dbias else None
    with on_device(summed):
        workspace = None
        if need_dweight or need_dbias:
            workspace = empty(summed, getattr(kernels, f"{op}_backward_workspace")(summed), dtype=torch.uint8)
        getattr(kernels, f"{op}_backward")(
            *tensors, dx, dresidual, dweight, dbias, *options, workspace, stream(summed)
        )  # fmt: skip
    return dresidual if dx is None else dx, dresidual, dweight, dbias
