"""Cross-entropy between logits and class indices or class probabilities.

Per row, with lse = logsumexp(z):  loss = lse - z[target], plus class weights, label smoothing and a z-loss (formula in
csrc/include/fastformer.h). The (rows, classes) table of log-probabilities that PyTorch keeps is never made. For the
mean and the sum the forward pass writes the gradient while a row is in the cache, so that backward only scales it, and
the logits are neither kept nor read again; backends say for which rows that is faster. Otherwise one number per row is
kept and backward reads the logits again.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph as keeps_graph
from torch.nn import functional as TF

from ..backends import registry
from ..backends.cpu import cross_entropy as _cpu
from . import _checks
from ._doors import needs_grad, once_differentiable, operator, register, register_autograd, through_operator
from ._small import eager_cpu, torch_instead

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
    *,
    z_loss: float = 0.0,
) -> Tensor:
    """Same arguments and result as ``torch.nn.functional.cross_entropy``, and ``z_loss``.

    Args:
        input: logits ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``; float32, bfloat16, float16 or (CPU) float64.
        target: int64 class indices, input's shape without C, or probabilities of input's shape, which get a gradient.
        weight: ``(C)`` weight of each class, or None.
        size_average, reduce: deprecated by torch, honoured.
        ignore_index: indices equal to it contribute neither loss nor gradient.
        reduction: "mean" (over the weights of the targets that count), "sum" or "none".
        label_smoothing: in [0, 1], mass moved from the target to all classes alike.
        z_loss: ``z_loss * logsumexp(logits)^2`` is added to the loss of each row that counts, before the reduction
            (Chowdhery et al. 2022, arXiv:2204.02311, section 5).

    Returns:
        A scalar, or with reduction "none" the shape of the indices, in input's dtype (of two floating dtypes the one
        that holds both). "mean" over no counted target is NaN, as in torch.

    Raises:
        TypeError, ValueError: arguments that do not fit, naming the argument.
        IndexError: an index outside [0, C) that is not ``ignore_index`` (on a GPU: NaN instead, to avoid waiting).
    """
    legacy = size_average is not None or reduce is not None
    if weight is None and not (legacy or z_loss) and reduction in ("mean", "sum") and eager_cpu(input):
        found = None
        if not needs_grad(input, target):
            found = _cpu.plain(input, target, ignore_index, label_smoothing, reduction == "mean")
        elif input.dtype == torch.float32:  # of half precision torch rounds every logarithm
            arguments = target, None, None, ignore_index, None, reduction, label_smoothing
            found = torch_instead("cross_entropy", input, TF.cross_entropy, *arguments)
        if found is not None:
            return found
    if legacy:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    _check(input, target, weight, reduction, label_smoothing, z_loss)
    shape = target.shape
    indices: Tensor | None = target
    probabilities: Tensor | None = None
    if target.is_floating_point():
        if target.dtype != input.dtype:
            dtype = torch.promote_types(target.dtype, input.dtype)
            input, target = input.to(dtype), target.to(dtype)
        shape = input.shape[:0] if input.dim() == 1 else input.shape[:1] + input.shape[2:]
        indices, probabilities = None, _rows(target)
    logits = _rows(input)
    if indices is not None and indices.dim() != 1:
        indices = indices.reshape(-1)
    if weight is not None:
        weight = weight.detach().to(_acc_dtype(input.dtype)).contiguous()
    options = weight, ignore_index, float(label_smoothing), float(z_loss)
    if through_operator(logits, indices, probabilities, weight):
        loss = operator("cross_entropy", logits, indices, probabilities, *options)[0]
        loss = _reduced(loss, indices, weight, ignore_index, reduction)[0].to(input.dtype)
        return loss.view(shape) if reduction == "none" else loss

    kernels = _select(logits, probabilities, *options)
    if needs_grad(logits, probabilities):
        write = reduction != "none" and not (probabilities is not None and probabilities.requires_grad)
        if write and _writes_gradient(kernels, logits):
            return _GradientInForward.apply(logits, indices, probabilities, options, reduction, kernels)
        loss = _CrossEntropy.apply(logits, indices, probabilities, options, reduction, kernels)
    elif reduction == "none":
        loss = _forward(kernels, logits, indices, probabilities, *options)[0].to(input.dtype)
    else:
        return _loss_and_gradient(kernels, logits, indices, probabilities, options, reduction, False)[0]
    return loss.view(shape) if reduction == "none" else loss


def _rows(x: Tensor) -> Tensor:
    """``(C)``, ``(N, C)`` or ``(N, C, d1, ...)`` -> rows of C."""
    dims = x.dim()
    if dims == 2 and x.stride(1) == 1:
        return x
    return _checks.as_rows(x if dims <= 2 else x.movedim(1, -1), x.shape[0 if dims == 1 else 1])


def _reduced(
    loss: Tensor, target: Tensor | None, weight: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor | None]:
    """The loss of each row as ``reduction`` wants it, and what it was divided by."""
    if reduction == "none":
        return loss, None
    if reduction == "sum":
        return loss.sum(), None
    total = _total(loss, target, weight, ignore_index, len(loss))
    return loss.sum() / total, total


def _total(like: Tensor, target: Tensor | None, weight: Tensor | None, ignore_index: int, rows: int) -> Tensor:
    """What the mean divides by."""
    if target is None:
        return like.new_full((), rows)
    counted = target != ignore_index
    return counted.sum() if weight is None else (weight[target.where(counted, 0)] * counted).sum()


def _check(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float, z_loss: float
) -> None:
    _checks.tensor("input", input)
    _checks.choice("reduction", reduction, _REDUCTIONS)
    _checks.probability("label_smoothing", label_smoothing)
    if not z_loss >= 0:
        raise ValueError(f"z_loss: {z_loss} is negative")
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


def _acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _select(
    logits: Tensor, probabilities: Tensor | None, weight: Tensor | None, _: int, label_smoothing: float, z_loss: float
) -> ModuleType:
    features: tuple[str, ...] = () if weight is None else ("weight",)
    if label_smoothing > 0:
        features += ("label_smoothing",)
    if z_loss != 0:
        features += ("z_loss",)
    if probabilities is not None:
        features += ("probabilities",)
    return registry.select("cross_entropy", logits.device.type, logits.dtype, features)


def _forward(kernels, logits, target, probabilities, weight, ignore_index, label_smoothing, z_loss):
    extras = {} if z_loss == 0 and probabilities is None else {"z_loss": z_loss, "probabilities": probabilities}
    return kernels.forward(logits, target, weight, ignore_index, label_smoothing, **extras)


def _backward(kernels, dloss, logits, target, probabilities, lse, options, need_dprobabilities):
    """dlogits and dprobabilities (or None) from dloss, (rows) or one number for all, in any dtype."""
    weight, ignore_index, label_smoothing, z_loss = options
    dloss = dloss.to(_acc_dtype(logits.dtype)).expand(len(logits))
    if probabilities is None:
        extras = {} if z_loss == 0 else {"z_loss": z_loss}
        return kernels.backward(dloss, logits, target, weight, lse, ignore_index, label_smoothing, **extras), None
    return kernels.backward_probabilities(
        dloss, logits, probabilities, weight, label_smoothing, z_loss, need_dprobabilities
    )


def _writes_gradient(kernels: ModuleType, logits: Tensor) -> bool:
    decide = getattr(kernels, "gradient_in_forward", None)
    return decide is not None and decide(logits.shape[1], logits.dtype)


def _loss_and_gradient(kernels, logits, target, probabilities, options, reduction, gradient):
    """The reduced loss in the dtype of logits, and its gradient (or None). Where torch's small operations would take
    longer than the kernel, a backend has ``reduced``, which is one call."""
    weight, ignore_index, label_smoothing, z_loss = options
    if hasattr(kernels, "reduced"):
        mean = reduction == "mean"
        return kernels.reduced(
            logits, target, weight, ignore_index, label_smoothing, z_loss, probabilities, mean, gradient
        )
    if not gradient:
        loss, _ = _forward(kernels, logits, target, probabilities, *options)
        return _reduced(loss, target, weight, ignore_index, reduction)[0].to(logits.dtype), None
    dloss = logits.new_ones((), dtype=_acc_dtype(logits.dtype))
    if reduction == "mean":
        dloss = dloss / _total(dloss, target, weight, ignore_index, len(logits))
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    loss, _ = kernels.forward(
        logits, target, weight, ignore_index, label_smoothing, z_loss=z_loss, probabilities=probabilities,
        dloss=dloss.expand(len(logits)), dlogits=dlogits,
    )  # fmt: skip
    return _reduced(loss, target, weight, ignore_index, reduction)[0].to(logits.dtype), dlogits


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, probabilities, options, reduction, kernels):
        loss, dlogits = _loss_and_gradient(kernels, logits, target, probabilities, options, reduction, True)
        ctx.save_for_backward(dlogits)
        ctx.scale = getattr(kernels, "scale", Tensor.mul_)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        (dlogits,) = ctx.saved_tensors
        if dloss.is_cpu and dloss.item() == 1:  # a GPU looks itself: asking it would be waiting for it
            pass
        elif keeps_graph():  # another backward pass may follow
            dlogits = dlogits * dloss
        else:
            ctx.scale(dlogits, dloss)
        return dlogits, None, None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    # Reduced in here, where autograd records nothing: for small batches its nodes took longer than the kernels.
    @staticmethod
    def forward(ctx, logits, target, probabilities, options, reduction, kernels):
        weight, ignore_index, _, _ = options
        loss, lse = _forward(kernels, logits, target, probabilities, *options)
        loss, total = _reduced(loss, target, weight, ignore_index, reduction)
        ctx.save_for_backward(logits, target, probabilities, lse, total)
        ctx.options, ctx.kernels = options, kernels
        return loss.to(logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, target, probabilities, lse, total = ctx.saved_tensors
        if total is not None:
            dloss = dloss.to(lse.dtype) / total
        need = ctx.needs_input_grad[2]
        dlogits, dq = _backward(ctx.kernels, dloss, logits, target, probabilities, lse, ctx.options, need)
        return dlogits, None, dq, None, None, None


# ---- the registered operator -----------------------------------------------------------------------------------------


def _operator(logits, target, probabilities, weight, ignore_index, label_smoothing, z_loss):
    options = weight, ignore_index, label_smoothing, z_loss
    logits, probabilities = _rows(logits), None if probabilities is None else _rows(probabilities)
    return _forward(_select(logits, probabilities, *options), logits, target, probabilities, *options)


def _operator_backward(dloss, logits, target, probabilities, weight, lse, ignore_index, label_smoothing, z_loss):
    options = weight, ignore_index, label_smoothing, z_loss
    logits, probabilities = _rows(logits), None if probabilities is None else _rows(probabilities)
    kernels = _select(logits, probabilities, *options)
    dlogits, dq = _backward(kernels, dloss, logits, target, probabilities, lse, options, probabilities is not None)
    return dlogits, logits.new_empty(0) if dq is None else dq


def _fake(logits, *_):
    loss = logits.new_empty(logits.shape[:1], dtype=_acc_dtype(logits.dtype))
    return loss, torch.empty_like(loss)


def _fake_backward(dloss, logits, target, probabilities, *_):
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return dlogits, logits.new_empty(0) if probabilities is None else torch.empty_like(dlogits)


register(
    "cross_entropy(Tensor logits, Tensor? target, Tensor? probabilities, Tensor? weight, int ignore_index,"
    " float label_smoothing, float z_loss) -> (Tensor, Tensor)",
    _operator,
    _fake,
)
register(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor? target, Tensor? probabilities, Tensor? weight,"
    " Tensor lse, int ignore_index, float label_smoothing, float z_loss) -> (Tensor, Tensor)",
    _operator_backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    logits, target, probabilities, weight, *ctx.options = inputs
    ctx.save_for_backward(logits, target, probabilities, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, dloss, _dlse):
    dlogits, dq = operator("cross_entropy_backward", dloss, *ctx.saved_tensors, *ctx.options)
    return dlogits, None, None if ctx.saved_tensors[2] is None else dq, None, None, None, None


register_autograd("cross_entropy", _autograd, _setup_context)
