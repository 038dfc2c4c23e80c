"""The functions of the ``flash_attn`` package, version 2, with its signatures and conventions, on fastformer's kernels.

``from flash_attn import flash_attn_func`` becomes ``from fastformer.integrations.flash_attn import flash_attn_func``.
Tensors are ``(batch, seqlen, nheads, headdim)``, or packed ``(total, nheads, headdim)``; causal, windows and ALiBi are
aligned at the bottom right; a query that sees no key gives zeros. What the package refuses works here too: CPU tensors,
float32 (and float64 on the CPU), any head size up to 256, any page size, ``cache_leftpad`` with pages. The argument
``deterministic`` is accepted and changes nothing: gradients repeat bit for bit in any case.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import attention, attention_qkvpacked, attention_varlen, decode_attention, update_kv_cache
from ..functional._doors import needs_grad
from ..functional.attention import check_window
from ..functional.attention_varlen import check_cu_seqlens

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

# From this many rows of scores per key/value head on, attention's matrix products beat reading the cache as it lies.
MANY_ROWS = 64


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """softmax(softmax_scale q k^T) v with everything that :func:`fastformer.functional.attention` can add to it.

    Args:
        q: ``(B, Sq, Hq, D)``.
        k, v: ``(B, Sk, Hkv, D)``, Hq a multiple of Hkv.
        dropout_p: probability of dropping a weight; as in the package there is no ``training``, pass 0 in evaluation.
        softmax_scale: default 1 / sqrt(D).
        causal: query i sees keys j <= i + Sk - Sq.
        window_size: (left, right): query i sees keys i + Sk - Sq - left ... i + Sk - Sq + right; -1 = unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0 = no cap.
        alibi_slopes: ``(Hq)`` or ``(B, Hq)``: -slope * |i + Sk - Sq - j| is added.
        deterministic: accepted, see above.
        return_attn_probs: return (out, softmax_lse, None). The package fills the third for its own tests only.

    Returns:
        ``(B, Sq, Hq, D)``; softmax_lse is ``(B, Hq, Sq)`` float32, and has a gradient here.
    """
    out, lse = attention(
        *(t.transpose(1, 2) for t in _dimensions(4, q=q, k=k, v=v)),
        causal=causal,
        scale=softmax_scale,
        window=window_size,
        softcap=max(softcap, 0.0),
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        return_lse=True,
    )
    out = out.transpose(1, 2)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` of ``(B, S, 3, H, D)``."""
    _packed("qkv", qkv, 5, 3)
    if tuple(window_size) == (-1, -1) and softcap <= 0 and alibi_slopes is None and not return_attn_probs:
        return attention_qkvpacked(qkv, causal=causal, scale=softmax_scale, dropout_p=dropout_p)  # one fused gradient
    more = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(*qkv.unbind(2), *more)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` with keys and values in one ``(B, Sk, 2, Hkv, D)``."""
    _packed("kv", kv, 5, 2)
    more = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(q, *kv.unbind(2), *more)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """:func:`flash_attn_func` within each of N sequences that are packed end to end.

    Args:
        q: ``(total_q, Hq, D)``.
        k, v: ``(total_k, Hkv, D)``; with a block_table the pages ``(pages, page_size, Hkv, D)``.
        cu_seqlens_q, cu_seqlens_k: ``(N + 1)`` int32, where each sequence begins, and the end.
        max_seqlen_q, max_seqlen_k: the longest sequence, or more.
        block_table: ``(N, pages of a sequence)`` int32: key j of sequence n is position j % page_size of page
            block_table[n, j // page_size]. The keys are gathered first.

    Returns:
        ``(total_q, Hq, D)``; softmax_lse is ``(Hq, total_q)``.
    """
    _dimensions(3, q=q)
    if block_table is None:
        _dimensions(3, k=k, v=v)
    else:
        _dimensions(4, k=k, v=v)
        index = _page_index(k, cu_seqlens_k, block_table)
        k, v = (t.flatten(0, 1)[index] for t in (k, v))
    out, lse = attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=causal,
        scale=softmax_scale,
        window=window_size,
        softcap=max(softcap, 0.0),
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        return_lse=True,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` of ``(total, 3, H, D)``."""
    _packed("qkv", qkv, 4, 3)
    more = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_varlen_func(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *more)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` with keys and values in one ``(total_k, 2, Hkv, D)``."""
    _packed("kv", kv, 4, 2)
    more = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return flash_attn_varlen_func(q, *kv.unbind(1), *ends, *more)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Appends new keys and values to a cache, in place, and attends to all of it. No gradients.

    Args:
        q: ``(B, Sq, Hq, D)``.
        k_cache, v_cache: ``(rows, capacity, Hkv, D)``, or with a block_table ``(pages, page_size, Hkv, D)``; the last
            dimension is contiguous.
        k, v: ``(B, S_new, Hkv, D)`` to write at positions cache_seqlens ... cache_seqlens + S_new - 1, or None.
        rotary_cos, rotary_sin: ``(positions, rotary_dim / 2)``: k is rotated by the angles of the positions it gets;
            q, under ``causal`` or a window, by those of cache_seqlens, cache_seqlens + 1, ..., otherwise by that of
            cache_seqlens. Dimensions from rotary_dim on stay as they are. Only together with k and v.
        cache_seqlens: keys there are before the new ones: an int, ``(B)`` int32, or None, which is all of the cache.
        cache_batch_idx: ``(B)`` int32, the row of the cache that each sequence has; default 0, 1, ...
        cache_leftpad: ``(B)`` int32, where each sequence begins in its row; default 0. Positions count from the row's
            start.
        block_table: ``(B, pages of a sequence)`` int32.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in :func:`flash_attn_func`.
        rotary_interleaved: rotate dimensions 0 and 1, 2 and 3, ... together; else 0 and rotary_dim / 2, ...
        num_splits: accepted; how a sequence is cut is chosen by the kernels.
        return_softmax_lse: return (out, softmax_lse).

    Returns:
        ``(B, Sq, Hq, D)``; softmax_lse is ``(B, Hq, Sq)`` float32.
    """
    _dimensions(4, q=q, k_cache=k_cache, v_cache=v_cache)
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if t is not None and needs_grad(t):
            raise ValueError(f"{name}: requires a gradient, and a cache has none; call it under torch.no_grad()")
    batch, device = q.shape[0], q.device
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    known = None  # the length of every sequence, where the host knows it
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens: has to be given together with k and v")
        cache_seqlens = capacity
    if isinstance(cache_seqlens, int):
        known = cache_seqlens
        if not 0 <= known <= capacity:
            raise ValueError(f"cache_seqlens: {known} is not in [0, {capacity}]")
        cache_seqlens = torch.full((batch,), known, dtype=torch.int32, device=device)
    heads_first = [t.transpose(1, 2) for t in (k_cache, v_cache)]
    if (k is None) != (v is None):
        raise ValueError(f"{'k' if k is None else 'v'}: has to be given together with {'v' if k is None else 'k'}")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos, rotary_sin: have to be given together")
    if k is None or v is None:
        if rotary_cos is not None:
            raise ValueError("rotary_cos: has to be given together with k and v")
    else:
        _dimensions(4, k=k, v=v)
        if rotary_cos is not None and rotary_sin is not None:
            new, queries = (torch.arange(t.shape[1], device=device) for t in (k, q))
            local = causal or check_window(window_size) != (-1, -1)
            start = cache_seqlens[:, None].long()
            k = _rotate("k", k, start + new, rotary_cos, rotary_sin, rotary_interleaved)
            q = _rotate("q", q, start + (queries if local else 0 * queries), rotary_cos, rotary_sin, rotary_interleaved)
        new_heads_first = [t.transpose(1, 2) for t in (k, v)]
        update_kv_cache(*heads_first, *new_heads_first, cache_seqlens, block_table, cache_batch_idx)
        cache_seqlens = cache_seqlens + k.shape[1]
        known = None if known is None else known + k.shape[1]
    options = {
        "causal": causal,
        "scale": softmax_scale,
        "window": window_size,
        "softcap": max(softcap, 0.0),
        "alibi_slopes": alibi_slopes,
        "return_lse": True,
    }
    rows = q.shape[1] * q.shape[2] // max(k_cache.shape[2], 1)
    plain = block_table is None and cache_batch_idx is None and cache_leftpad is None and k_cache.shape[0] >= batch
    if known is not None and plain and rows >= MANY_ROWS:
        out, lse = attention(q.transpose(1, 2), *(t[:batch, :, :known] for t in heads_first), **options)
    else:
        where = {"page_table": block_table, "cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}
        out, lse = decode_attention(q.transpose(1, 2), *heads_first, cache_seqlens, **options, **where)
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _dimensions(n: int, **tensors: Tensor) -> tuple[Tensor, ...]:
    expected = {3: "(total, nheads, headdim)", 4: "(batch, seqlen, nheads, headdim)"}[n]
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        if t.dim() != n:
            raise ValueError(f"{name}: shape {tuple(t.shape)} is not {expected}")
    return tuple(tensors.values())


def _packed(name: str, t: Tensor, dim: int, of: int) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.dim() != dim or t.shape[dim - 3] != of:
        lead = "batch, seqlen" if dim == 5 else "total"
        raise ValueError(f"{name}: shape {tuple(t.shape)} is not ({lead}, {of}, nheads, headdim)")


def _page_index(k: Tensor, cu_seqlens_k: Tensor, block_table: Tensor) -> Tensor:
    """(total_k) int64: where each packed key is among the pages' positions."""
    pages, size = k.shape[:2]
    if not isinstance(block_table, Tensor) or block_table.dtype != torch.int32 or block_table.dim() != 2:
        raise TypeError("block_table: expected an int32 tensor (sequences, pages of a sequence)")
    if len(block_table) != len(cu_seqlens_k) - 1:
        raise ValueError(f"block_table: {len(block_table)} rows, but cu_seqlens_k has {len(cu_seqlens_k)} entries")
    total = int(cu_seqlens_k[-1])
    longest = check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.new_empty((total, 0)), "k") or 0
    if longest > block_table.shape[1] * size:
        raise ValueError(f"cu_seqlens_k: a sequence of {longest} keys has room for {block_table.shape[1] * size}")
    lengths = (cu_seqlens_k[1:] - cu_seqlens_k[:-1]).long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=k.device), lengths, output_size=total)
    position = torch.arange(total, device=k.device) - cu_seqlens_k[:-1].long()[sequence]
    page = block_table[sequence, position // size].long()
    if page.device.type == "cpu" and total and not (0 <= int(page.min()) and int(page.max()) < pages):
        raise ValueError(f"block_table: a page in use is not in [0, {pages})")
    return page * size + position % size


def _rotate(name: str, x: Tensor, position: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864, section 3.2.2) of x (B, S, H, D) at position (B, S)."""
    half = cos.shape[-1]
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(
            f"rotary_cos, rotary_sin: shapes {tuple(cos.shape)}, {tuple(sin.shape)} are not one (S, D / 2)"
        )
    if 2 * half > x.shape[3]:
        raise ValueError(f"rotary_cos: rotates {2 * half} dimensions, but {name} has {x.shape[3]}")
    if position.device.type == "cpu" and position.numel() and int(position.max()) >= len(cos):
        raise ValueError(f"rotary_cos: has {len(cos)} positions, but {name} needs {int(position.max()) + 1}")
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    c, s = (t[position][:, :, None].to(acc) for t in (cos, sin))
    turned = x[..., : 2 * half].to(acc)
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    parts = first * c - second * s, first * s + second * c
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), -1)
