"""Cross-entropy of a linear layer's output: the last layer of a language model and its loss in one.

    loss = cross_entropy(input linear_weight^T + linear_bias, target)

The (rows, classes) logits exist a chunk of rows at a time (backends/chunks.py). Where the loss is one number, its
gradients are written in the forward pass, from the same chunk, and backward multiplies them by the gradient of the
loss, which usually is 1: three matmuls and no table of logits, log-probabilities or their gradient. The idea is Liger
Kernel's (Hsu et al. 2024, arXiv:2410.10989).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from ..backends import registry
from . import _checks
from ._doors import needs_grad, once_differentiable, operator, register, register_autograd, through_operator
from .cross_entropy import _REDUCTIONS, _acc_dtype, cross_entropy
from .linear import linear


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Same arguments and result as ``torch.nn.functional.linear_cross_entropy`` (torch 2.13), without the logits.

    Args:
        input: ``(*, in_features)``; float32, bfloat16, float16 or (CPU) float64.
        linear_weight: ``(C, in_features)``, or ``(C, d1, ..., in_features)`` beside an input of two dimensions, in
            input's dtype.
        target: int64 class indices ``(*)`` (or ``(N, d1, ...)``), or probabilities ``(*, C)`` (or ``(N, C, d1, ...)``).
        linear_bias: linear_weight's shape without in_features, or None.
        weight: ``(C)`` weight of each class, or None.
        reduction: "mean" (over the weights of the targets that count), "sum" or "none".
        ignore_index: indices equal to it contribute neither loss nor gradient; None is -100. Not with probabilities.
        label_smoothing: in [0, 1], mass moved from the target to all classes alike.
        options: torch's ``LinearCrossEntropyOptions``, accepted for the sake of its callers: the logits are taken in
            chunks with or without it, of a size chosen here, and the graph may be retained.
        z_loss: adds ``z_loss * logsumexp(logits)^2`` to the loss of each row that counts (Chowdhery et al. 2022,
            arXiv:2204.02311, section 5).

    Returns:
        A scalar, or with reduction "none" the shape of the indices, in input's dtype (float32 under autocast).
        Probabilities and the form with d1, ... are themselves as large as logits, and these are held then.

    Raises:
        TypeError, ValueError: arguments that do not fit, naming the argument.
        IndexError: an index outside [0, C) that is not ``ignore_index`` (on a GPU: NaN instead, to avoid waiting).
    """
    _check(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, z_loss)
    index = -100 if ignore_index is None else ignore_index
    out_dtype = input.dtype
    device = input.device.type
    if torch.is_autocast_enabled(device):
        out_dtype, dtype = _acc_dtype(input.dtype), torch.get_autocast_dtype(device)
        input, linear_weight = _autocast(input, dtype), _autocast(linear_weight, dtype)
        linear_bias = None if linear_bias is None else _autocast(linear_bias, dtype)
    if target.is_floating_point() or linear_weight.dim() > 2:
        logits, target = _logits(input, linear_weight, target, linear_bias)
        loss = cross_entropy(
            logits.to(out_dtype),
            target,
            weight,
            ignore_index=index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )
        return loss.view(input.shape[:-1]) if reduction == "none" and linear_weight.dim() == 2 else loss

    x = _checks.as_rows(input, input.shape[-1])
    flat = target.reshape(-1)
    class_weight = None if weight is None else weight.detach().to(_acc_dtype(x.dtype)).contiguous()
    numbers = (index, float(label_smoothing), float(z_loss))
    if through_operator(x, linear_weight, linear_bias, flat, class_weight):
        loss = _through_operators(x, linear_weight, linear_bias, flat, class_weight, numbers, reduction)
    else:
        kernels = _select(x, class_weight, *numbers[1:])
        if needs_grad(x, linear_weight, linear_bias):
            arguments = (x, linear_weight, linear_bias, flat, class_weight)
            loss = _LinearCrossEntropy.apply(*arguments, numbers, reduction, kernels)
        else:
            loss = kernels.forward(x, linear_weight, linear_bias, flat, class_weight, *numbers)
            loss = _reduced(loss, flat, class_weight, index, reduction)
    return (loss.view(target.shape) if reduction == "none" else loss).to(out_dtype)


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
) -> None:
    _checks.tensor("input", input)
    _checks.tensor("linear_weight", linear_weight)
    _checks.choice("reduction", reduction, _REDUCTIONS)
    _checks.probability("label_smoothing", label_smoothing)
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss: {z_loss} is not a number from 0 on")
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a torch.Tensor, got {type(target).__name__}")
    if input.dim() == 0:
        raise ValueError("input: expected (*, in_features), got a scalar")
    shape = tuple(linear_weight.shape)
    if len(shape) < 2 or shape[0] == 0:
        raise ValueError(f"linear_weight: shape {shape} is not (C, in_features) with a class or more")
    if shape[-1] != input.shape[-1]:
        raise ValueError(f"linear_weight: {shape[-1]} input features are not input's {input.shape[-1]}")
    if len(shape) > 2 and input.dim() != 2:
        raise ValueError(f"input: shape {tuple(input.shape)} is not (N, in_features), beside linear_weight of {shape}")
    if not torch.is_autocast_enabled(input.device.type):
        _checks.same_dtype("linear_weight", linear_weight, "input", input)
    for name, tensor, expected in (("linear_bias", linear_bias, shape[:-1]), ("weight", weight, shape[:1])):
        if tensor is not None:
            _checks.tensor(name, tensor)
            _checks.same_device(name, tensor, "input", input)
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)} is not {expected}")
    if linear_bias is not None and not torch.is_autocast_enabled(input.device.type):
        _checks.same_dtype("linear_bias", linear_bias, "input", input)
    _checks.same_device("linear_weight", linear_weight, "input", input)
    _checks.same_device("target", target, "input", input)
    if target.is_floating_point():
        expected = (*input.shape[:-1], shape[0], *shape[1:-1])
        if tuple(target.shape) != expected:
            raise ValueError(f"target: probabilities of shape {tuple(target.shape)} are not the logits' {expected}")
        if ignore_index is not None:
            raise ValueError(f"ignore_index: {ignore_index} beside a target of probabilities")
        return
    if target.dtype != torch.int64:
        raise TypeError(f"target: dtype {target.dtype} is not int64 (indices) or floating point (probabilities)")
    expected = (*input.shape[:-1], *shape[1:-1])
    if tuple(target.shape) != expected:
        raise ValueError(f"target: indices of shape {tuple(target.shape)} are not {expected}")


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # As autocast itself does for torch's linear; float64 stays.
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _logits(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """All logits, and the target, as cross_entropy takes them: with the classes in the second dimension."""
    classes, *positions, features = linear_weight.shape
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = linear(input, linear_weight.reshape(-1, features), bias)
    if positions:
        return logits.view(-1, classes, *positions), target
    return logits.view(-1, classes), target.view(-1, classes)


def _divisor(target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, dtype: torch.dtype) -> Tensor:
    """What the sum of the rows' losses is divided by: the weights of the targets that count, or 1."""
    if reduction == "sum":
        return torch.ones((), dtype=dtype, device=target.device)
    counted = target != ignore_index
    if weight is None:
        return counted.sum().to(dtype)
    # An index out of range is found (CPU) or made NaN (GPU) by the kernel; it must not be followed here.
    safe = target.where(counted, 0).clamp(0, len(weight) - 1)
    return (weight[safe] * counted).sum()


def _reduced(loss: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() / _divisor(target, weight, ignore_index, reduction, loss.dtype)


def _select(x: Tensor, weight: Tensor | None, label_smoothing: float, z_loss: float) -> ModuleType:
    features: tuple[str, ...] = () if weight is None else ("weight",)
    if label_smoothing > 0:
        features += ("label_smoothing",)
    if z_loss > 0:
        features += ("z_loss",)
    return registry.select("linear_cross_entropy", x.device.type, x.dtype, features)


def _in_forward(dtype: torch.dtype, reduction: str) -> bool:
    """Whether the gradients are written in the forward pass.

    float16 has too small a range for gradients without the loss scale, which only backward knows.
    """
    return reduction != "none" and dtype != torch.float16


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, target, weight, numbers, reduction, kernels):
        arguments = (x, w, bias, target, weight)
        divisor, ctx.gradients = None, None
        if reduction != "none":
            divisor = _divisor(target, weight, numbers[0], reduction, _acc_dtype(x.dtype))
        if _in_forward(x.dtype, reduction):
            dloss = divisor.reciprocal().expand(len(x))
            loss, ctx.gradients = kernels.backward(dloss, *arguments, *numbers, ctx.needs_input_grad[:3])
        else:
            loss = kernels.forward(*arguments, *numbers)
        ctx.save_for_backward(*arguments, divisor)
        ctx.numbers, ctx.kernels = numbers, kernels
        return loss if divisor is None else loss.sum() / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        *arguments, divisor = ctx.saved_tensors
        # Given away: a second pass over a retained graph computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None:
            gradients = ctx.kernels.scale(gradients, dloss)
        else:
            if divisor is not None:
                dloss = (dloss / divisor).expand(len(arguments[0]))
            _, gradients = ctx.kernels.backward(dloss, *arguments, *ctx.numbers, ctx.needs_input_grad[:3])
        return *gradients, None, None, None, None, None


# ---- the registered operators ----------------------------------------------------------------------------------------
# One row by row, with a backward pass of its own, and one of a reduced loss, which returns the gradients beside it.


def _through_operators(x, w, bias, target, weight, numbers, reduction):
    arguments = (x, w, bias, target, weight, *numbers)
    # Under torch.func nothing tells here which gradients will be wanted.
    if _in_forward(x.dtype, reduction) and needs_grad(x, w, bias) and peek_interpreter_stack() is None:
        divisor = _divisor(target, weight, numbers[0], reduction, _acc_dtype(x.dtype))
        needs = [t is not None and t.requires_grad for t in (x, w, bias)]
        return operator("linear_cross_entropy_reduced", divisor, *arguments, needs)[0]
    loss = operator("linear_cross_entropy", *arguments)
    return _reduced(loss, target, weight, numbers[0], reduction)


def _forward(x, w, bias, target, weight, *numbers):
    kernels = _select(x, weight, *numbers[1:])
    return kernels.forward(_checks.as_rows(x, x.shape[-1]), w, bias, target.contiguous(), weight, *numbers)


def _backward(dloss, x, w, bias, target, weight, *numbers_and_needs):
    kernels = _select(x, weight, *numbers_and_needs[1:3])
    rows = _checks.as_rows(x, x.shape[-1])
    _, gradients = kernels.backward(dloss, rows, w, bias, target.contiguous(), weight, *numbers_and_needs)
    return _as_tensors(x, gradients)


def _reduced_with_gradients(divisor, x, w, bias, target, weight, *numbers_and_needs):
    kernels = _select(x, weight, *numbers_and_needs[1:3])
    rows, dloss = _checks.as_rows(x, x.shape[-1]), divisor.reciprocal().expand(len(x))
    loss, gradients = kernels.backward(dloss, rows, w, bias, target.contiguous(), weight, *numbers_and_needs)
    return loss.sum() / divisor, *_as_tensors(x, gradients)


def _as_tensors(x: Tensor, gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


def _fake(x, w, bias, target, *_):
    return x.new_empty(target.shape, dtype=_acc_dtype(x.dtype))


def _fake_gradients(x, w, bias, needs):
    tensors = [t if needed else None for t, needed in zip((x, w, bias), needs, strict=True)]
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in tensors)


_INPUTS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, int ignore_index,"
    " float label_smoothing, float z_loss"
)
register(f"linear_cross_entropy({_INPUTS}) -> Tensor", _forward, _fake)
register(
    f"linear_cross_entropy_backward(Tensor dloss, {_INPUTS}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda dloss, x, w, bias, *rest: _fake_gradients(x, w, bias, rest[-1]),
)
register(
    f"linear_cross_entropy_reduced(Tensor divisor, {_INPUTS}, bool[3] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _reduced_with_gradients,
    lambda divisor, x, w, bias, *rest: (torch.empty_like(divisor), *_fake_gradients(x, w, bias, rest[-1])),
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers = inputs[5:]


def _autograd(ctx, dloss):
    needs = list(ctx.needs_input_grad[:3])
    gradients = operator("linear_cross_entropy_backward", dloss, *ctx.saved_tensors, *ctx.numbers, needs)
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), None, None, None, None, None


def _setup_reduced(ctx, inputs, output):
    ctx.needs = inputs[-1]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _autograd_reduced(ctx, dloss, *_):
    scaled = [(g * dloss).to(g.dtype) if n else None for g, n in zip(ctx.saved_tensors, ctx.needs, strict=True)]
    return None, *scaled, None, None, None, None, None, None


register_autograd("linear_cross_entropy", _autograd, _setup_context)
register_autograd("linear_cross_entropy_reduced", _autograd_reduced, _setup_reduced)
