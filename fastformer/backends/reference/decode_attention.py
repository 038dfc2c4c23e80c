"""Attention of a few new queries against a key/value cache in plain PyTorch, one sequence at a time.

csrc/include/fastformer.h has the formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_options import DecodeOptions, acc_dtype, empty_out

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
FEATURES: frozenset[str] = frozenset()


def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, options: DecodeOptions
) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Sq, D) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq) acc.

    k_cache is (rows, Hkv, capacity, D), or (pages, Hkv, page_size, D) with a page table.
    """
    scale, causal, window_left, window_right, softcap, slopes, page_table, cache_batch_idx, cache_leftpad = options
    acc, (batch, heads, queries, _) = acc_dtype(q.dtype), q.shape
    out, lse = empty_out(q, v_cache), torch.empty(q.shape[:3], dtype=acc, device=q.device)
    lengths = cache_seqlens.tolist()
    rows = range(batch) if cache_batch_idx is None else cache_batch_idx.tolist()
    begins = [0] * batch if cache_leftpad is None else cache_leftpad.tolist()
    for b, (row, begin, length) in enumerate(zip(rows, begins, lengths)):
        k, v = (
            _keys(cache, row, None if page_table is None else page_table[b], begin, length).to(acc)
            .repeat_interleave(heads // cache.shape[1], 0)
            for cache in (k_cache, v_cache)
        )  # fmt: skip
        position = torch.arange(length - queries, length, device=q.device)
        distance = torch.arange(begin, length, device=q.device) - position[:, None]
        scores = q[b].to(acc) @ k.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores = scores - slopes[b if len(slopes) > 1 else 0].to(acc)[:, None, None] * distance.abs()
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= distance > 0
        if window_left >= 0:
            hidden |= distance < -window_left
        if window_right >= 0:
            hidden |= distance > window_right
        scores = scores.masked_fill(hidden, float("-inf"))
        lse[b] = torch.logsumexp(scores, 2)
        p = torch.exp(scores - torch.where(torch.isneginf(lse[b]), 0.0, lse[b])[..., None])
        out[b] = (p @ v).to(q.dtype)
    return out, lse


def _keys(cache: Tensor, row: int, pages: Tensor | None, begin: int, length: int) -> Tensor:
    """(Hkv, length - begin, D) of one sequence."""
    if pages is None:
        return cache[row, :, begin:length]
    page_size = cache.shape[2]
    used = pages[: -(-length // page_size)].long()
    used = torch.where(torch.arange(len(used), device=used.device) < begin // page_size, 0, used)  # holds no key
    return cache[used].transpose(0, 1).flatten(1, 2)[:, begin:length]
