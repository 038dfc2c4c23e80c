"""A transformer's feed-forward block, activation(x w1^T + b1) w2^T + b2 (Vaswani et al. 2017, equation 2), and the
gated form, (activation(x w_gate^T) * (x w_up^T)) w_down^T: SwiGLU with silu, GeGLU with gelu (Shazeer 2020,
arXiv:2002.05202).

The matmuls are the library's. What lies between them is one pass forward (add biases, activate, multiply, drop out; in
place where nothing is saved) and one backward (the activation's gradient, biases' gradients reduced on the way),
instead of a broadcast copy, an add, the activation, its gradient and a column sum. The second matmul adds the residual
itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..backends import linear_activation, registry
from ..backends.matmul import addmm, mm, weight_grad
from ..backends.memory import empty, empty_if_large
from . import _checks
from . import activation as act
from ._doors import needs_grad, new_seed, once_differentiable, through_operator, transforming
from ._joined import joined
from ._small import attempt, eager_cpu
from .linear import linear


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu",
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    residual: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """``residual + dropout(activation(x @ w1.T + b1)) @ w2.T + b2``.

    Args:
        x: ``(*, E)``; float32, bfloat16, float16 or (CPU) float64.
        w1, b1: ``(F, E)`` and ``(F)`` or None, as in ``nn.Linear(E, F)``.
        w2, b2: ``(E_out, F)`` and ``(E_out)`` or None.
        activation: "relu", "gelu" (exact), "gelu_tanh" or "silu".
        dropout_p: probability of zeroing an element after the activation; the rest is scaled by 1 / (1 - dropout_p).
        training: False switches dropout off.
        residual: ``(*, E_out)``, added to the result by the second matmul.
        recompute: save nothing but x for backward, which then repeats the first matmul and the activation.

    Returns:
        ``(*, E_out)``.

    Raises:
        TypeError, ValueError: arguments that do not fit, naming the argument.
    """
    if dropout_p == 0 and not recompute and eager_cpu(x) and x.numel() <= registry.TORCH_UP_TO.get("feed_forward", 0):
        if (found := attempt(_separate, x, w1, b1, w2, b2, residual, activation)) is not None:
            return found
    names = ("w1", "b1", "", "", "w2", "b2")
    p = float(dropout_p) if training else 0.0
    return _run(x, (w1, b1, None, None, w2, b2), names, activation, dropout_p, p, residual, recompute)


def gated_feed_forward(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str = "silu",
    *,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    residual: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """``residual + dropout(activation(x @ w_gate.T + b_gate) * (x @ w_up.T + b_up)) @ w_down.T + b_down``.

    Where w_up follows w_gate in memory (two halves of one ``(2 F, E)`` tensor) both are one matmul.

    Args:
        x: ``(*, E)``; float32, bfloat16, float16 or (CPU) float64.
        w_gate, w_up: ``(F, E)``, with biases b_gate, b_up ``(F)`` or None.
        w_down: ``(E_out, F)``, with the bias b_down ``(E_out)`` or None.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU) or "relu" (ReGLU).
        dropout_p, training, residual, recompute: as in :func:`feed_forward`; dropout follows the product.

    Returns:
        ``(*, E_out)``.

    Raises:
        TypeError, ValueError: arguments that do not fit, naming the argument.
    """
    names = ("w_gate", "b_gate", "w_up", "b_up", "w_down", "b_down")
    p = float(dropout_p) if training else 0.0
    weights = (w_gate, b_gate, w_up, b_up, w_down, b_down)
    return _run(x, weights, names, activation, dropout_p, p, residual, recompute)


# The six tensors of a block travel together: first weight and bias, the gated form's second ones or None, last ones.
_Weights = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None]


def _run(
    x: Tensor,
    weights: _Weights,
    names: tuple[str, ...],
    activation: str,
    dropout_p: float,
    p: float,
    residual: Tensor | None,
    recompute: bool,
) -> Tensor:
    _check(x, weights, names, activation, dropout_p, residual)
    w1, b1, w_up, b_up, w2, b2 = weights
    recorded = needs_grad(x, *weights, residual)
    if through_operator(x, *weights, residual) or _autocast(x):
        seed = new_seed() if p > 0 else None
        if recompute and recorded and not transforming():
            return checkpoint(
                _composed, x, *weights, residual, activation, p, seed, use_reentrant=False, preserve_rng_state=False
            )
        return _composed(x, *weights, residual, activation, p, seed)
    number = int(new_seed()) if p > 0 else 0
    fused = linear_activation.select(x, w1, w_up, w2 if recorded else None)
    kernels = None if fused is not None and not recompute else act.select(x, b1, w_up, b_up, p)
    if recorded:
        return _FeedForward.apply(x, *weights, residual, activation, p, number, recompute, kernels, fused)
    rows, b1, b_up = x.reshape(-1, x.shape[-1]), _dense(b1), _dense(b_up)
    if fused is not None:
        activated = fused.forward(rows, w1, b1, w_up, b_up, activation, p, number, False)[0]
    else:
        assert kernels is not None
        gate, up, _ = _first(rows, w1, w_up)
        activated = kernels.forward(gate, b1, up, b_up, activation, p, number, gate)
    return _second(activated, w2, b2, residual, x)


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _check(
    x: Tensor,
    weights: _Weights,
    names: tuple[str, ...],
    activation: str,
    dropout_p: float,
    residual: Tensor | None,
) -> None:
    _checks.tensor("x", x)
    _checks.choice("activation", activation, act.ACTIVATIONS)
    _checks.probability("dropout_p", dropout_p)
    casting = _autocast(x)

    def like_x(name: str, t: Tensor | None) -> Tensor:
        _checks.tensor(name, t)
        assert t is not None
        _checks.same_device(name, t, "x", x)
        if not casting:
            _checks.same_dtype(name, t, "x", x)
        return t

    def matrix(i: int) -> Tensor:
        w = like_x(names[i], weights[i])
        if w.dim() != 2:
            raise ValueError(f"{names[i]}: shape {tuple(w.shape)} is not (out_features, in_features)")
        return w

    w1, w_up, w2 = matrix(0), matrix(2) if names[2] else None, matrix(4)
    if x.dim() == 0 or x.shape[-1] != w1.shape[1]:
        raise ValueError(f"{names[0]}: {w1.shape[1]} input features are not x's {tuple(x.shape[-1:])}")
    if w_up is not None and w_up.shape != w1.shape:
        raise ValueError(f"{names[2]}: shape {tuple(w_up.shape)} is not {names[0]}'s {tuple(w1.shape)}")
    if w2.shape[1] != w1.shape[0]:
        raise ValueError(f"{names[4]}: {w2.shape[1]} input features are not {names[0]}'s {w1.shape[0]} output features")
    for name, b, w in zip(names[1::2], weights[1::2], (w1, w_up, w2), strict=True):
        if b is not None and w is not None and like_x(name, b).shape != w.shape[:1]:
            raise ValueError(f"{name}: shape {tuple(b.shape)} is not ({w.shape[0]},)")
    if residual is not None:
        like_x("residual", residual)
        if residual.shape != (*x.shape[:-1], w2.shape[0]):
            raise ValueError(
                f"residual: shape {tuple(residual.shape)} is not the result's {(*x.shape[:-1], w2.shape[0])}"
            )


def _composed(x, w1, b1, w_up, b_up, w2, b2, residual, activation, p, seed):
    """The block as operations that torch.compile, autocast and torch.func can see."""
    hidden, up = linear(x, w1), None if w_up is None else linear(x, w_up)
    b1, b_up = (None if b is None else b.to(hidden.dtype) for b in (b1, b_up))
    out = linear(act.apply(hidden, b1, up, b_up, activation, p, seed), w2, b2)
    return out if residual is None else residual + out


def _separate(x, w1, b1, w2, b2, residual, activation):
    """The block of few elements as three calls, which take less Python than one with buffers of its own. What the
    matmuls do not check themselves is checked here: anything but the right shapes raises."""
    (hidden, _), (width, _) = w1.shape, w2.shape
    fits = activation in act.ACTIVATIONS and (b1 is None or b1.shape == (hidden,))
    fits = fits and (b2 is None or b2.shape == (width,)) and x.dim() > 0 and len(x) > 0
    if not fits or not registry.prefers_torch("feed_forward", x.numel() // x.shape[-1] * hidden):
        raise ValueError
    out = linear(act.elementwise(linear(x, w1, b1), activation), w2, b2)
    if residual is None:
        return out
    if residual.shape != out.shape or residual.dtype != out.dtype:
        raise ValueError
    return residual + out


# ---- the pieces of an eager call -------------------------------------------------------------------------------------


def _dense(b: Tensor | None) -> Tensor | None:
    return None if b is None else b.contiguous()


def _first(rows: Tensor, w1: Tensor, w_up: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """rows ``(N, E)`` times w1^T and w_up^T, ``(N, F)`` each, and the ``(N, 2 F)`` whose halves they are, if so."""
    both = joined(w1, w_up)
    if both is not None:
        return _halves(mm(rows, both.t()))
    return mm(rows, w1.t()), None if w_up is None else mm(rows, w_up.t()), None


def _halves(whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    half = whole.shape[1] // 2
    return whole[:, :half], whole[:, half:], whole


def _second(activated: Tensor, w2: Tensor, b2: Tensor | None, residual: Tensor | None, x: Tensor) -> Tensor:
    """activated w2^T + b2 + residual in x's leading shape; what is added is what the matmul starts from."""
    out, start = None, b2
    if residual is not None:
        start = residual.reshape(activated.shape[0], w2.shape[0])
        if b2 is not None:
            start = out = torch.add(start, b2, out=empty_if_large(start, *start.shape))
    out = mm(activated, w2.t()) if start is None else addmm(start, activated, w2.t(), out)
    return out.view(*x.shape[:-1], w2.shape[0])


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w_up, b_up, w2, b2, residual, activation, p, seed, recompute, kernels, fused):
        rows, b1, b_up = x.reshape(-1, x.shape[-1]), _dense(b1), _dense(b_up)
        # relu's slope can be read from its result, so its argument need not be kept.
        ctx.from_result = activation == "relu" and w_up is None and not recompute
        in_place = recompute or ctx.from_result
        if fused is not None:
            activated, gate, up = fused.forward(rows, w1, b1, w_up, b_up, activation, p, seed, not in_place)
        else:
            gate, up, _ = _first(rows, w1, w_up)
            activated = kernels.forward(
                gate, b1, up, b_up, activation, p, seed, gate if in_place else empty(gate, *gate.shape)
            )
        kept = (None, None, None) if recompute else (None if in_place else gate, up, activated)
        ctx.save_for_backward(rows, w1, b1, w_up, b_up, w2, *kept)
        ctx.rest, ctx.recompute, ctx.kernels = (activation, p, seed), recompute, kernels
        ctx.fused = None if recompute else fused
        return _second(activated, w2, b2, residual, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        rows, w1, b1, w_up, b_up, w2, gate, up, activated = ctx.saved_tensors
        need_x, need_w1, need_b1, need_w_up, need_b_up, need_w2, need_b2, need_residual = ctx.needs_input_grad[:8]
        dy = dout.reshape(-1, w2.shape[0])
        dx = dw1 = db1 = dw_up = db_up = dw2 = None
        if need_x or need_w1 or need_b1 or need_w_up or need_b_up or (need_w2 and ctx.recompute):
            # What is in dgate first, the pass below replaces.
            dgate, dup, whole = mm(dy, w2) if ctx.fused is None else empty(dy, len(rows), len(w1)), None, None
            again = None
            if ctx.recompute:
                gate, up, whole = _first(rows, w1, w_up)
                again = activated = empty(gate, *gate.shape)
            elif ctx.from_result:
                gate, b1 = activated, None
            dactivated = dgate
            if up is not None:
                if not ctx.recompute and joined(w1, w_up) is not None:
                    dgate, dup, whole = _halves(empty(dgate, len(rows), 2 * len(w1)))
                elif ctx.recompute:
                    dgate, dup = gate, up
            if ctx.fused is not None:
                dup = torch.empty_like(dgate) if up is not None and dup is None else dup
                db1, db_up = ctx.fused.backward(dy, w2, gate, b1, up, b_up, *ctx.rest, need_b1, need_b_up, dgate, dup)
            else:
                dgate, dup, db1, db_up = ctx.kernels.backward(
                    dactivated, gate, b1, up, b_up, *ctx.rest, need_b1, need_b_up, dgate, dup, again
                )
            if whole is not None:
                both = joined(w1, w_up)
                if need_w1 or need_w_up:
                    dw = mm(whole.t(), rows)
                    dw1, dw_up = dw[: len(w1)], dw[len(w1) :]
                dx = mm(whole, both) if need_x else None
            else:
                dw1 = weight_grad(dgate, rows, w1) if need_w1 else None
                dw_up = weight_grad(dup, rows, w_up) if need_w_up else None
                if need_x:
                    dx = mm(dgate, w1)
                    if dup is not None:
                        addmm(dx, dup, w_up, dx)
            dx = dx if dx is None else dx.view(*dout.shape[:-1], w1.shape[1])
        if need_w2:
            dw2 = weight_grad(dy, activated, w2)
        db2 = dy.sum(0) if need_b2 else None
        dresidual = dout if need_residual else None
        return dx, dw1, db1, dw_up, db_up, dw2, db2, dresidual, None, None, None, None, None, None
