"""softmax(scale * x) over rows, or its logarithm, in plain PyTorch. A row of only -inf gives zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_norm import acc_dtype

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
FEATURES: frozenset[str] = frozenset()


def forward(x: Tensor, scale: float, log: bool) -> Tensor:
    """x (*, cols) -> out (*, cols)."""
    z = x.to(acc_dtype(x.dtype)) * scale
    if log:
        out = torch.log_softmax(z, -1)
        return torch.where(torch.isneginf(z).all(-1, keepdim=True), float("-inf"), out).to(x.dtype)
    out = torch.softmax(z, -1)
    return torch.where(torch.isneginf(z).all(-1, keepdim=True), 0.0, out).to(x.dtype)


def backward(dout: Tensor, out: Tensor, scale: float, log: bool) -> Tensor:
    """dout, out (*, cols) -> dx (*, cols)."""
    acc = acc_dtype(out.dtype)
    dy, y = dout.to(acc), out.to(acc)
    if log:
        dx = dy - y.exp() * dy.sum(-1, keepdim=True)
        dx = torch.where(torch.isneginf(y).all(-1, keepdim=True), 0.0, dx)
    else:
        dx = y * (dy - (dy * y).sum(-1, keepdim=True))
    return (dx * scale).to(out.dtype)
