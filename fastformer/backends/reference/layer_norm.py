"""Layer normalisation (Ba, Kiros, Hinton 2016) in plain PyTorch; statistics in float32, float64 for float64 input."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import as_matrix

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
FEATURES: frozenset[str] = frozenset()


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a kernel accumulates in for data of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, statistics: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """x (*, cols), weight and bias (cols) or None -> out (*, cols), mean (rows), rstd (rows).

    Without ``statistics`` the caller does not want mean and rstd; a backend may return None for them.
    """
    acc = acc_dtype(x.dtype)
    xf = as_matrix(x).to(acc)
    mean = xf.mean(1)
    centred = xf - mean[:, None]
    rstd = torch.rsqrt(centred.square().mean(1) + eps)
    out = centred * rstd[:, None]
    if weight is not None:
        out = out * weight.to(acc)
    if bias is not None:
        out = out + bias.to(acc)
    return out.to(x.dtype).view(x.shape), mean, rstd


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
    acc = acc_dtype(x.dtype)
    dy = as_matrix(dout).to(acc)
    xhat = (as_matrix(x).to(acc) - mean[:, None]) * rstd[:, None]
    dweight = (dy * xhat).sum(0).to(param_dtype) if need_dweight else None
    dbias = dy.sum(0).to(param_dtype) if need_dbias else None
    dx = None
    if need_dx:
        g = dy if weight is None else dy * weight.to(acc)
        dx = rstd[:, None] * (g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True))
        dx = dx.to(x.dtype).view(x.shape)
    return dx, dweight, dbias
