"""softmax and log_softmax over any dimension, with the row maximum subtracted.

The forward reads a row twice from cache and writes it once; the backward needs only the output. A row that is entirely
-inf (everything masked) gives zeros and zero gradients instead of NaN.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import _get_softmax_dim  # type: ignore[attr-defined]

from ..backends import registry
from . import _checks
from ._doors import needs_grad, once_differentiable, operator, register, register_autograd, through_operator


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """``exp(input - max) / sum`` along ``dim``; same arguments as ``torch.nn.functional.softmax``.

    Args:
        input: any shape; float32, bfloat16, float16 or (CPU) float64. Integers need ``dtype``.
        dim: the dimension that sums to one. None picks one as torch does, with torch's warning.
        dtype: convert the input first.

    Returns:
        The shape of ``input``, in ``dtype`` or input's dtype. A slice of only -inf gives zeros.
    """
    return _softmax("softmax", input, dim, _stacklevel, dtype, log=False)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """``input - logsumexp(input)`` along ``dim``; same arguments as ``torch.nn.functional.log_softmax``."""
    return _softmax("log_softmax", input, dim, _stacklevel, dtype, log=True)


def _softmax(name: str, x: Tensor, dim: int | None, stacklevel: int, dtype: torch.dtype | None, log: bool) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"input: expected a torch.Tensor, got {type(x).__name__}")
    if dtype is not None:
        x = x.to(dtype)
    _checks.tensor("input", x)
    if dim is None:
        dim = _get_softmax_dim(name, x.dim(), stacklevel + 1)
    if not -max(x.dim(), 1) <= dim < max(x.dim(), 1):
        raise IndexError(f"dim: {dim} is out of range for an input of {x.dim()} dimensions")
    last = x.dim() == 0 or dim in (-1, x.dim() - 1)
    rows = x if last else x.movedim(dim, -1)
    if rows.dim() == 0:
        rows = rows[None]
    if through_operator(rows):
        out = operator("softmax", rows, log)
    elif needs_grad(rows):
        out = _Softmax.apply(rows, log, _select(rows))
    else:
        out = _forward(_select(rows), rows, log)
    if x.dim() == 0:
        return out[0]
    return out if last else out.movedim(-1, dim)


def _select(x: Tensor) -> ModuleType:
    return registry.select("softmax", x.device.type, x.dtype)


def _forward(kernels, x, log):
    rows = _checks.rowwise(x, x.shape[-1])
    out = kernels.forward(rows, 1.0, log)
    return out if rows is x else out.view(x.shape)


def _backward(kernels, dout, out, log):
    return kernels.backward(_checks.rowwise(dout, out.shape[-1]), out.contiguous(), 1.0, log)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log, kernels):
        out = _forward(kernels, x, log)
        ctx.save_for_backward(out)
        ctx.log, ctx.kernels = log, kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (out,) = ctx.saved_tensors
        return _backward(ctx.kernels, dout, out, ctx.log), None, None


register(
    "softmax(Tensor x, bool log) -> Tensor",
    lambda x, log: _forward(_select(x), x, log),
    lambda x, log: torch.empty_like(x, memory_format=torch.contiguous_format),
)
register(
    "softmax_backward(Tensor dout, Tensor out, bool log) -> Tensor",
    lambda dout, out, log: _backward(_select(out), dout, out, log),
    lambda dout, out, log: torch.empty_like(out, memory_format=torch.contiguous_format),
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output)
    ctx.log = inputs[1]


register_autograd(
    "softmax",
    lambda ctx, dout: (operator("softmax_backward", dout, ctx.saved_tensors[0], ctx.log), None),
    _setup_context,
)
