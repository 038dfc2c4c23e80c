"""Losses as ``transformers`` defines them: what is shifted, what is not counted, what a mean is over."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional


def causal_lm_loss(
    logits: Tensor, labels: Tensor | None, shift_labels: Tensor | None = None, num_items: Tensor | int | None = None
) -> Tensor | None:
    """Mean cross-entropy of the token after each position: logits ``(B, S, V)``, labels ``(B, S)`` -> scalar.

    ``shift_labels (B, S)``, already shifted, go before labels; without either there is no loss.
    """
    if shift_labels is None and labels is not None:
        # The labels are shifted, not the logits: those are large, and a slice of them is not contiguous.
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    return None if shift_labels is None else token_loss(logits, shift_labels, num_items)


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


PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def sequence_loss(logits: Tensor, labels: Tensor, problem_type: str | None = None) -> Tensor:
    """The loss of one prediction per text.

    Args:
        logits: ``(B, C)``.
        labels: ``(B, C)`` numbers for a regression (``(B)`` too if C is 1: mean squared error) or for several labels at
            once (0 or 1: binary cross-entropy); ``(B)`` int64 for one label of C (cross-entropy, -100 is not counted).
        problem_type: which of the three. None takes a regression for C = 1, else one label for integers, else several.

    Returns:
        A scalar in float32, float64 for float64 logits.
    """
    batch, count = logits.shape
    if problem_type is None:
        integers = labels.dtype in (torch.int64, torch.int32)
        problem_type = PROBLEM_TYPES[0 if count == 1 else 1 if integers else 2]
    if problem_type == "single_label_classification":
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"labels: expected int64 for {problem_type}, got {labels.dtype}")
        return token_loss(logits, _shaped(labels, (batch,), (batch, 1)).long())
    scores = in_float32(logits)
    shapes = ((batch, count), (batch,)) if count == 1 else ((batch, count),)
    target = _shaped(labels, *shapes).to(scores.dtype)
    if problem_type == "regression":
        return F.mse_loss(scores, target)
    return F.binary_cross_entropy_with_logits(scores, target)


def _shaped(labels: Tensor, wanted: tuple[int, ...], *others: tuple[int, ...]) -> Tensor:
    if labels.shape not in (wanted, *others):
        raise ValueError(f"labels: shape {tuple(labels.shape)} is not {wanted}")
    return labels.reshape(wanted)


def in_float32(logits: Tensor) -> Tensor:
    # A mean in half precision would round the loss, and scale every gradient by the error.
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
