"""gelu(x + bias) by csrc/cpu/gelu.cpp; signatures as in backends/reference/gelu.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ._call import DTYPES, empty_like

FEATURES = frozenset({"bias"})
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


def forward(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """x (*, cols) contiguous, bias (cols) or None -> out (*, cols)."""
    out = empty_like(x)
    _C.gelu_forward(x, _contiguous(bias), out, tanh)
    return out


def backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_dbias: bool
) -> tuple[Tensor, Tensor | None]:
    """dout, x (*, cols) contiguous -> dx (*, cols), dbias (cols) or None."""
    dx = empty_like(x)
    dbias = torch.empty(x.shape[-1], dtype=x.dtype) if need_dbias else None
    _C.gelu_backward(dout, x, _contiguous(bias), dx, dbias, tanh)
    return dx, dbias


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None else bias.contiguous()
