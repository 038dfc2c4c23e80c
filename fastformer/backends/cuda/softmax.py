"""softmax and log_softmax over rows by csrc/cuda/softmax.cu; signatures as in backends/reference/softmax.py."""

from __future__ import annotations

from torch import Tensor

from ._call import DTYPES, empty_like, library, on_device, stream

FEATURES = frozenset({"mask", "bias", "causal"})
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


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
    with on_device(x):
        library().softmax_forward(x, out, scale, log, mask, bias, row_shape, causal, stream(x))
    return out


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
    if not log:  # the outputs that take no part are 0
        mask, row_shape, causal = None, None, False
    with on_device(out):
        library().softmax_backward(dout, out, dx, scale, log, mask, row_shape, causal, stream(out))
    return dx
