"""RMS normalisation (Zhang, Sennrich 2019) in plain PyTorch; the statistic in float32, float64 for float64 input."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import as_matrix
from .layer_norm import DTYPES as DTYPES
from .layer_norm import acc_dtype

FEATURES: frozenset[str] = frozenset()


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, statistics: bool = True
) -> tuple[Tensor, Tensor]:
    """x (*, cols), weight and bias (cols) or None -> out (*, cols), rstd (rows). ``statistics`` as in layer_norm."""
    acc = acc_dtype(x.dtype)
    xf = as_matrix(x).to(acc)
    rstd = torch.rsqrt(xf.square().mean(1) + eps)
    out = xf * rstd[:, None]
    if weight is not None:
        out = out * weight.to(acc)
    if bias is not None:
        out = out + bias.to(acc)
    return out.to(x.dtype).view(x.shape), rstd


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    param_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx in x's dtype, dweight and dbias in ``param_dtype``), None for those not needed."""
    acc = acc_dtype(x.dtype)
    dy = as_matrix(dout).to(acc)
    xhat = as_matrix(x).to(acc) * rstd[:, None]
    dweight = (dy * xhat).sum(0).to(param_dtype) if need_dweight else None
    dbias = dy.sum(0).to(param_dtype) if need_dbias else None
    dx = None
    if need_dx:
        g = dy if weight is None else dy * weight.to(acc)
        dx = rstd[:, None] * (g - xhat * (g * xhat).mean(1, keepdim=True))
        dx = dx.to(x.dtype).view(x.shape)
    return dx, dweight, dbias
