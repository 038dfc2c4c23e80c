"""softmax and log_softmax over rows by csrc/cpu/softmax.cpp; signatures as in backends/reference/softmax.py."""

from __future__ import annotations

from torch import Tensor

from ... import _C
from ._call import DTYPES, empty_like

FEATURES: frozenset[str] = frozenset()
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


def forward(x: Tensor, scale: float, log: bool) -> Tensor:
    """x (*, cols) -> out (*, cols)."""
    out = empty_like(x)
    _C.softmax_forward(x, out, scale, log)
    return out


def backward(dout: Tensor, out: Tensor, scale: float, log: bool) -> Tensor:
    """dout, contiguous out (*, cols) -> dx (*, cols)."""
    dx = empty_like(out)
    _C.softmax_backward(dout, out, dx, scale, log)
    return dx
