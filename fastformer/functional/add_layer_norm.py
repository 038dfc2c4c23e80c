"""Residual addition, dropout and layer normalisation in one pass: summed = residual + dropout(x); out = norm(summed).

Between two sublayers of a transformer PyTorch reads and writes the activations four times (dropout, add, norm); here
they are read once and written twice. The dropout mask is not stored: both directions derive it from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..backends import registry
from . import _checks
from ._doors import needs_grad, new_seed, once_differentiable, operator, register, register_autograd, through_operator
from .layer_norm import _check as _check_layer_norm
from .layer_norm import _flat


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """``summed = residual + dropout(x)`` and ``out = layer_norm(summed)``.

    Args:
        x: ``(*, *normalized_shape)``, the output of a sublayer; float32, bfloat16, float16 or (CPU) float64.
        residual: same shape and dtype, the stream it is added to.
        normalized_shape, weight, bias, eps: as in :func:`layer_norm`.
        dropout_p: probability of zeroing an element of ``x``; the rest is scaled by 1 / (1 - dropout_p).
        training: False switches dropout off.

    Returns:
        ``(out, summed)``, both in the shape and dtype of ``x``. A pre-norm block continues with ``summed`` as the
        residual stream; a post-norm block uses ``out`` only.

    Raises:
        TypeError, ValueError: arguments that do not fit together, naming the argument.
    """
    shape = tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else (int(normalized_shape),)
    _checks.tensor("x", x)
    _checks.tensor("residual", residual)
    _check_layer_norm(x, shape, weight, bias, eps)
    if residual.shape != x.shape:
        raise ValueError(f"residual: shape {tuple(residual.shape)} is not x's {tuple(x.shape)}")
    _checks.same_dtype("residual", residual, "x", x)
    _checks.same_device("residual", residual, "x", x)
    _checks.probability("dropout_p", dropout_p)
    p = float(dropout_p) if training else 0.0
    if through_operator(x, residual, weight, bias):
        seed_tensor = new_seed() if p > 0 else None
        return operator("add_layer_norm", x, residual, shape, weight, bias, eps, p, seed_tensor)[:2]
    seed = int(new_seed()) if p > 0 else 0
    kernels = _select(x, p)
    if needs_grad(x, residual, weight, bias):
        return _AddLayerNorm.apply(x, residual, weight, bias, shape, eps, p, seed, kernels)
    return _forward(kernels, x, residual, shape, weight, bias, eps, p, seed, statistics=False)[:2]


def _select(x: Tensor, p: float) -> ModuleType:
    return registry.select("add_layer_norm", x.device.type, x.dtype, ("dropout",) if p > 0 else ())


def _forward(kernels, x, residual, shape, weight, bias, eps, p, seed, statistics=True):
    cols = math.prod(shape)
    rows = _checks.rowwise(x, cols)
    # as x, so that the outputs have one shape
    residual_rows = _checks.rowwise(residual, cols) if rows is x else _checks.as_rows(residual, cols)
    out, summed, mean, rstd = kernels.forward(rows, residual_rows, _flat(weight), _flat(bias), eps, p, seed, statistics)
    if rows is not x:
        out, summed = out.view(x.shape), summed.view(x.shape)
    return out, summed, mean, rstd


def _backward(kernels, dout, dsummed, summed, shape, weight, mean, rstd, p, seed, needs, param_dtype):
    cols = math.prod(shape)
    rows = _checks.rowwise(summed, cols)
    dx, dresidual, dweight, dbias = kernels.backward(
        _checks.rowwise(dout, cols),
        None if dsummed is None else _checks.rowwise(dsummed, cols),
        rows,
        _flat(weight),
        mean,
        rstd,
        p,
        seed,
        *needs,
        param_dtype,
    )
    if rows is not summed:
        dx, dresidual = dx.view(summed.shape), dresidual.view(summed.shape)
    if len(shape) > 1:
        dweight = None if dweight is None else dweight.view(shape)
        dbias = None if dbias is None else dbias.view(shape)
    return dx, dresidual, dweight, dbias


def _param_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    return weight.dtype if weight is not None else bias.dtype if bias is not None else x.dtype


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, shape, eps, p, seed, kernels):
        out, summed, mean, rstd = _forward(kernels, x, residual, shape, weight, bias, eps, p, seed)
        ctx.save_for_backward(summed, weight, mean, rstd)
        ctx.shape, ctx.p, ctx.seed, ctx.kernels = shape, p, seed, kernels
        ctx.param_dtype = _param_dtype(x, weight, bias)
        ctx.set_materialize_grads(False)
        return out, summed

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dsummed):
        summed, weight, mean, rstd = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(summed)
        needs, dtype = ctx.needs_input_grad[2:4], ctx.param_dtype
        gradients = _backward(
            ctx.kernels, dout, dsummed, summed, ctx.shape, weight, mean, rstd, ctx.p, ctx.seed, needs, dtype
        )
        return *gradients, None, None, None, None, None


# ---- the registered operator -----------------------------------------------------------------------------------------


def _operator(x, residual, shape, weight, bias, eps, p, seed):
    return _forward(_select(x, p), x, residual, tuple(shape), weight, bias, eps, p, 0 if seed is None else int(seed))


def _fake(x, residual, shape, weight, bias, eps, p, seed):
    rows = x.numel() // max(math.prod(shape), 1)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    statistics = x.new_empty((rows,), dtype=acc)
    return out, torch.empty_like(out), statistics, torch.empty_like(statistics)


def _operator_backward(dout, dsummed, summed, shape, weight, mean, rstd, p, seed, param_dtype):
    dx, dresidual, dweight, dbias = _backward(
        _select(summed, p),
        dout,
        dsummed,
        summed,
        tuple(shape),
        weight,
        mean,
        rstd,
        p,
        0 if seed is None else int(seed),
        (True, True),
        param_dtype,
    )
    return dx.clone() if dx.data_ptr() == dresidual.data_ptr() else dx, dresidual, dweight, dbias


def _fake_backward(dout, dsummed, summed, shape, weight, mean, rstd, p, seed, param_dtype):
    d = torch.empty_like(summed)
    parameter = summed.new_empty(shape, dtype=param_dtype)
    return d, torch.empty_like(d), parameter, torch.empty_like(parameter)


register(
    "add_layer_norm(Tensor x, Tensor residual, int[] shape, Tensor? weight, Tensor? bias, float eps, float dropout_p,"
    " Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)",
    _operator,
    _fake,
)
register(
    "add_layer_norm_backward(Tensor dout, Tensor dsummed, Tensor summed, int[] shape, Tensor? weight, Tensor mean,"
    " Tensor rstd, float dropout_p, Tensor? seed, ScalarType param_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _operator_backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    x, _, ctx.shape, weight, bias, _, ctx.p, seed = inputs
    _, summed, mean, rstd = output
    ctx.save_for_backward(summed, weight, mean, rstd, seed)
    ctx.param_dtype = _param_dtype(x, weight, bias)
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(mean, rstd)


def _autograd(ctx, dout, dsummed, _dmean, _drstd):
    summed, weight, mean, rstd, seed = ctx.saved_tensors
    dx, dresidual, dweight, dbias = operator(
        "add_layer_norm_backward", dout, dsummed, summed, ctx.shape, weight, mean, rstd, ctx.p, seed, ctx.param_dtype
    )
    dweight = dweight if weight is not None else None
    return dx, dresidual, None, dweight, dbias if ctx.has_bias else None, None, None, None


register_autograd("add_layer_norm", _autograd, _setup_context)
