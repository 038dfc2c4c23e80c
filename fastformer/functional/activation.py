"""Activations: relu, silu (x * sigmoid(x)) and GELU, x * Phi(x), exact or by the tanh approximation (Hendrycks, Gimpel
2016, arXiv:1606.08415).

:func:`relu`, :func:`gelu` and :func:`silu` have torch's signatures. :func:`bias_activation` is the epilogue of a
feed-forward's first matmul: it adds the matmul's bias and drops out in the same pass, and its backward returns the bias
gradient from the pass that computes dx. :func:`gated_activation` is that of a gated feed-forward (Shazeer 2020,
arXiv:2002.05202), act(gate) * up.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as TF

from ..backends import registry
from ..backends.cpu import activation as _cpu
from . import _checks
from ._doors import needs_grad, new_seed, once_differentiable, operator, register, register_autograd, through_operator
from ._small import eager_cpu, torch_instead

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
_FORMS = ("none", "tanh")
_TORCH = {"relu": torch.relu, "silu": TF.silu}


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """Elementwise ``max(input, 0)``; arguments as ``torch.nn.functional.relu``. float32, bfloat16, float16 or (CPU)
    float64 of any shape."""
    return elementwise(input, "relu", inplace)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Elementwise ``input * Phi(input)``; same arguments as ``torch.nn.functional.gelu``.

    Args:
        input: any shape; float32, bfloat16, float16 or (CPU) float64.
        approximate: "none" for the exact form, "tanh" for 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
    """
    _checks.choice("approximate", approximate, _FORMS)
    return elementwise(input, "gelu_tanh" if approximate == "tanh" else "gelu")


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """Elementwise ``input * sigmoid(input)``; arguments as ``torch.nn.functional.silu``. float32, bfloat16, float16 or
    (CPU) float64 of any shape."""
    return elementwise(input, "silu", inplace)


def bias_activation(
    input: Tensor,
    bias: Tensor | None,
    activation: str = "gelu",
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``dropout(activation(input + bias))`` in one pass.

    Args:
        input: ``(*, N)``; float32, bfloat16, float16 or (CPU) float64.
        bias: ``(N)`` in input's dtype, or None.
        activation: one of :data:`ACTIVATIONS`.
        dropout_p: probability of zeroing an element of the result; the rest is scaled by 1 / (1 - dropout_p).
        training: False switches dropout off.

    Raises:
        TypeError, ValueError: arguments that do not fit, naming the argument.
    """
    _checks.tensor("input", input)
    _checks.choice("activation", activation, ACTIVATIONS)
    _check_bias("bias", bias, "input", input)
    p, seed = _dropout(dropout_p, training)
    return apply(input, bias, None, None, activation, p, seed)


def gated_activation(
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``dropout(activation(gate + gate_bias) * (up + up_bias))`` in one pass: SwiGLU with "silu", GeGLU with "gelu".

    Args:
        gate, up: ``(*, N)`` of one shape, dtype and device.
        gate_bias, up_bias: ``(N)`` in the same dtype, or None.
        activation, dropout_p, training: as in :func:`bias_activation`.

    Raises:
        TypeError, ValueError: arguments that do not fit, naming the argument.
    """
    _checks.tensor("gate", gate)
    _checks.tensor("up", up)
    _checks.choice("activation", activation, ACTIVATIONS)
    if up.shape != gate.shape:
        raise ValueError(f"up: shape {tuple(up.shape)} is not gate's {tuple(gate.shape)}")
    _checks.same_dtype("up", up, "gate", gate)
    _checks.same_device("up", up, "gate", gate)
    _check_bias("gate_bias", gate_bias, "gate", gate)
    _check_bias("up_bias", up_bias, "up", up)
    p, seed = _dropout(dropout_p, training)
    return apply(gate, gate_bias, up, up_bias, activation, p, seed)


def _dropout(dropout_p: float, training: bool) -> tuple[float, Tensor | None]:
    """(probability, seed), the seed only where it is drawn on."""
    _checks.probability("dropout_p", dropout_p)
    p = float(dropout_p) if training else 0.0
    return p, new_seed() if p > 0 else None


def _check_bias(name: str, bias: Tensor | None, like_name: str, like: Tensor) -> None:
    if bias is None:
        return
    _checks.tensor(name, bias)
    _checks.same_dtype(name, bias, like_name, like)
    _checks.same_device(name, bias, like_name, like)
    if like.dim() == 0 or bias.shape != like.shape[-1:]:
        raise ValueError(f"{name}: shape {tuple(bias.shape)} is not {tuple(like.shape[-1:])}")


def elementwise(input: Tensor, activation: str, inplace: bool = False) -> Tensor:
    """One of :data:`ACTIVATIONS` of every element."""
    if not inplace and eager_cpu(input):
        if not needs_grad(input):
            found = _cpu.plain(input, activation)
        elif activation in _TORCH:
            found = torch_instead(activation, input, _TORCH[activation])
        else:
            found = None
        if found is not None:
            return found
    _checks.tensor("input", input)
    if not inplace:
        return apply(input, None, None, None, activation)
    if not through_operator(input) and not needs_grad(input) and input.is_contiguous():
        return select(input, None).forward(input, None, None, None, activation, out=input)
    # Where a derivative may be taken it needs what input was.
    kept = input.clone() if torch.is_grad_enabled() and input.requires_grad else input
    return input.copy_(apply(kept, None, None, None, activation))


def apply(
    x: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """dropout(act(x + bias) * (up + up_bias)) of checked arguments; ``seed`` where p > 0."""
    if through_operator(x, bias, up, up_bias):
        return operator("activation", x, bias, up, up_bias, activation, p, seed)
    number = 0 if seed is None else int(seed)
    kernels = select(x, bias, up, up_bias, p)
    if needs_grad(x, bias, up, up_bias):
        return _Activation.apply(x, bias, up, up_bias, activation, p, number, kernels)
    return kernels.forward(*_contiguous(x, bias, up, up_bias), activation, p, number)


def select(
    x: Tensor, bias: Tensor | None, up: Tensor | None = None, up_bias: Tensor | None = None, p: float = 0.0
) -> ModuleType:
    """The backend for dropout(act(x + bias) * (up + up_bias))."""
    features: tuple[str, ...] = ("bias",) if bias is not None or up_bias is not None else ()
    if up is not None:
        features += ("gate",)
    if p > 0:
        features += ("dropout",)
    return registry.select("activation", x.device.type, x.dtype, features)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.contiguous() for t in tensors)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, up, up_bias, activation, p, seed, kernels):
        x, bias, up, up_bias = _contiguous(x, bias, up, up_bias)
        ctx.save_for_backward(x, bias, up, up_bias)
        ctx.rest = activation, p, seed
        ctx.kernels = kernels
        return kernels.forward(x, bias, up, up_bias, activation, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        _, need_dbias, _, need_dup_bias = ctx.needs_input_grad[:4]
        dx, dup, dbias, dup_bias = ctx.kernels.backward(
            dout.contiguous(), *ctx.saved_tensors, *ctx.rest, need_dbias, need_dup_bias
        )
        return dx, dbias, dup, dup_bias, None, None, None, None


# ---- the registered operator -----------------------------------------------------------------------------------------


def _operator(x, bias, up, up_bias, activation, p, seed):
    kernels = select(x, bias, up, up_bias, p)
    return kernels.forward(*_contiguous(x, bias, up, up_bias), activation, p, 0 if seed is None else int(seed))


def _operator_backward(dout, x, bias, up, up_bias, activation, p, seed):
    dx, dup, dbias, dup_bias = select(x, bias, up, up_bias, p).backward(
        *_contiguous(dout, x, bias, up, up_bias),
        activation,
        p,
        0 if seed is None else int(seed),
        bias is not None,
        up_bias is not None,
    )
    return tuple(x.new_empty(0) if t is None else t for t in (dx, dbias, dup, dup_bias))


def _fake_backward(dout, x, bias, up, up_bias, activation, p, seed):
    return tuple(
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (x, bias, up, up_bias)
    )


register(
    "activation(Tensor x, Tensor? bias, Tensor? up, Tensor? up_bias, str activation, float dropout_p, Tensor? seed)"
    " -> Tensor",
    _operator,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
register(
    "activation_backward(Tensor dout, Tensor x, Tensor? bias, Tensor? up, Tensor? up_bias, str activation,"
    " float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)",
    _operator_backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    x, bias, up, up_bias, ctx.activation, ctx.p, seed = inputs
    ctx.save_for_backward(x, bias, up, up_bias, seed)


def _autograd(ctx, dout):
    *tensors, seed = ctx.saved_tensors
    gradients = operator("activation_backward", dout, *tensors, ctx.activation, ctx.p, seed)
    return *(None if t is None else g for t, g in zip(tensors, gradients, strict=True)), None, None, None


register_autograd("activation", _autograd, _setup_context)
