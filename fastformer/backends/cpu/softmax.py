"""softmax and log_softmax over rows by csrc/cpu/softmax.cpp; signatures as in backends/reference/softmax.py."""

from __future__ import annotations

from torch import Tensor

from ... import _C
from ..layout import row_layout
from ._call import DTYPE, DTYPES, empty_like

FEATURES: frozenset[str] = frozenset()
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


def forward(x: Tensor, scale: float, log: bool) -> Tensor:
    """x (*, cols) -> out (*, cols)."""
    rows, cols, stride = row_layout(x)
    out = empty_like(x)
    _C.softmax_forward(DTYPE[x.dtype], rows, cols, stride, scale, log, x.data_ptr(), out.data_ptr())
    return out


def backward(dout: Tensor, out: Tensor, scale: float, log: bool) -> Tensor:
    """dout, contiguous out (*, cols) -> dx (*, cols)."""
    rows, cols, _ = row_layout(out)
    dx = empty_like(out)
    _C.softmax_backward(
        DTYPE[out.dtype], rows, cols, row_layout(dout)[2], scale, log, out.data_ptr(), dout.data_ptr(), dx.data_ptr()
    )
    return dx
