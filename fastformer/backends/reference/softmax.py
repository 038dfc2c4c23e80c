"""softmax(scale * x + bias + mask) over rows, or its logarithm, in plain PyTorch; the formula is in
csrc/include/fastformer.h. A row without any element gives zeros, -inf for the logarithm."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_norm import acc_dtype

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
FEATURES = frozenset({"mask", "bias", "causal"})


def forward(
    x: Tensor,
    scale: float,
    log: bool,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    row_shape: tuple[int, int, int] | None = None,
    causal: bool = False,
) -> Tensor:
    """x (*, cols) -> out (*, cols).

    Args:
        mask: bool (row_shape..., cols) or None, True = takes part; any strides, the last 0 or 1.
        bias: (row_shape..., cols) or None, added; in x's dtype or the accumulation dtype, strides as mask's.
        row_shape: the rows' dimensions, the last being the queries; None = no mask, no bias, not causal.
        causal: query k of S sees the columns up to k + cols - S.
    """
    z = x.to(acc_dtype(x.dtype)) * scale
    if bias is not None:
        z = (z.reshape(bias.shape) + bias).view(x.shape)
    visible = _visible(x, mask, row_shape, causal)
    if visible is not None:
        z = torch.where(visible, z, float("-inf"))
    nothing = torch.isneginf(z).all(-1, keepdim=True)
    out = torch.log_softmax(z, -1) if log else torch.softmax(z, -1)
    return torch.where(nothing, float("-inf") if log else 0.0, out).to(x.dtype)


def backward(
    dout: Tensor,
    out: Tensor,
    scale: float,
    log: bool,
    mask: Tensor | None = None,
    row_shape: tuple[int, int, int] | None = None,
    causal: bool = False,
) -> Tensor:
    """dout, out (*, cols) -> dx (*, cols); bias's gradient is dx / scale. mask, row_shape and causal as in forward."""
    acc = acc_dtype(out.dtype)
    dy, y = dout.to(acc), out.to(acc)
    if log:
        dx = dy - y.exp() * dy.sum(-1, keepdim=True)
        dx = torch.where(torch.isneginf(y).all(-1, keepdim=True), 0.0, dx)
        visible = _visible(out, mask, row_shape, causal)
        if visible is not None:
            dx = torch.where(visible, dx, 0.0)
    else:
        dx = y * (dy - (dy * y).sum(-1, keepdim=True))
    return (dx * scale).to(out.dtype)


def _visible(x: Tensor, mask: Tensor | None, row_shape: tuple[int, int, int] | None, causal: bool) -> Tensor | None:
    """Which elements of x take part, in x's shape; None = all."""
    if mask is None and not causal:
        return None
    assert row_shape is not None
    cols, queries = x.shape[-1], row_shape[2]
    visible = torch.ones((*row_shape, cols), dtype=torch.bool, device=x.device) if mask is None else mask
    if causal:
        visible = visible & torch.ones(queries, cols, dtype=torch.bool, device=x.device).tril(cols - queries)
    return visible.reshape(x.shape)
