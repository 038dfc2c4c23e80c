"""Losses as ``transformers`` defines them: what is shifted, what is not counted, what a mean is over."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional, nn
from ..nn.submodules import is_plain


def causal_lm_loss(
    logits: Tensor, labels: Tensor | None, shift_labels: Tensor | None = None, num_items: Tensor | int | None = None
) -> Tensor | None:
    """Mean cross-entropy of the token after each position: logits ``(B, S, V)``, labels ``(B, S)`` -> scalar.

    ``shift_labels (B, S)``, already shifted, go before labels; without either there is no loss.
    """
    targets = next_tokens(labels, shift_labels)
    return None if targets is None else token_loss(logits, targets, num_items)


def next_tokens(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
    """The target at each position, ``(B, S)``: ``shift_labels``, or ``labels`` shifted, or None without either."""
    if shift_labels is None and labels is not None:
        # The labels are shifted, not the logits: those are large, and a slice of them is not contiguous.
        return F.pad(labels[:, 1:], (0, 1), value=-100)
    return shift_labels


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


def head_loss(
    hidden: Tensor, head: torch.nn.Module, labels: Tensor | None, num_items: Tensor | int | None = None
) -> Tensor | None:
    """:func:`token_loss` of ``head(hidden)``, without the logits where ``head`` is a linear layer and nothing else.

    A ``head`` with a method ``loss(rows, target, num_items)`` is asked for it.

    Args:
        hidden: ``(*, E)``.
        head: from E to C.
        labels: ``(*)`` int64; -100 is not counted. Without them there is no loss.
    """
    if labels is None:
        return None
    rows, target = scored_rows(hidden, labels)
    own_loss = getattr(head, "loss", None)
    if own_loss is not None:
        return own_loss(rows, target, num_items)
    if not is_plain(head, torch.nn.Linear, nn.Linear):
        return token_loss(head(rows), target, num_items)
    half = rows.dtype in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled(rows.device.type)
    # Under autocast the loss is float32 whatever the hidden states are.
    with torch.autocast(rows.device.type, dtype=rows.dtype) if half else nullcontext():
        arguments = (rows, head.weight, target)
        if num_items is None:
            return functional.linear_cross_entropy(*arguments, linear_bias=head.bias)
        return functional.linear_cross_entropy(*arguments, linear_bias=head.bias, reduction="sum") / num_items


def scored_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """hidden ``(*, E)`` and labels ``(*)`` as rows; on a CPU those of them whose label counts.

    A GPU would have to say how many these are before the next kernel could start.
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: shape {tuple(labels.shape)} is not {tuple(hidden.shape[:-1])}")
    rows, target = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if rows.device.type == "cpu" and (scored := target != -100).sum() < target.numel():
        return rows[scored], target[scored]
    return rows, target


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


def span_loss(start_logits: Tensor, end_logits: Tensor, start_positions: Tensor, end_positions: Tensor) -> Tensor:
    """Mean of the cross-entropies of where an answer begins and where it ends.

    Args:
        start_logits, end_logits: ``(B, S)``.
        start_positions, end_positions: ``(B)`` or ``(B, 1)`` int64; S or more is not counted, below 0 is taken as 0.

    Returns:
        A scalar in float32, float64 for float64 logits.
    """
    batch, length = start_logits.shape
    targets = [_shaped(p, (batch,), (batch, 1)).clamp(0, length) for p in (start_positions, end_positions)]
    start, end = (p.masked_fill(p == length, -100) for p in targets)
    return (token_loss(start_logits, start) + token_loss(end_logits, end)) / 2


def _shaped(labels: Tensor, wanted: tuple[int, ...], *others: tuple[int, ...]) -> Tensor:
    if labels.shape not in (wanted, *others):
        raise ValueError(f"labels: shape {tuple(labels.shape)} is not {wanted}")
    return labels.reshape(wanted)


def in_float32(logits: Tensor) -> Tensor:
    # A mean in half precision would round the loss, and scale every gradient by the error.
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
