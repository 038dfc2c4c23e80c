"""What layer_norm, rms_norm and their forms behind a residual addition share: checks, autograd, registered operators.

Their backends differ in the statistics of each row that forward returns last and backward takes: mean and rstd, or rstd
alone. Nothing here needs to know which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..backends import registry
from . import _checks
from ._doors import once_differentiable, operator, register, register_autograd


def row_shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """``normalized_shape`` as a tuple."""
    return tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else (int(normalized_shape),)


def check(
    name: str, input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    """The arguments of a norm of ``input``, which the caller knows as ``name``."""
    _checks.tensor(name, input)
    if not shape or input.shape[-len(shape) :] != shape:
        raise ValueError(f"normalized_shape: {shape} is not the end of {name}'s shape {tuple(input.shape)}")
    _checks.parameter("weight", weight, shape, name, input)
    _checks.parameter("bias", bias, shape, name, input)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(f"bias: dtype {bias.dtype} differs from weight's {weight.dtype}")
    if not eps >= 0:
        raise ValueError(f"eps: {eps} is negative")


def check_residual(x: Tensor, residual: Tensor, dropout_p: float) -> None:
    """The arguments of ``residual + dropout(x)``; x is checked already."""
    _checks.tensor("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual: shape {tuple(residual.shape)} is not x's {tuple(x.shape)}")
    _checks.same_dtype("residual", residual, "x", x)
    _checks.same_device("residual", residual, "x", x)
    _checks.probability("dropout_p", dropout_p)


def _flat(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or (parameter.dim() == 1 and parameter.is_contiguous()):
        return parameter
    return parameter.reshape(-1).contiguous()


def _param_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    return weight.dtype if weight is not None else bias.dtype if bias is not None else x.dtype


def _shaped(gradient: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    return gradient if gradient is None or len(shape) == 1 else gradient.view(shape)


def _fake_statistics(x: Tensor, shape: Sequence[int], count: int) -> list[Tensor]:
    rows = x.numel() // max(math.prod(shape), 1)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [x.new_empty((rows,), dtype=acc) for _ in range(count)]


# ---- norms -----------------------------------------------------------------------------------------------------------


def forward(kernels, x, shape, weight, bias, eps, statistics=True):
    """(out, *statistics) by a backend's module."""
    rows = _checks.rowwise(x, math.prod(shape))
    out, *saved = kernels.forward(rows, _flat(weight), _flat(bias), eps, statistics)
    return (out if rows is x else out.view(x.shape)), *saved


def _backward(kernels, dout, x, shape, weight, saved, needs, param_dtype):
    cols = math.prod(shape)
    rows = _checks.rowwise(x, cols)
    dx, dweight, dbias = kernels.backward(_checks.rowwise(dout, cols), rows, _flat(weight), *saved, *needs, param_dtype)
    if dx is not None and rows is not x:
        dx = dx.view(x.shape)
    return dx, _shaped(dweight, shape), _shaped(dbias, shape)


class Norm(torch.autograd.Function):
    """:func:`forward` with gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, shape, eps, kernels):
        out, *saved = forward(kernels, x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, *saved)
        ctx.shape, ctx.kernels = shape, kernels  # kept: an override is not seen by autograd's threads
        ctx.param_dtype = _param_dtype(x, weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients = _backward(ctx.kernels, dout, x, ctx.shape, weight, saved, needs, ctx.param_dtype)
        return *gradients, None, None, None


def register_norm(op: str, statistics: Sequence[str]) -> None:
    """Registers ``fastformer::<op>`` and its derivative; ``statistics`` names what it saves of each row."""
    count = len(statistics)

    def run(x, shape, weight, bias, eps):
        kernels = registry.select(op, x.device.type, x.dtype)
        return forward(kernels, x, tuple(shape), weight, bias, eps)

    def fake(x, shape, weight, bias, eps):
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        return out, *_fake_statistics(x, shape, count)

    def run_backward(dout, x, shape, weight, *saved_and_dtype):
        *saved, param_dtype = saved_and_dtype
        kernels = registry.select(op, x.device.type, x.dtype)
        return _backward(kernels, dout, x, tuple(shape), weight, saved, (True, True, True), param_dtype)

    def fake_backward(dout, x, shape, weight, *saved_and_dtype):
        parameter = x.new_empty(shape, dtype=saved_and_dtype[-1])
        return torch.empty_like(x, memory_format=torch.contiguous_format), parameter, torch.empty_like(parameter)

    results = ", ".join(["Tensor"] * (1 + count))
    saved_schema = ", ".join(f"Tensor {name}" for name in statistics)
    register(
        f"{op}(Tensor x, int[] shape, Tensor? weight, Tensor? bias, float eps) -> ({results})",
        run,
        fake,
    )
    register(
        f"{op}_backward(Tensor dout, Tensor x, int[] shape, Tensor? weight, {saved_schema}, ScalarType param_dtype)"
        " -> (Tensor, Tensor, Tensor)",
        run_backward,
        fake_backward,
    )

    def setup_context(ctx, inputs, output):
        x, ctx.shape, weight, bias, _ = inputs
        saved = output[1:]
        ctx.save_for_backward(x, weight, *saved)
        ctx.param_dtype = _param_dtype(x, weight, bias)
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(*saved)

    def derivative(ctx, dout, *_):
        x, weight, *saved = ctx.saved_tensors
        dx, dweight, dbias = operator(f"{op}_backward", dout, x, ctx.shape, weight, *saved, ctx.param_dtype)
        return dx, None, dweight if weight is not None else None, dbias if ctx.has_bias else None, None

    register_autograd(op, derivative, setup_context)


# ---- norms of residual + dropout(x) ----------------------------------------------------------------------------------


def select_add(op: str, x: Tensor, p: float) -> ModuleType:
    """The backend for ``op`` with dropout probability ``p``."""
    return registry.select(op, x.device.type, x.dtype, ("dropout",) if p > 0 else ())


def add_forward(kernels, x, residual, shape, weight, bias, eps, p, seed, statistics=True):
    """(out, summed, *statistics) by a backend's module."""
    cols = math.prod(shape)
    rows = _checks.rowwise(x, cols)
    # as x, so that the outputs have one shape
    residual_rows = _checks.rowwise(residual, cols) if rows is x else _checks.as_rows(residual, cols)
    out, summed, *saved = kernels.forward(rows, residual_rows, _flat(weight), _flat(bias), eps, p, seed, statistics)
    if rows is not x:
        out, summed = out.view(x.shape), summed.view(x.shape)
    return out, summed, *saved


def _add_backward(kernels, dout, dsummed, summed, shape, weight, saved, p, seed, needs, param_dtype):
    cols = math.prod(shape)
    rows = _checks.rowwise(summed, cols)
    dx, dresidual, dweight, dbias = kernels.backward(
        torch.zeros_like(rows) if dout is None else _checks.rowwise(dout, cols),
        None if dsummed is None else _checks.rowwise(dsummed, cols),
        rows,
        _flat(weight),
        *saved,
        p,
        seed,
        *needs,
        param_dtype,
    )
    if rows is not summed:
        dx, dresidual = dx.view(summed.shape), dresidual.view(summed.shape)
    return dx, dresidual, _shaped(dweight, shape), _shaped(dbias, shape)


class AddNorm(torch.autograd.Function):
    """:func:`add_forward` with gradients; an output that was not used adds no gradient and costs nothing."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, shape, eps, p, seed, kernels):
        out, summed, *saved = add_forward(kernels, x, residual, shape, weight, bias, eps, p, seed)
        ctx.save_for_backward(summed, weight, *saved)
        ctx.shape, ctx.p, ctx.seed, ctx.kernels = shape, p, seed, kernels
        ctx.param_dtype = _param_dtype(x, weight, bias)
        ctx.set_materialize_grads(False)
        return out, summed

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dsummed):
        summed, weight, *saved = ctx.saved_tensors
        needs, dtype = ctx.needs_input_grad[2:4], ctx.param_dtype
        gradients = _add_backward(
            ctx.kernels, dout, dsummed, summed, ctx.shape, weight, saved, ctx.p, ctx.seed, needs, dtype
        )
        return *gradients, None, None, None, None, None


def register_add_norm(op: str, statistics: Sequence[str]) -> None:
    """:func:`register_norm` for a norm of residual + dropout(x)."""
    count = len(statistics)

    def run(x, residual, shape, weight, bias, eps, p, seed):
        seed = 0 if seed is None else int(seed)
        return add_forward(select_add(op, x, p), x, residual, tuple(shape), weight, bias, eps, p, seed)

    def fake(x, residual, shape, weight, bias, eps, p, seed):
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        return out, torch.empty_like(out), *_fake_statistics(x, shape, count)

    # Without dropout x's gradient is the residual's: an operator may not return a tensor twice, so it returns none.
    def run_backward(dout, dsummed, summed, shape, weight, *rest):
        *saved, p, seed, param_dtype = rest
        kernels, seed = select_add(op, summed, p), 0 if seed is None else int(seed)
        needs = (True, True)
        dx, *gradients = _add_backward(
            kernels, dout, dsummed, summed, tuple(shape), weight, saved, p, seed, needs, param_dtype
        )
        return dx if p > 0 else summed.new_empty(0), *gradients

    def fake_backward(dout, dsummed, summed, shape, weight, *rest):
        *_, p, _, param_dtype = rest
        dresidual, parameter = torch.empty_like(summed), summed.new_empty(shape, dtype=param_dtype)
        dx = torch.empty_like(summed) if p > 0 else summed.new_empty(0)
        return dx, dresidual, parameter, torch.empty_like(parameter)

    results = ", ".join(["Tensor"] * (2 + count))
    saved_schema = ", ".join(f"Tensor {name}" for name in statistics)
    register(
        f"{op}(Tensor x, Tensor residual, int[] shape, Tensor? weight, Tensor? bias, float eps, float dropout_p,"
        f" Tensor? seed) -> ({results})",
        run,
        fake,
    )
    register(
        f"{op}_backward(Tensor? dout, Tensor? dsummed, Tensor summed, int[] shape, Tensor? weight, {saved_schema},"
        " float dropout_p, Tensor? seed, ScalarType param_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
        run_backward,
        fake_backward,
    )

    def setup_context(ctx, inputs, output):
        x, _, ctx.shape, weight, bias, _, ctx.p, seed = inputs
        _, summed, *saved = output
        ctx.save_for_backward(summed, weight, seed, *saved)
        ctx.param_dtype = _param_dtype(x, weight, bias)
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)

    def derivative(ctx, dout, dsummed, *_):
        summed, weight, seed, *saved = ctx.saved_tensors
        dx, dresidual, dweight, dbias = operator(
            f"{op}_backward", dout, dsummed, summed, ctx.shape, weight, *saved, ctx.p, seed, ctx.param_dtype
        )
        dx = dx if ctx.p > 0 else dresidual
        dweight = dweight if weight is not None else None
        return dx, dresidual, None, dweight, dbias if ctx.has_bias else None, None, None, None

    register_autograd(op, derivative, setup_context)
