"""Cross-entropy of class indices by csrc/cpu/cross_entropy.cpp; see backends/reference/cross_entropy.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ._call import DTYPES, acc_dtype, empty_like

FEATURES = frozenset({"weight", "label_smoothing"})
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """logits (rows, cols), target (rows) int64, weight (cols) acc or None -> loss (rows) acc, lse (rows) acc.

    Raises IndexError for a target outside [0, cols) that is not ``ignore_index``.
    """
    loss = torch.empty(len(logits), dtype=acc_dtype(logits.dtype))
    lse = torch.empty_like(loss)
    try:
        _C.cross_entropy_forward(logits, target.contiguous(), weight, loss, lse, ignore_index, label_smoothing)
    except ValueError as error:
        raise (IndexError(str(error)) if str(error).startswith("target") else error) from None
    return loss, lse


def backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """dloss (rows) acc (an expanded scalar is fine) -> dlogits (rows, cols) in the dtype of logits."""
    dlogits = empty_like(logits)
    _C.cross_entropy_backward(dloss, logits, target.contiguous(), weight, lse, dlogits, ignore_index, label_smoothing)
    return dlogits
