"""Cross-entropy of linear(x, w, bias) in plain PyTorch, all logits at once; the formula is in
csrc/include/fastformer.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cross_entropy
from .cross_entropy import DTYPES as DTYPES

FEATURES = cross_entropy.FEATURES | {"z_loss"}
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """x (rows, features), w (classes, features), target (rows) -> loss (rows) acc, lse (rows) acc."""
    logits = torch.nn.functional.linear(x, w, bias)
    loss, lse = cross_entropy.forward(logits, target, weight, ignore_index, label_smoothing)
    if z_loss:
        loss = loss + torch.where(target != ignore_index, z_loss * lse.square(), 0.0)
    return loss, lse


def backward(
    dloss: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float = 0.0,
    needs: Sequence[bool] = (True, True, True),
) -> Gradients:
    """dloss (rows) acc -> the gradients of x, w and bias that ``needs`` asks for, else None."""
    logits = torch.nn.functional.linear(x, w, bias)
    dlogits = cross_entropy.backward(dloss, logits, target, weight, lse, ignore_index, label_smoothing)
    if z_loss:
        of_lse = torch.where(target != ignore_index, 2 * z_loss * lse * dloss, 0.0)[:, None]
        dlogits = (dlogits + of_lse * torch.exp(logits - lse[:, None])).to(logits.dtype)
    return (
        dlogits @ w if needs[0] else None,
        dlogits.t() @ x if needs[1] else None,
        dlogits.sum(0) if needs[2] and bias is not None else None,
    )


def loss_and_gradients(
    dloss: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float = 0.0,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[Tensor, Gradients]:
    """Both directions: loss (rows) acc, and the gradients of sum(dloss * loss)."""
    loss, lse = forward(x, w, bias, target, weight, ignore_index, label_smoothing, z_loss)
    options = (ignore_index, label_smoothing, z_loss)
    return loss, backward(dloss, x, w, bias, target, weight, lse, *options, needs)


def scale(gradients: Gradients, dloss: Tensor) -> Gradients:
    """The gradients times one number."""
    dx, dw, dbias = (None if g is None else (g * dloss).to(g.dtype) for g in gradients)
    return dx, dw, dbias
