"""GELU, x * Phi(x), exact or by the tanh approximation (Hendrycks, Gimpel 2016, arXiv:1606.08415).

:func:`gelu` has torch's signature. :func:`bias_gelu` is the epilogue of a feed-forward's first matmul: it adds the
matmul's bias in the same pass, and its backward returns the bias gradient from the pass that computes dx.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..backends import registry
from . import _checks
from ._doors import needs_grad, once_differentiable, operator, register, register_autograd, through_operator

_FORMS = ("none", "tanh")


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Elementwise ``input * Phi(input)``; same arguments as ``torch.nn.functional.gelu``.

    Args:
        input: any shape; float32, bfloat16, float16 or (CPU) float64.
        approximate: "none" for the exact form, "tanh" for 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
    """
    return bias_gelu(input, None, approximate)


def bias_gelu(input: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """``gelu(input + bias)`` in one pass; ``bias`` has the length of input's last dimension, or is None."""
    _checks.tensor("input", input)
    _checks.choice("approximate", approximate, _FORMS)
    if bias is not None:
        _checks.tensor("bias", bias)
        _checks.same_dtype("bias", bias, "input", input)
        _checks.same_device("bias", bias, "input", input)
        if input.dim() == 0 or bias.shape != input.shape[-1:]:
            raise ValueError(f"bias: shape {tuple(bias.shape)} is not {tuple(input.shape[-1:])}")
    tanh = approximate == "tanh"
    if through_operator(input, bias):
        return operator("gelu", input, bias, tanh)
    kernels = select(input, bias)
    if needs_grad(input, bias):
        return _Gelu.apply(input, bias, tanh, kernels)
    return kernels.forward(input.contiguous(), bias, tanh)


def select(x: Tensor, bias: Tensor | None) -> ModuleType:
    """The backend for gelu(x + bias)."""
    return registry.select("gelu", x.device.type, x.dtype, ("bias",) if bias is not None else ())


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, tanh, kernels):
        x = x.contiguous()
        ctx.save_for_backward(x, bias)
        ctx.tanh, ctx.kernels = tanh, kernels
        return kernels.forward(x, bias, tanh)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, bias = ctx.saved_tensors
        return *ctx.kernels.backward(dout.contiguous(), x, bias, ctx.tanh, ctx.needs_input_grad[1]), None, None


def _operator(x, bias, tanh):
    return select(x, bias).forward(x.contiguous(), bias, tanh)


def _operator_backward(dout, x, bias, tanh):
    dx, dbias = select(x, bias).backward(dout.contiguous(), x.contiguous(), bias, tanh, bias is not None)
    return dx, x.new_empty(0) if dbias is None else dbias


register(
    "gelu(Tensor x, Tensor? bias, bool tanh) -> Tensor",
    _operator,
    lambda x, bias, tanh: torch.empty_like(x, memory_format=torch.contiguous_format),
)
register(
    "gelu_backward(Tensor dout, Tensor x, Tensor? bias, bool tanh) -> (Tensor, Tensor)",
    _operator_backward,
    lambda dout, x, bias, tanh: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format),
    ),
)


def _setup_context(ctx, inputs, output):
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _autograd(ctx, dout):
    x, bias = ctx.saved_tensors
    dx, dbias = operator("gelu_backward", dout, x, bias, ctx.tanh)
    return dx, None if bias is None else dbias, None


register_autograd("gelu", _autograd, _setup_context)
