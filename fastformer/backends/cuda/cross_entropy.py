"""Cross-entropy by csrc/cuda/cross_entropy.cu; signatures as in backends/reference/cross_entropy.py.

A target outside [0, cols) that is not ``ignore_index`` makes its loss and its row of the gradient NaN: finding it
earlier would mean waiting for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._call import DTYPES, empty, empty_like, library, on_device, stream

FEATURES = frozenset({"weight", "label_smoothing", "z_loss", "probabilities"})
__all__ = ["DTYPES", "FEATURES", "backward", "backward_probabilities", "forward", "gradient_in_forward", "scale"]


def scale(gradient: Tensor, factor: Tensor) -> None:
    """gradient (rows, cols) contiguous *= factor, one number, without a trip over memory where that is 1: only the
    device knows, and asking it would be waiting for it."""
    factor = factor.to(gradient.dtype)
    with on_device(gradient):
        library().cross_entropy_scale(gradient, factor, stream(gradient))


def gradient_in_forward(cols: int, dtype: torch.dtype) -> bool:
    """Whether writing the gradient of rows of ``cols`` logits in the forward pass is the faster way.

    It saves reading the logits again. Never for float16: what trains in it scales the loss, because small gradients
    underflow, and here the scale would come too late.
    """
    return dtype != torch.float16


def forward(
    logits: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float = 0.0,
    probabilities: Tensor | None = None,
    dloss: Tensor | None = None,
    dlogits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """logits (rows, cols), target (rows) int64 or probabilities (rows, cols), weight (cols) float32 or None
    -> loss (rows), lse (rows) float32; with dlogits (rows, cols) and dloss (rows) the gradient as well."""
    loss, lse = (empty(logits, len(logits), dtype=torch.float32) for _ in range(2))
    target = target if target is None else target.contiguous()
    with on_device(logits):
        library().cross_entropy_forward(
            logits, target, weight, loss, lse, ignore_index, label_smoothing, z_loss, probabilities, dloss, dlogits,
            stream(logits),
        )  # fmt: skip
    return loss, lse


def backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float = 0.0,
) -> Tensor:
    """dloss (rows) float32 (an expanded scalar is fine) -> dlogits (rows, cols) in the dtype of logits."""
    dlogits = empty_like(logits)
    with on_device(logits):
        library().cross_entropy_backward(
            dloss, logits, target.contiguous(), weight, lse, dlogits, ignore_index, label_smoothing, z_loss, None,
            None, stream(logits),
        )  # fmt: skip
    return dlogits


def backward_probabilities(
    dloss: Tensor,
    logits: Tensor,
    probabilities: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    z_loss: float = 0.0,
    need_dprobabilities: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """dloss (rows) float32 -> dlogits, and dprobabilities (or None), both (rows, cols) in the dtype of logits."""
    dlogits = empty_like(logits)
    dprobabilities = empty_like(logits) if need_dprobabilities else None
    with on_device(logits):
        library().cross_entropy_backward(
            dloss, logits, None, weight, None, dlogits, 0, label_smoothing, z_loss, probabilities, dprobabilities,
            stream(logits),
        )  # fmt: skip
    return dlogits, dprobabilities
