"""Attention written out, in the dtype of its arguments: what the tests of every attention function compare with."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


def attention_formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    relative_bias: tuple[Tensor, bool, int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    queries, keys = scores.shape[2:]
    distance = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
    if bias is not None:
        scores = scores + bias
    if relative_bias is not None:
        table, bidirectional, num_buckets, max_distance = relative_bias
        buckets = torch.tensor(
            [t5_bucket(d, bidirectional, num_buckets, max_distance) for d in distance.flatten().tolist()],
            dtype=torch.long,
        )
        scores = scores + table[buckets.view(queries, keys)].permute(2, 0, 1)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype).view(-1, q.shape[1], 1, 1) * distance.abs()
    visible = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        visible &= distance <= 0
    if window[0] >= 0:
        visible &= distance >= -window[0]
    if window[1] >= 0:
        visible &= distance <= window[1]
    if key_padding_mask is not None:
        visible &= ~key_padding_mask[:, None, None, :]
    if attn_mask is not None:
        visible &= attn_mask
    scores = scores.masked_fill(~visible, -math.inf)
    nothing = torch.isneginf(scores).all(3, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), 3).masked_fill(nothing, 0.0)
    out = weights @ v
    if not return_lse:
        return out
    lse = torch.logsumexp(scores.masked_fill(nothing, 0.0), 3).masked_fill(nothing[..., 0], -math.inf)
    return out, lse


@cache
def t5_bucket(distance: int, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """T5's bucket of one distance (Raffel et al. 2020), by scalar arithmetic, the logarithm in float32 as T5's is."""
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    ratio = torch.log(torch.tensor(distance, dtype=torch.float32) / exact) / math.log(max_distance / exact)
    return first + min(num_buckets - 1, exact + int(ratio * (num_buckets - exact)))
