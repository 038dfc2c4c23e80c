"""Losses as ``transformers`` defines them: what is shifted, what is not counted, what a mean is over."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional


def causal_lm_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Mean cross-entropy of the token after each position: logits ``(B, S, V)``, labels ``(B, S)`` -> scalar."""
    # The labels are shifted, not the logits: those are large, and a slice of them is not contiguous.
    return token_loss(logits, F.pad(labels[:, 1:], (0, 1), value=-100), num_items)


def token_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Mean cross-entropy at each position.

    Args:
        logits: ``(*, C)``.
        labels: ``(*)`` int64; -100 is not counted.
        num_items: divides the sum, instead of the number of labels counted.

    Returns:
        A scalar in float32, float64 for float64 logits.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels: shape {tuple(labels.shape)} is not {tuple(logits.shape[:-1])}")
    rows, target = in_float32(logits).reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if num_items is None:
        return functional.cross_entropy(rows, target)
    return functional.cross_entropy(rows, target, reduction="sum") / num_items


def in_float32(logits: Tensor) -> Tensor:
    # A mean in half precision would round the loss, and scale every gradient by the error.
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
