"""softmax and log_softmax over any dimension, with a scale, a mask and the causal form inside the kernel.

The forward reads a row once from memory and writes it once; the backward needs only the output. A mask is read as it
is, broadcast or not: the dimensions before the rows collapse into three (backends/layout.py). A row without any element
(everything masked) gives zeros and zero gradients instead of NaN.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import _get_softmax_dim  # type: ignore[attr-defined]

from ..backends import registry
from ..backends.cpu import softmax as _cpu
from ..backends.layout import collapsed
from . import _checks
from ._doors import needs_grad, once_differentiable, operator, register, register_autograd, through_operator
from ._small import eager_cpu


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(scale * input + mask) along ``dim``; first arguments as ``torch.nn.functional.softmax``.

    Args:
        input: any shape; float32, bfloat16, float16 or (CPU) float64. Integers need ``dtype``.
        dim: the dimension that sums to one. None picks one as torch does, with torch's warning.
        dtype: convert the input first.
        scale: multiplies the input.
        mask: any shape that broadcasts to input's. Bool: True takes part. Floating, in input's dtype or float32: added
            after the scale, with a gradient, which is summed over what the mask broadcasts.
        causal: with input ``(..., queries, keys)`` and the last ``dim``: query i takes the keys up to
            i + keys - queries, so that the ends are aligned, as in :func:`attention`.

    Returns:
        The shape of ``input``, in ``dtype`` or input's dtype. A slice without any element, masked or -inf, gives zeros
        and no gradient.

    Raises:
        TypeError, ValueError, IndexError: a dtype, shape, device or dimension that does not fit, naming the argument.
    """
    return _softmax("softmax", input, dim, _stacklevel, dtype, False, scale, mask, causal)


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """The logarithm of :func:`softmax`, with the same arguments. What takes no part is -inf and has no gradient."""
    return _softmax("log_softmax", input, dim, _stacklevel, dtype, True, scale, mask, causal)


def _softmax(
    name: str,
    x: Tensor,
    dim: int | None,
    stacklevel: int,
    dtype: torch.dtype | None,
    log: bool,
    scale: float,
    mask: Tensor | None,
    causal: bool,
) -> Tensor:
    if mask is None and scale == 1 and not causal and dtype is None and eager_cpu(x) and not needs_grad(x):
        found = _cpu.plain(x, dim, log)
        if found is not None:
            return found
    if not isinstance(x, Tensor):
        raise TypeError(f"input: expected a torch.Tensor, got {type(x).__name__}")
    if dtype is not None:
        x = x.to(dtype)
    _checks.tensor("input", x)
    dims = x.dim()
    if dim is None:
        dim = _get_softmax_dim(name, dims, stacklevel + 1)
    if not -max(dims, 1) <= dim < max(dims, 1):
        raise IndexError(f"dim: {dim} is out of range for an input of {dims} dimensions")
    last = dims == 0 or dim == -1 or dim == dims - 1
    rows = x if last else x.movedim(dim, -1)
    if dims == 0:
        rows = rows[None]
    bias = None
    if causal and not (last and dims >= 2):
        raise ValueError(
            f"causal: needs an input (..., queries, keys) and its last dim, got {dims} dimensions, dim {dim}"
        )
    if mask is not None:
        _check_mask(mask, x)
        mask = mask.view((1,) * (max(dims, 1) - mask.dim()) + mask.shape)
        mask = mask if last else mask.movedim(dim, -1)
        if mask.dtype != torch.bool:
            mask, bias = None, mask
    scale = float(scale)
    if through_operator(rows, mask, bias):
        out = operator("softmax", rows, log, scale, mask, bias, causal)
    elif mask is None and bias is None and not causal:
        kernels = registry.select("softmax", x.device.type, x.dtype)
        out = _Softmax.apply(rows, log, scale, kernels) if needs_grad(rows) else _forward(kernels, rows, log, scale)
    else:
        kernels = _select(rows, mask, bias, causal)
        if needs_grad(rows, bias):
            out = _MaskedSoftmax.apply(rows, bias, mask, log, scale, causal, kernels)
        else:
            out = _forward(kernels, rows, log, scale, mask, bias, causal)
    if dims == 0:
        return out[0]
    return out if last else out.movedim(-1, dim)


def _check_mask(mask: Tensor, x: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a torch.Tensor, got {type(mask).__name__}")
    half = x.dtype in (torch.bfloat16, torch.float16)
    if mask.dtype not in (torch.bool, x.dtype) and not (half and mask.dtype == torch.float32):
        raise TypeError(f"mask: dtype {mask.dtype} beside input of {x.dtype}; expected bool, the same or float32")
    _checks.same_device("mask", mask, "input", x)
    sizes = zip(reversed(mask.shape), reversed(x.shape))
    if mask.dim() > x.dim() or any(m not in (1, n) for m, n in sizes):
        raise ValueError(f"mask: shape {tuple(mask.shape)} does not broadcast to input's {tuple(x.shape)}")


def _select(x: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool) -> ModuleType:
    features: tuple[str, ...] = () if mask is None else ("mask",)
    if bias is not None:
        features += ("bias",)
    if causal:
        features += ("causal",)
    return registry.select("softmax", x.device.type, x.dtype, features)


def _forward(kernels, x, log, scale, mask=None, bias=None, causal=False):
    rows = _checks.rowwise(x, x.shape[-1])
    if (mask is None and bias is None and not causal) or not x.numel():
        out = kernels.forward(rows, scale, log)
    else:
        (mask, bias), row_shape = collapsed((mask, bias), x.shape, causal)
        out = kernels.forward(rows, scale, log, mask, bias, row_shape, causal)
    return out if rows is x else out.view(x.shape)


def _backward(kernels, dout, out, log, scale, mask=None, causal=False):
    dout = _checks.rowwise(dout, out.shape[-1])
    if not log or (mask is None and not causal) or not out.numel():
        return kernels.backward(dout, out.contiguous(), scale, log)
    (mask,), row_shape = collapsed((mask,), out.shape, causal)
    return kernels.backward(dout, out.contiguous(), scale, log, mask, row_shape, causal)


def _gradients(backward, bias, scale):
    """dx and dbias by ``backward(scale)``, which gives dx: dbias is dx / scale, summed over what bias broadcasts."""
    if bias is None:
        return backward(scale), None
    unit = scale if scale != 0 else 1.0
    dx = dbias = backward(unit)
    broadcast = [d for d, (n, m) in enumerate(zip(dx.shape, bias.shape)) if n != m]
    if broadcast:
        acc = torch.float64 if dx.dtype == torch.float64 else torch.float32
        dbias = dx.sum(broadcast, keepdim=True, dtype=acc)
    if unit != 1:
        dbias = dbias / unit
    return dx if scale != 0 else torch.zeros_like(dx), dbias.to(bias.dtype)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log, scale, kernels):
        out = _forward(kernels, x, log, scale)
        ctx.save_for_backward(out)
        ctx.options = kernels, log, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        kernels, log, scale = ctx.options
        return _backward(kernels, dout, ctx.saved_tensors[0], log, scale), None, None, None


class _MaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, mask, log, scale, causal, kernels):
        out = _forward(kernels, x, log, scale, mask, bias, causal)
        ctx.save_for_backward(out, bias if ctx.needs_input_grad[1] else None, mask if log else None)
        ctx.options = kernels, log, scale, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        out, bias, mask = ctx.saved_tensors
        kernels, log, scale, causal = ctx.options
        dx, dbias = _gradients(lambda unit: _backward(kernels, dout, out, log, unit, mask, causal), bias, scale)
        return dx, dbias, None, None, None, None, None


# ---- the registered operator -----------------------------------------------------------------------------------------


def _operator(x, log, scale=1.0, mask=None, bias=None, causal=False):
    return _forward(_select(x, mask, bias, causal), x, log, scale, mask, bias, causal)


def _operator_backward(dout, out, log, scale=1.0, mask=None, causal=False):
    return _backward(_select(out, mask, None, causal), dout, out, log, scale, mask, causal)


def _fake(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# mask and bias have as many dimensions as x, each 1 or x's.
register(
    "softmax(Tensor x, bool log, float scale=1.0, Tensor? mask=None, Tensor? bias=None, bool causal=False) -> Tensor",
    _operator,
    _fake,
)
register(
    "softmax_backward(Tensor dout, Tensor out, bool log, float scale=1.0, Tensor? mask=None, bool causal=False)"
    " -> Tensor",
    _operator_backward,
    lambda dout, out, *_: _fake(out),
)


def _setup_context(ctx, inputs, output):
    _, ctx.log, ctx.scale, mask, bias, ctx.causal = inputs
    ctx.save_for_backward(output, mask, bias)


def _autograd(ctx, dout):
    out, mask, bias = ctx.saved_tensors
    dx, dbias = _gradients(
        lambda unit: operator("softmax_backward", dout, out, ctx.log, unit, mask, ctx.causal), bias, ctx.scale
    )
    return dx, None, None, None, dbias, None


register_autograd("softmax", _autograd, _setup_context)
