"""softmax and log_softmax over rows by csrc/cpu/softmax.cpp; signatures as in backends/reference/softmax.py."""

from __future__ import annotations

from torch import Tensor

from ... import _C
from ._call import DTYPE, DTYPES, empty

FEATURES: frozenset[str] = frozenset()
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


def forward(x: Tensor, scale: float, log: bool) -> Tensor:
    """x (rows, cols) -> out (rows, cols)."""
    rows, cols = x.shape
    out = empty(rows, cols, x.dtype)
    _C.softmax_forward(DTYPE[x.dtype], rows, cols, x.stride(0), scale, log, x.data_ptr(), out.data_ptr())
    return out


def backward(dout: Tensor, out: Tensor, scale: float, log: bool) -> Tensor:
    """dout, out (rows, cols) -> dx (rows, cols)."""
    out = out.contiguous()
    rows, cols = out.shape
    dx = empty(rows, cols, out.dtype)
    _C.softmax_backward(
        DTYPE[out.dtype], rows, cols, dout.stride(0), scale, log, out.data_ptr(), dout.data_ptr(), dx.data_ptr()
    )
    return dx
