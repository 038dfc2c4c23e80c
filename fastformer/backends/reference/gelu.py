"""gelu(x + bias) (Hendrycks, Gimpel 2016), exact or by the tanh approximation, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layout import as_matrix
from .layer_norm import acc_dtype

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
FEATURES = frozenset({"bias"})


def forward(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """x (*, cols), bias (cols) or None -> out (*, cols)."""
    z = x.to(acc_dtype(x.dtype))
    if bias is not None:
        z = z + bias.to(z.dtype)
    return F.gelu(z, approximate="tanh" if tanh else "none").to(x.dtype)


def backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_dbias: bool
) -> tuple[Tensor, Tensor | None]:
    """dout, x (*, cols) -> dx (*, cols), dbias (cols) or None."""
    acc = acc_dtype(x.dtype)
    z = x.to(acc)
    if bias is not None:
        z = z + bias.to(acc)
    dz = torch.ops.aten.gelu_backward(dout.to(acc), z, approximate="tanh" if tanh else "none")
    return dz.to(x.dtype), as_matrix(dz).sum(0).to(x.dtype) if need_dbias else None
