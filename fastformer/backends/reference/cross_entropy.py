"""Cross-entropy of class indices, per row, in plain PyTorch; the formula is in csrc/include/fastformer.h."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_norm import acc_dtype

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
FEATURES = frozenset({"weight", "label_smoothing"})


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """logits (rows, cols), target (rows) int64, weight (cols) acc or None -> loss (rows) acc, lse (rows) acc."""
    z = logits.to(acc_dtype(logits.dtype))
    lse = torch.logsumexp(z, 1)
    valid = target != ignore_index
    safe = torch.where(valid, target, 0)
    nll = lse - z.gather(1, safe[:, None])[:, 0]
    if weight is not None:
        nll = nll * weight[safe]
    loss = (1 - label_smoothing) * nll
    if label_smoothing > 0:
        w = z.new_ones(z.shape[1]) if weight is None else weight
        loss = loss + label_smoothing / z.shape[1] * ((lse[:, None] - z) * w).sum(1)
    return torch.where(valid, loss, 0.0), lse


def backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """dloss (rows) acc (an expanded scalar is fine) -> dlogits (rows, cols) in the dtype of logits."""
    z = logits.to(acc_dtype(logits.dtype))
    probability = torch.exp(z - lse[:, None])
    valid = target != ignore_index
    safe = torch.where(valid, target, 0)
    one_hot = torch.zeros_like(z).scatter_(1, safe[:, None], 1.0)
    w = z.new_ones(z.shape[1]) if weight is None else weight
    grad = (1 - label_smoothing) * w[safe][:, None] * (probability - one_hot)
    if label_smoothing > 0:
        grad = grad + label_smoothing / z.shape[1] * (probability * w.sum() - w)
    return torch.where(valid[:, None], grad * dloss[:, None], 0.0).to(logits.dtype)
