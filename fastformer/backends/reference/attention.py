"""Scaled dot-product attention (Vaswani et al. 2017, equation 1) in plain PyTorch, with the whole score matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_norm import acc_dtype

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
FEATURES = frozenset({"causal", "key_padding_mask", "grouped_heads"})


def _visible(q: Tensor, k: Tensor, causal: bool, key_padding_mask: Tensor | None) -> Tensor:
    """Boolean, broadcastable to (B, Hq, Sq, Sk): True where a query may look."""
    sq, sk = q.shape[2], k.shape[2]
    visible = torch.ones(1, 1, sq, sk, dtype=torch.bool, device=q.device)
    if causal:  # aligned at the bottom right: query i sits at i + Sk - Sq
        visible = visible.tril(sk - sq)
    if key_padding_mask is not None:
        visible = visible & ~key_padding_mask.to(torch.bool)[:, None, None, :]
    return visible


def _scores(
    q: Tensor, k: Tensor, scale: float, causal: bool, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    acc = acc_dtype(q.dtype)
    k = k.to(acc).repeat_interleave(q.shape[1] // k.shape[1], 1)
    visible = _visible(q, k, causal, key_padding_mask)
    scores = (q.to(acc) @ k.transpose(2, 3) * scale).masked_fill(~visible, float("-inf"))
    return scores, torch.logsumexp(scores, 3), k


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq) acc.

    key_padding_mask (B, Sk) bool, True = ignored. A query that sees no key gives zeros and lse = -inf. ``out`` lies in
    memory as (B, Sq, Hq, Dv), so that merging the heads afterwards is a view.
    """
    scores, lse, _ = _scores(q, k, scale, causal, key_padding_mask)
    p = torch.exp(scores - torch.where(torch.isneginf(lse), 0.0, lse)[..., None])
    out = p @ v.to(p.dtype).repeat_interleave(q.shape[1] // v.shape[1], 1)
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    key_padding_mask: Tensor | None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, written into dq, dk, dv where given (any strides with a contiguous last dimension)."""
    groups = q.shape[1] // k.shape[1]
    scores, _, kr = _scores(q, k, scale, causal, key_padding_mask)
    acc = scores.dtype
    vr = v.to(acc).repeat_interleave(groups, 1)
    p = torch.exp(scores - torch.where(torch.isneginf(lse), 0.0, lse)[..., None])
    do = dout.to(acc)
    dvr = p.transpose(2, 3) @ do
    delta = (do * out.to(acc)).sum(3, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.to(acc)[..., None]
    ds = p * (do @ vr.transpose(2, 3) - delta) * scale
    grad_q = ds @ kr
    dkr = ds.transpose(2, 3) @ q.to(acc)
    fold = lambda t: t.unflatten(1, (k.shape[1], groups)).sum(2)  # noqa: E731
    results = []
    for grad, buffer, like in ((grad_q, dq, q), (fold(dkr), dk, k), (fold(dvr), dv, v)):
        results.append(grad.to(like.dtype) if buffer is None else buffer.copy_(grad))
    return results[0], results[1], results[2]
