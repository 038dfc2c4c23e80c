"""Layer normalisation, out = (x - mean) / sqrt(var + eps) * weight + bias (Ba, Kiros, Hinton 2016, arXiv:1607.06450).

Forward saves only the mean and 1/sqrt(var + eps) of each row; backward recomputes the normalised values from the input
in the same pass that produces the gradients, so the op moves two tensors forward and three backward, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import registry
from . import _checks
from ._doors import needs_grad, once_differentiable, operator, register, register_autograd, through_operator


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalises over the last dimensions; same arguments as ``torch.nn.functional.layer_norm``.

    Args:
        input: ``(*, *normalized_shape)``, float32, bfloat16, float16 or (CPU) float64, any strides.
        normalized_shape: the trailing dimensions that form a row.
        weight, bias: ``normalized_shape`` or None, in input's dtype or float32.
        eps: added to the variance.

    Returns:
        The shape and dtype of ``input``. Statistics are computed in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, naming the argument.
    """
    shape = tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else (int(normalized_shape),)
    _check(input, shape, weight, bias, eps)
    if through_operator(input, weight, bias):
        return operator("layer_norm", input, shape, weight, bias, eps)[0]
    kernels = registry.select("layer_norm", input.device.type, input.dtype)
    if needs_grad(input, weight, bias):
        return _LayerNorm.apply(input, weight, bias, shape, eps, kernels)
    return _forward(kernels, input, shape, weight, bias, eps, statistics=False)[0]


def _check(input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    _checks.tensor("input", input)
    if not shape or input.shape[-len(shape) :] != shape:
        raise ValueError(f"normalized_shape: {shape} is not the end of input's shape {tuple(input.shape)}")
    _checks.parameter("weight", weight, shape, "input", input)
    _checks.parameter("bias", bias, shape, "input", input)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(f"bias: dtype {bias.dtype} differs from weight's {weight.dtype}")
    if not eps >= 0:
        raise ValueError(f"eps: {eps} is negative")


def _flat(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or (parameter.dim() == 1 and parameter.is_contiguous()):
        return parameter
    return parameter.reshape(-1).contiguous()


def _forward(kernels, x, shape, weight, bias, eps, statistics=True):
    rows = _checks.rowwise(x, math.prod(shape))
    out, mean, rstd = kernels.forward(rows, _flat(weight), _flat(bias), eps, statistics)
    return out if rows is x else out.view(x.shape), mean, rstd


def _backward(kernels, dout, x, shape, weight, mean, rstd, needs, param_dtype):
    cols = math.prod(shape)
    rows = _checks.rowwise(x, cols)
    dx, dweight, dbias = kernels.backward(
        _checks.rowwise(dout, cols), rows, _flat(weight), mean, rstd, *needs, param_dtype
    )
    if dx is not None and rows is not x:
        dx = dx.view(x.shape)
    if len(shape) > 1:
        dweight = None if dweight is None else dweight.view(shape)
        dbias = None if dbias is None else dbias.view(shape)
    return dx, dweight, dbias


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, shape, eps, kernels):
        out, mean, rstd = _forward(kernels, x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.shape, ctx.kernels = shape, kernels  # kept: an override is not seen by autograd's threads
        ctx.param_dtype = weight.dtype if weight is not None else bias.dtype if bias is not None else x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients = _backward(ctx.kernels, dout, x, ctx.shape, weight, mean, rstd, needs, ctx.param_dtype)
        return *gradients, None, None, None


# ---- the registered operator -----------------------------------------------------------------------------------------


def _operator(x, shape, weight, bias, eps):
    kernels = registry.select("layer_norm", x.device.type, x.dtype)
    return _forward(kernels, x, tuple(shape), weight, bias, eps)


def _fake_forward(x, shape, weight, bias, eps):
    rows = x.numel() // max(math.prod(shape), 1)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    statistics = x.new_empty((rows,), dtype=acc)
    return torch.empty_like(x, memory_format=torch.contiguous_format), statistics, torch.empty_like(statistics)


def _operator_backward(dout, x, shape, weight, mean, rstd, param_dtype):
    kernels = registry.select("layer_norm", x.device.type, x.dtype)
    return _backward(kernels, dout, x, tuple(shape), weight, mean, rstd, (True, True, True), param_dtype)


def _fake_backward(dout, x, shape, weight, mean, rstd, param_dtype):
    parameter = x.new_empty(shape, dtype=param_dtype)
    return torch.empty_like(x, memory_format=torch.contiguous_format), parameter, torch.empty_like(parameter)


register(
    "layer_norm(Tensor x, int[] shape, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    _operator,
    _fake_forward,
)
register(
    "layer_norm_backward(Tensor dout, Tensor x, int[] shape, Tensor? weight, Tensor mean, Tensor rstd,"
    " ScalarType param_dtype) -> (Tensor, Tensor, Tensor)",
    _operator_backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    x, ctx.shape, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.param_dtype = weight.dtype if weight is not None else bias.dtype if bias is not None else x.dtype
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(mean, rstd)


def _autograd(ctx, dout, _dmean, _drstd):
    x, weight, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = operator("layer_norm_backward", dout, x, ctx.shape, weight, mean, rstd, ctx.param_dtype)
    return dx, None, dweight if weight is not None else None, dbias if ctx.has_bias else None, None


register_autograd("layer_norm", _autograd, _setup_context)
