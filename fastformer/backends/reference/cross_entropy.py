"""Cross-entropy per row, in plain PyTorch; the formula is in csrc/include/fastformer.h."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_norm import acc_dtype

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
FEATURES = frozenset({"weight", "label_smoothing", "z_loss", "probabilities"})


def gradient_in_forward(cols: int, dtype: torch.dtype) -> bool:
    """Whether writing the gradient of rows of ``cols`` logits in the forward pass is the faster way."""
    return False


def forward(
    logits: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float = 0.0,
    probabilities: Tensor | None = None,
    dloss: Tensor | None = None,
    dlogits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """logits (rows, cols) -> loss (rows) acc, lse (rows) acc.

    Args:
        target: (rows) int64, or None where there are probabilities.
        weight: (cols) acc or None.
        probabilities: (rows, cols) in the dtype of logits, or None.
        dloss, dlogits: (rows) acc, an expanded scalar is fine, and (rows, cols) for the gradient; both or neither.
    """
    z = logits.to(acc_dtype(logits.dtype))
    lse = torch.logsumexp(z, 1)
    w = None if weight is None else weight.to(z.dtype)
    if probabilities is not None:
        loss = (_smoothed(probabilities.to(z.dtype), w, label_smoothing) * (lse[:, None] - z)).sum(1)
        loss = loss + z_loss * lse**2
    else:
        assert target is not None
        valid = target != ignore_index
        safe = torch.where(valid, target, 0)
        nll = lse - z.gather(1, safe[:, None])[:, 0]
        if w is not None:
            nll = nll * w[safe]
        loss = (1 - label_smoothing) * nll
        if label_smoothing > 0:
            loss = loss + label_smoothing / z.shape[1] * ((lse[:, None] - z) * (1.0 if w is None else w)).sum(1)
        loss = torch.where(valid, loss + z_loss * lse**2, 0.0)
    if dlogits is not None:
        assert dloss is not None
        if target is not None:
            gradient = backward(dloss, logits, target, weight, lse, ignore_index, label_smoothing, z_loss)
        elif probabilities is not None:
            gradient, _ = backward_probabilities(dloss, logits, probabilities, weight, label_smoothing, z_loss, False)
        dlogits.copy_(gradient)
    return loss, lse


def backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float = 0.0,
) -> Tensor:
    """dloss (rows) acc (an expanded scalar is fine) -> dlogits (rows, cols) in the dtype of logits."""
    z = logits.to(acc_dtype(logits.dtype))
    p = torch.exp(z - lse[:, None])
    valid = target != ignore_index
    safe = torch.where(valid, target, 0)
    one_hot = torch.zeros_like(z).scatter_(1, safe[:, None], 1.0)
    w = z.new_ones(z.shape[1]) if weight is None else weight
    grad = (1 - label_smoothing) * w[safe][:, None] * (p - one_hot)
    if label_smoothing > 0:
        grad = grad + label_smoothing / z.shape[1] * (p * w.sum() - w)
    if z_loss != 0:
        grad = grad + 2 * z_loss * lse[:, None] * p
    return torch.where(valid[:, None], grad * dloss[:, None], 0.0).to(logits.dtype)


def backward_probabilities(
    dloss: Tensor,
    logits: Tensor,
    probabilities: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    z_loss: float = 0.0,
    need_dprobabilities: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """dloss (rows) acc -> dlogits, and dprobabilities (or None), both (rows, cols) in the dtype of logits."""
    z = logits.to(acc_dtype(logits.dtype))
    log_p = torch.log_softmax(z, 1)
    q = _smoothed(probabilities.to(z.dtype), weight, label_smoothing)
    lse = torch.logsumexp(z, 1, keepdim=True)
    dlogits = ((q.sum(1, keepdim=True) + 2 * z_loss * lse) * log_p.exp() - q) * dloss[:, None]
    if not need_dprobabilities:
        return dlogits.to(logits.dtype), None
    dq = (label_smoothing - 1) * log_p * (1.0 if weight is None else weight) * dloss[:, None]
    return dlogits.to(logits.dtype), dq.to(logits.dtype)


def _smoothed(q: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
    """The weight of each class's term: ((1 - s) q + s / V) w."""
    q = (1 - label_smoothing) * q + label_smoothing / q.shape[1]
    return q if weight is None else q * weight
