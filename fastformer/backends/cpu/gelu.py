"""gelu(x + bias) by csrc/cpu/gelu.cpp; signatures as in backends/reference/gelu.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ._call import DTYPE, DTYPES, empty, pointer, workspace

FEATURES = frozenset({"bias"})
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


def forward(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """x (rows, cols), bias (cols) or None -> out (rows, cols)."""
    x = x.contiguous()
    rows, cols = x.shape
    out = empty(rows, cols, x.dtype)
    _C.gelu_forward(DTYPE[x.dtype], rows, cols, tanh, x.data_ptr(), pointer(_contiguous(bias)), out.data_ptr())
    return out


def backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_dbias: bool
) -> tuple[Tensor, Tensor | None]:
    """dout, x (rows, cols) -> dx (rows, cols), dbias (cols) or None."""
    dout, x, bias = dout.contiguous(), x.contiguous(), _contiguous(bias)
    rows, cols = x.shape
    code = DTYPE[x.dtype]
    dx = empty(rows, cols, x.dtype)
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
