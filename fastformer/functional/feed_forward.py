"""A transformer's feed-forward block: activation(x w1^T + b1) w2^T + b2 (Vaswani et al. 2017, equation 2).

The two matmuls are the library's; what lies between them is one pass forward (add b1, activate) and one backward
(activation gradient, and b1's gradient reduced on the way), instead of a broadcast copy, an add, the activation, its
gradient and a column sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, gelu
from ._doors import needs_grad, once_differentiable, through_operator

ACTIVATIONS = ("gelu", "gelu_tanh")


def feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str = "gelu"
) -> Tensor:
    """``activation(x @ w1.T + b1) @ w2.T + b2``.

    Args:
        x: ``(*, E)``; float32, bfloat16, float16 or (CPU) float64.
        w1, b1: ``(F, E)`` and ``(F)`` or None, as in ``nn.Linear(E, F)``.
        w2, b2: ``(E_out, F)`` and ``(E_out)`` or None.
        activation: "gelu" (exact) or "gelu_tanh".

    Returns:
        ``(*, E_out)``.

    Raises:
        TypeError, ValueError: arguments that do not fit, naming the argument.
    """
    _check(x, w1, b1, w2, b2, activation)
    tanh = activation == "gelu_tanh"
    if not through_operator(x, w1, b1, w2, b2) and not _autocast(x) and needs_grad(x, w1, b1, w2, b2):
        return _FeedForward.apply(x, w1, b1, w2, b2, tanh, gelu.select(x, b1))
    hidden = torch.matmul(x, w1.t())
    hidden = gelu.bias_gelu(hidden, None if b1 is None else b1.to(hidden.dtype), "tanh" if tanh else "none")
    return torch.nn.functional.linear(hidden, w2, b2)


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _check(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> None:
    _checks.tensor("x", x)
    _checks.choice("activation", activation, ACTIVATIONS)
    for name, w in (("w1", w1), ("w2", w2)):
        _checks.tensor(name, w)
        if w.dim() != 2:
            raise ValueError(f"{name}: shape {tuple(w.shape)} is not (out_features, in_features)")
        _checks.same_device(name, w, "x", x)
        if not _autocast(x):
            _checks.same_dtype(name, w, "x", x)
    if x.dim() == 0 or x.shape[-1] != w1.shape[1]:
        raise ValueError(f"w1: {w1.shape[1]} input features are not x's {tuple(x.shape[-1:])}")
    if w2.shape[1] != w1.shape[0]:
        raise ValueError(f"w2: {w2.shape[1]} input features are not w1's {w1.shape[0]} output features")
    for name, b, w in (("b1", b1, w1), ("b2", b2, w2)):
        if b is not None and tuple(b.shape) != (w.shape[0],):
            raise ValueError(f"{name}: shape {tuple(b.shape)} is not ({w.shape[0]},)")


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, tanh, kernels):
        rows = x.reshape(-1, x.shape[-1])
        hidden = torch.mm(rows, w1.t())
        activated = kernels.forward(hidden, b1, tanh)
        out = torch.mm(activated, w2.t()) if b2 is None else torch.addmm(b2, activated, w2.t())
        ctx.save_for_backward(rows, w1, b1, w2, hidden, activated)
        ctx.tanh, ctx.kernels = tanh, kernels
        return out.view(*x.shape[:-1], w2.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        rows, w1, b1, w2, hidden, activated = ctx.saved_tensors
        need_x, need_w1, need_b1, need_w2, need_b2 = ctx.needs_input_grad[:5]
        dy = dout.reshape(-1, w2.shape[0])
        db2 = dy.sum(0) if need_b2 else None
        # The weight gradients are formed in the orientation the weights have in memory, so that an optimizer (and a
        # second accumulation) sees matching strides; GPT-2 passes transposed views here.
        dw2 = _weight_grad(dy, activated, w2) if need_w2 else None
        dx = dw1 = db1 = None
        if need_x or need_w1 or need_b1:
            dhidden, db1 = ctx.kernels.backward(torch.mm(dy, w2), hidden, b1, ctx.tanh, need_b1)
            dw1 = _weight_grad(dhidden, rows, w1) if need_w1 else None
            dx = torch.mm(dhidden, w1).view(*dout.shape[:-1], w1.shape[1]) if need_x else None
        return dx, dw1, db1, dw2, db2, None, None


def _weight_grad(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.mm(dy.t(), x) if w.is_contiguous() else torch.mm(x.t(), dy).t()
