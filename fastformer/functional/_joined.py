"""Several linear layers of one input as one matmul, x [W_1; W_2; ...]^T, where their weights lie next to each other in
memory. Nothing is copied: the stacked weight is a view over all of them, and so is each weight's gradient of the
stacked gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._doors import needs_grad, through_operator
from .linear import linear


def joined(*parts: Tensor | None) -> Tensor | None:
    """One tensor over all of them, stacked along the first dimension, where each follows the one before in memory."""
    first = parts[0]
    if first is None:
        return None
    storage, end, rows = first.untyped_storage().data_ptr(), first.storage_offset(), 0
    for part in parts:
        if (
            part is None
            or part.storage_offset() != end
            or part.dtype != first.dtype
            or part.shape[1:] != first.shape[1:]
            or not part.is_contiguous()
            or part.untyped_storage().data_ptr() != storage
        ):
            return None
        end += part.numel()
        rows += part.shape[0]
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def joined_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    """``x @ cat(weights).T + cat(biases)``, or None where the memory or the kind of call does not allow one matmul.

    Args:
        x: ``(*, in_features)``.
        weights, biases: ``(out_features, in_features)`` and ``(out_features)`` of each layer; all biases or none.
    """
    if through_operator(x, *weights, *biases):
        return None
    weight = joined(*weights)
    if weight is None:
        return None
    if needs_grad(*weights):
        weight = _Joined.apply(weight, *weights)
    if all(b is None for b in biases):
        return linear(x, weight)
    bias = joined(*biases)
    if bias is None:
        return None
    return linear(x, weight, _Joined.apply(bias, *biases) if needs_grad(*biases) else bias)


class _Joined(torch.autograd.Function):
    """The tensor over its parts, with a part of the gradient for each."""

    @staticmethod
    def forward(ctx, whole, *parts):
        ctx.save_for_backward(*parts)  # to notice if one of them is changed in place before backward
        ctx.rows = [part.shape[0] for part in parts]
        return (
            whole.data
        )  # as a view of the first part it would raise for any in-place change of that, in obscure words

    @staticmethod
    def backward(ctx, dwhole):
        assert len(ctx.saved_tensors) == len(ctx.rows)
        return None, *dwhole.split(ctx.rows)
