"""Cross-entropy of x w^T + bias in plain PyTorch, all logits at once; the formula is in csrc/include/fastformer.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cross_entropy
from .cross_entropy import DTYPES as DTYPES

FEATURES = cross_entropy.FEATURES - {"probabilities"}


def forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float = 0.0,
) -> Tensor:
    """x (rows, features), w (classes, features), bias (classes), target (rows), weight (classes) acc -> loss (rows)."""
    logits = torch.nn.functional.linear(x, w, bias)
    return cross_entropy.forward(logits, target, weight, ignore_index, label_smoothing, z_loss)[0]


def backward(
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
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """dloss (rows) acc -> loss (rows) acc, and the gradients of x, w and bias that ``needs`` asks for, else None."""
    options = (ignore_index, label_smoothing, z_loss)
    logits = torch.nn.functional.linear(x, w, bias)
    loss, lse = cross_entropy.forward(logits, target, weight, *options)
    dlogits = cross_entropy.backward(dloss, logits, target, weight, lse, *options)
    dx = dlogits @ w if needs[0] else None
    dw = dlogits.t() @ x if needs[1] else None
    return loss, (dx, dw, dlogits.sum(0) if needs[2] and bias is not None else None)


def scale(
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None], dloss: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients times one number."""
    dx, dw, dbias = (None if g is None else (g * dloss).to(g.dtype) for g in gradients)
    return dx, dw, dbias
