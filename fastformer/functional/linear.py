"""A linear layer, input weight^T + bias, as ``torch.nn.functional.linear``.

Almost everywhere this *is* PyTorch's function: its matmul is the vendor library's. It differs on a CPU
(backends/matmul.py). A few rows of half precision, or of float32 and a large weight, are a kernel that reads the weight
once where no gradient is recorded. And without instructions for half precision PyTorch multiplies element by element;
there the product is float32's, of operands converted in pieces, rounded once at the end, and so are the products of
both gradients,

    dinput = dout weight,   dweight = dout^T input,   dbias = sum(dout)

each of which is a linear layer again, so derivatives of any order take this way. Under autocast a float32 weight takes
it where that is faster (_pays).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as TF

from ..backends import matmul, registry
from . import _checks
from ._doors import PLAIN, needs_grad, operator, register, register_autograd, through_operator, transforming
from ._small import eager_cpu


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias``, with the signature of ``torch.nn.functional.linear``.

    Args:
        input: ``(*, in_features)``.
        weight: ``(out_features, in_features)``, or ``(in_features)``; any strides.
        bias: ``(out_features)`` or ``()``, or None.

    Returns:
        ``(*, out_features)``, or ``(*)`` for a weight of one dimension, in input's dtype (autocast's under autocast).

    Raises:
        TypeError, ValueError: arguments that do not fit, naming the argument.
    """
    try:
        if (weight.dtype in matmul.HALF or _may_repay(input, weight)) and eager_cpu(input):
            if (out := _of_few_rows(input, weight, bias)) is not None:
                return out
        # Half precision, or what autocast makes of float32; anything else pays for the questions alone.
        if weight.dtype in matmul.HALF or (
            matmul.CONVERTED and torch.is_autocast_enabled("cpu") and _pays(input, weight)
        ):
            operands = _ours(input, weight, bias)
            if operands is not None:
                return _linear(*operands)
        return TF.linear(input, weight, bias)
    except (RuntimeError, TypeError, AttributeError):
        _check(input, weight, bias)
        raise


def _may_repay(input: Tensor, weight: Tensor) -> bool:
    """Whether float32 is worth the questions that come before the kernel: they take as long as a small product."""
    if weight.dtype != torch.float32 or weight.numel() < matmul.FEW_ROWS_FLOAT32_WEIGHT:
        return False
    if torch.compiler.is_compiling():  # no guards on sizes
        return False
    few = input.numel() <= matmul.FEW_ROWS[torch.float32] * weight.shape[-1]
    return few and not (weight.requires_grad and torch.is_grad_enabled())


def _of_few_rows(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The kernel's result where no gradient is recorded, with no more questions than that takes, or None."""
    if through_operator(weight, bias) or needs_grad(input, weight, bias) or not weight.is_cpu or input.dim() == 0:
        return None
    if torch.is_autocast_enabled("cpu") or (bias is not None and not bias.is_cpu):
        return None
    return matmul.of_few_rows(input, weight, bias)


def refusal(input: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why a call of these arguments, as autocast leaves them, is PyTorch's, or None."""
    if not torch.compiler.is_compiling() and registry.overridden() not in (None, "cpu"):
        return f"{registry.overridden()!r} is asked for"
    dtype = input.dtype
    for t in (input, weight) if bias is None else (input, weight, bias):
        if t.dtype not in matmul.FEW_ROWS or t.dtype != dtype or t.device.type != "cpu":
            return "PyTorch's matmul is the vendor library's"
        if not _ordinary(t) or t.layout != torch.strided or t.is_nested:
            return "a tensor of a kind of its own"
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        return "no matmul of these shapes"
    if bias is not None and bias.shape != weight.shape[:1]:
        return "a bias that broadcasts"
    if dtype in matmul.CONVERTED:
        return None
    if through_operator(input, weight, bias) or needs_grad(input, weight, bias):
        return "PyTorch's matmul is the vendor library's"
    if dtype == torch.float32 and weight.numel() < matmul.FEW_ROWS_FLOAT32_WEIGHT:
        return "a weight so small that PyTorch's matmul is done first"
    return None if matmul.few(input.shape[:-1].numel(), weight) else "more than a few rows"


def _ordinary(t: Tensor) -> bool:
    """Whether t is a plain tensor or stands for one while a graph is traced."""
    kind = type(t)
    return kind in PLAIN or (
        kind.__name__ in ("FakeTensor", "FunctionalTensor") and kind.__module__.startswith("torch._subclasses.")
    )


def _ours(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The arguments, as autocast casts them, unless the call is PyTorch's."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        input, weight = _autocast(input, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    return (input, weight, bias) if refusal(input, weight, bias) is None else None


# PyTorch keeps what autocast made of a weight for as long as autocast lasts; here it is made in every call.
CAST_ROWS, CAST_PRODUCTS = 4, 1 << 19


def _pays(input: Tensor, weight: Tensor) -> bool:
    """Whether autocast's cast of a weight and the product through float32 take less time than PyTorch's product."""
    if torch.compiler.is_compiling():  # no guards on sizes
        return True
    rows = input.shape[:-1].numel()
    return rows >= CAST_ROWS and rows * weight.numel() >= CAST_PRODUCTS


def _autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.device.type == "cpu" and t.is_floating_point() and t.dtype != torch.float64 else t


def _linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    if transforming():
        # In operations that torch.func has rules for, batching rules among them.
        return TF.linear(x.float(), w.float(), None if b is None else b.float()).to(x.dtype)
    if through_operator(x, w, b):
        return operator("linear", x, w, b)
    return _Linear.apply(x, w, b) if needs_grad(x, w, b) else _forward(x, w, b)


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Names what is wrong, if it is a matter of these."""
    for name, t in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(t, Tensor) and not (name == "bias" and t is None):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if input.is_nested or type(weight) not in PLAIN:
        return
    if weight.dim() not in (1, 2):
        raise ValueError(f"weight: shape {tuple(weight.shape)} is not (out_features, in_features)")
    if input.dim() == 0 or input.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"input: shape {tuple(input.shape)} does not end in weight's {weight.shape[-1]} input features"
        )
    _checks.same_device("weight", weight, "input", input)
    casts = torch.is_autocast_enabled(input.device.type)
    if not casts:
        _checks.same_dtype("weight", weight, "input", input)
    if bias is not None:
        _checks.same_device("bias", bias, "input", input)
        if bias.dim() > 1 or (bias.dim() == 1 and bias.shape[0] not in (1, *weight.shape[:-1])):
            raise ValueError(f"bias: shape {tuple(bias.shape)} is not {tuple(weight.shape[:-1])}")
        if not casts:
            _checks.same_dtype("bias", bias, "input", input)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _forward(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    out = matmul.mm(_rows(x), w.t()) if b is None else matmul.addmm(b, _rows(x), w.t())
    return out.view(*x.shape[:-1], w.shape[0])


def _setup_context(ctx, inputs, output):
    x, w, _ = inputs
    need_x, need_w = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_w else None, w if need_x else None)
    ctx.in_rows = w.is_contiguous()


def _backward(ctx, dout):
    x, w = ctx.saved_tensors
    need_x, need_w, need_b = ctx.needs_input_grad[:3]
    dx = _linear(dout, w.t(), None) if need_x else None
    dw = None
    if need_w:  # in the orientation the weight has in memory, as in matmul.weight_grad
        dy, rows = _rows(dout), _rows(x)
        dw = _linear(dy.t(), rows.t(), None) if ctx.in_rows else _linear(rows.t(), dy.t(), None).t()
    return dx, dw, _rows(dout).sum(0) if need_b else None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b):
        _setup_context(ctx, (x, w, b), None)
        return _forward(x, w, b)

    @staticmethod
    def backward(ctx, dout):
        return _backward(ctx, dout)


# ---- the registered operator -----------------------------------------------------------------------------------------


def _fake(x, w, b):
    return x.new_empty(*x.shape[:-1], w.shape[0])


register("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", _forward, _fake)
register_autograd("linear", _backward, _setup_context)
