"""gelu(x + bias) by csrc/cpu/gelu.cpp; signatures as in backends/reference/gelu.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ..layout import bias_layout
from ._call import DTYPE, DTYPES, empty_like, pointer, workspace

FEATURES = frozenset({"bias"})
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


def forward(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """x (*, cols) contiguous, bias (cols) or None -> out (*, cols)."""
    rows, cols = bias_layout(x, bias)
    out = empty_like(x)
    _C.gelu_forward(DTYPE[x.dtype], rows, cols, tanh, x.data_ptr(), pointer(_contiguous(bias)), out.data_ptr())
    return out


def backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_dbias: bool
) -> tuple[Tensor, Tensor | None]:
    """dout, x (*, cols) contiguous -> dx (*, cols), dbias (cols) or None."""
    bias = _contiguous(bias)
    rows, cols = bias_layout(x, bias)
    code = DTYPE[x.dtype]
    dx = empty_like(x)
    dbias = torch.empty(cols, dtype=x.dtype) if need_dbias else None
    scratch = workspace(_C.gelu_backward_workspace(code, rows, cols)) if need_dbias else None
    _C.gelu_backward(
        code,
        rows,
        cols,
        tanh,
        x.data_ptr(),
        pointer(bias),
        dout.data_ptr(),
        dx.data_ptr(),
        pointer(dbias),
        pointer(scratch),
    )
    return dx, dbias


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None else bias.contiguous()
