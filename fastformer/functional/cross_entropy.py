"""Cross-entropy between logits and class indices (or class probabilities).

Per row, with lse = logsumexp(z):  loss = lse - z[target], plus class weights and label smoothing (formula in
csrc/include/fastformer.h). The kernel reads the logits once forward and once backward and stores one number per row:
the (rows, classes) table of log-probabilities that PyTorch keeps is never made.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..backends import registry
from . import _checks
from ._doors import needs_grad, once_differentiable, operator, register, register_autograd, through_operator
from .softmax import log_softmax

_REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Same arguments and result as ``torch.nn.functional.cross_entropy``.

    Args:
        input: logits ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``; float32, bfloat16, float16 or (CPU) float64.
        target: int64 class indices, input's shape without C, or probabilities of input's shape and dtype.
        weight: ``(C)`` weight of each class, or None.
        size_average, reduce: deprecated by torch, honoured.
        ignore_index: indices equal to it contribute neither loss nor gradient.
        reduction: "mean" (over the weights of the targets that count), "sum" or "none".
        label_smoothing: in [0, 1], mass moved from the target to all classes alike.

    Returns:
        A scalar, or with reduction "none" the shape of the indices, in input's dtype. "mean" over no counted target is
        NaN, as in torch.

    Raises:
        TypeError, ValueError: arguments that do not fit, naming the argument.
        IndexError: an index outside [0, C) that is not ``ignore_index`` (on a GPU: NaN instead, to avoid waiting).
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    _check(input, target, weight, reduction, label_smoothing)
    class_dim = 0 if input.dim() == 1 else 1
    if target.is_floating_point():
        return _probabilities(input, target, weight, reduction, label_smoothing, class_dim)

    classes = input.shape[class_dim]
    logits = input if input.dim() <= 2 else input.movedim(1, -1)
    logits = _checks.as_rows(logits, classes)
    flat = target.reshape(-1)
    class_weight = None if weight is None else weight.detach().to(_acc_dtype(input.dtype)).contiguous()
    smoothing = float(label_smoothing)
    if through_operator(logits, flat, class_weight):
        loss = operator("cross_entropy", logits, flat, class_weight, ignore_index, smoothing)[0]
        loss, _ = _reduced(loss, flat, class_weight, ignore_index, reduction)
    elif needs_grad(logits):
        kernels = _select(logits, class_weight, smoothing)
        loss = _CrossEntropy.apply(logits, flat, class_weight, ignore_index, smoothing, reduction, kernels)
    else:
        loss = _forward(logits, flat, class_weight, ignore_index, smoothing)[0]
        loss, _ = _reduced(loss, flat, class_weight, ignore_index, reduction)
    return (loss.view(target.shape) if reduction == "none" else loss).to(input.dtype)


def _reduced(
    loss: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor | None]:
    """The loss of each row as ``reduction`` wants it, and what it was divided by."""
    if reduction == "none":
        return loss, None
    if reduction == "sum":
        return loss.sum(), None
    counted = target != ignore_index
    total = counted.sum() if weight is None else (weight[target.where(counted, 0)] * counted).sum()
    return loss.sum() / total, total


def _check(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float) -> None:
    _checks.tensor("input", input)
    _checks.choice("reduction", reduction, _REDUCTIONS)
    _checks.probability("label_smoothing", label_smoothing)
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a torch.Tensor, got {type(target).__name__}")
    if input.dim() == 0:
        raise ValueError("input: expected (C), (N, C) or (N, C, d1, ...), got a scalar")
    _checks.same_device("target", target, "input", input)
    shape = tuple(input.shape)
    if target.is_floating_point():
        if tuple(target.shape) != shape:
            raise ValueError(f"target: probabilities of shape {tuple(target.shape)} are not input's {shape}")
    else:
        if target.dtype != torch.int64:
            raise TypeError(f"target: dtype {target.dtype} is not int64 (indices) or floating point (probabilities)")
        expected = shape[1:] if len(shape) == 1 else (shape[0], *shape[2:])
        if tuple(target.shape) != expected:
            raise ValueError(f"target: indices of shape {tuple(target.shape)} are not {expected}")
    classes = shape[0] if len(shape) == 1 else shape[1]
    if weight is not None:
        _checks.tensor("weight", weight)
        _checks.same_device("weight", weight, "input", input)
        if tuple(weight.shape) != (classes,):
            raise ValueError(f"weight: shape {tuple(weight.shape)} is not ({classes},)")


def _probabilities(input, target, weight, reduction, label_smoothing, class_dim):
    # Soft targets need every class of every row anyway; the gradient through log_softmax is already one fused pass.
    # Half precision is widened first: rounding every log-probability would cost the loss and target's gradient digits.
    classes, acc = input.shape[class_dim], _acc_dtype(input.dtype)
    target = target.to(acc)
    if label_smoothing > 0:
        target = target * (1 - label_smoothing) + label_smoothing / classes
    log_probability = log_softmax(input, class_dim, dtype=acc)
    if weight is not None:
        target = target * (weight.to(acc) if class_dim == 0 else weight.to(acc).view(-1, *[1] * (input.dim() - 2)))
    loss = -(log_probability * target).sum(class_dim)
    if reduction != "none":
        loss = loss.sum() / (input.numel() / classes if reduction == "mean" else 1)
    return loss.to(input.dtype)


def _acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _select(logits: Tensor, weight: Tensor | None, label_smoothing: float) -> ModuleType:
    features: tuple[str, ...] = () if weight is None else ("weight",)
    if label_smoothing > 0:
        features += ("label_smoothing",)
    return registry.select("cross_entropy", logits.device.type, logits.dtype, features)


def _forward(logits, target, weight, ignore_index, label_smoothing):
    kernels = _select(logits, weight, label_smoothing)
    return kernels.forward(_checks.as_rows(logits, logits.shape[-1]), target, weight, ignore_index, label_smoothing)


def _backward(dloss, logits, target, weight, lse, ignore_index, label_smoothing):
    kernels = _select(logits, weight, label_smoothing)
    rows = _checks.as_rows(logits, logits.shape[-1])
    return kernels.backward(dloss, rows, target, weight, lse, ignore_index, label_smoothing)


class _CrossEntropy(torch.autograd.Function):
    # Reduced in here, where autograd records nothing: for small batches its nodes took longer than the kernels.
    @staticmethod
    def forward(ctx, logits, target, weight, ignore_index, label_smoothing, reduction, kernels):
        logits = _checks.as_rows(logits, logits.shape[-1])
        loss, lse = kernels.forward(logits, target, weight, ignore_index, label_smoothing)
        loss, total = _reduced(loss, target, weight, ignore_index, reduction)
        ctx.save_for_backward(logits, target, weight, lse, total)
        ctx.options, ctx.kernels = (ignore_index, label_smoothing), kernels
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, target, weight, lse, total = ctx.saved_tensors
        if total is not None:
            dloss = dloss / total
        dlogits = ctx.kernels.backward(dloss.expand(len(logits)), logits, target, weight, lse, *ctx.options)
        return dlogits, None, None, None, None, None, None


# ---- the registered operator -----------------------------------------------------------------------------------------


def _fake(logits, target, weight, ignore_index, label_smoothing):
    loss = logits.new_empty(target.shape, dtype=_acc_dtype(logits.dtype))
    return loss, torch.empty_like(loss)


register(
    "cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing)"
    " -> (Tensor, Tensor)",
    _forward,
    _fake,
)
register(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor? weight, Tensor lse, int ignore_index,"
    " float label_smoothing) -> Tensor",
    _backward,
    lambda dloss, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
)


def _setup_context(ctx, inputs, output):
    logits, target, weight, ctx.ignore_index, ctx.label_smoothing = inputs
    ctx.save_for_backward(logits, target, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, dloss, _dlse):
    logits, target, weight, lse = ctx.saved_tensors
    dlogits = operator(
        "cross_entropy_backward", dloss, logits, target, weight, lse, ctx.ignore_index, ctx.label_smoothing
    )
    return dlogits, None, None, None, None


register_autograd("cross_entropy", _autograd, _setup_context)
