"""softmax and log_softmax over rows by csrc/cpu/softmax.cpp; signatures as in backends/reference/softmax.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ._call import DTYPES, empty_like

FEATURES = frozenset({"mask", "bias", "causal"})
__all__ = ["DTYPES", "FEATURES", "backward", "forward", "plain"]


def forward(
    x: Tensor,
    scale: float,
    log: bool,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    row_shape: tuple[int, int, int] | None = None,
    causal: bool = False,
) -> Tensor:
    """x (*, cols) -> out (*, cols)."""
    out = empty_like(x)
    if row_shape is None:
        _C.softmax_forward(x, out, scale, log)
    else:
        _C.softmax_forward(x, out, scale, log, mask, bias, row_shape, causal)
    return out


def plain(x: Tensor, dim: int | None, log: bool) -> Tensor | None:
    """``forward`` along the last dimension; None if anything about the call is unusual or wrong."""
    out = torch.empty_like(x)
    return out if _C.softmax_plain(x, dim, log, out) else None


def backward(
    dout: Tensor,
    out: Tensor,
    scale: float,
    log: bool,
    mask: Tensor | None = None,
    row_shape: tuple[int, int, int] | None = None,
    causal: bool = False,
) -> Tensor:
    """dout, contiguous out (*, cols) -> dx (*, cols)."""
    dx = empty_like(out)
    if row_shape is None or not log:  # elsewhere the outputs that take no part are 0
        _C.softmax_backward(dout, out, dx, scale, log)
    else:
        _C.softmax_backward(dout, out, dx, scale, log, mask, row_shape, causal)
    return dx
