"""One step of generation: attention of a few new queries against a cache of keys and values.

The cost is reading the cache once, so the kernels take it as it lies, contiguous or in pages (Kwon et al. 2023,
arXiv:2309.06180), let all query heads that share a key/value head share what is read, and cut a long sequence into
parts that run side by side and are merged by their log-sum-exps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..backends import registry
from ..backends.attention_options import DecodeOptions, acc_dtype, empty_out
from . import _checks
from ._doors import needs_grad, operator, register, through_operator
from .attention import MAX_HEAD_DIM, check_slopes, check_softcap, check_window, default_scale


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    page_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last Sq positions of each sequence against its cache, without gradients.

    Args:
        q: ``(B, Hq, Sq, D)``, D from 1 to 256; float32, bfloat16, float16 or (CPU) float64. Query i of sequence b sits
            at position cache_seqlens[b] - Sq + i: its own key is in the cache already (:func:`update_kv_cache`).
        k_cache: ``(rows, Hkv, capacity, D)``, or with a page table ``(pages, Hkv, page_size, D)``; any strides with a
            contiguous last dimension. Hq is a multiple of Hkv: query head h reads key/value head h // (Hq / Hkv).
        v_cache: the same with Dv for D.
        cache_seqlens: ``(B)`` int32, valid keys of each sequence, those of the new positions included.
        causal, scale, window, softcap, alibi_slopes: as in :func:`attention`.
        page_table: ``(B, pages of a sequence)`` int32: key j of sequence b is position j % page_size of page
            page_table[b, j // page_size]. Entries behind a sequence's end are not looked at.
        cache_batch_idx: ``(B)`` int32, the row of the cache that sequence b has; default b. Not with a page table.
        cache_leftpad: ``(B)`` int32, keys before this index are not valid; default 0.
        return_lse: also return the log-sum-exp of the scores, ``(B, Hq, Sq)`` in float32 (float64 for float64).

    Returns:
        ``(B, Hq, Sq, Dv)`` in q's dtype, (B, Sq, Hq, Dv) in memory. A query that sees no key gives zeros (lse = -inf).
        On a CPU a sequence gives the same bits in any batch and at any number of threads.

    Raises:
        TypeError, ValueError: arguments that do not fit together, naming the argument, or a gradient is asked for.
            Lengths, rows and pages out of range are found at every call on a CPU. On a GPU, where looking means
            waiting, they are at the first call with those tensors; if they are changed in place to such values
            later, the sequence gives NaN.
    """
    capacity = _check(q, k_cache, v_cache, page_table)
    batch, heads = q.shape[:2]
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if needs_grad(t):
            raise ValueError(
                f"{name}: requires a gradient, and decode_attention has none; call it under torch.no_grad(), or use"
                " attention"
            )
    left, right = check_window(window)
    check_softcap(softcap)
    check_index("cache_seqlens", cache_seqlens, batch, q)
    if cache_batch_idx is not None:
        check_index("cache_batch_idx", cache_batch_idx, batch, q)
    elif page_table is None and k_cache.shape[0] < batch:
        raise ValueError(f"k_cache: {k_cache.shape[0]} rows are fewer than q's batch {batch}; give cache_batch_idx")
    if cache_leftpad is not None:
        check_index("cache_leftpad", cache_leftpad, batch, q)
    if page_table is not None and cache_batch_idx is not None:
        raise ValueError("cache_batch_idx: cannot be set together with page_table, which says where every key is")
    if alibi_slopes is not None:
        alibi_slopes = check_slopes(alibi_slopes, batch, heads, q)
    q = q if q.stride(3) == 1 else q.contiguous()
    lengths = cache_seqlens.contiguous()
    options = DecodeOptions(
        default_scale(scale, q),
        causal,
        left,
        right,
        softcap,
        alibi_slopes,
        page_table,
        None if cache_batch_idx is None else cache_batch_idx.contiguous(),
        None if cache_leftpad is None else cache_leftpad.contiguous(),
    )
    if through_operator(q, k_cache, v_cache, cache_seqlens, page_table):
        out, lse = operator("decode_attention", q, k_cache, v_cache, lengths, *options)
    else:
        kernels = registry.select("decode_attention", q.device.type, q.dtype)
        if q.device.type != "cpu" or not kernels.__name__.endswith(".cpu.decode_attention"):  # that one looks itself
            _look("cache_seqlens", cache_seqlens, 0, capacity, k_cache, page_table, cache_batch_idx, cache_leftpad)
        out, lse = kernels.forward(q, k_cache, v_cache, lengths, options)
    return (out, lse) if return_lse else out


def update_kv_cache(
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
) -> None:
    """Writes new keys and values into the cache, in place, at positions cache_seqlens[b] ... cache_seqlens[b] + S - 1.

    ``cache_seqlens`` itself is left as it is: add S to it afterwards, once for all layers.

    Args:
        k_cache, v_cache: ``(rows, Hkv, capacity, D)`` and Dv, or in pages; as in :func:`decode_attention`.
        k_new, v_new: ``(B, Hkv, S, D)`` and ``(B, Hkv, S, Dv)`` in the cache's dtype.
        cache_seqlens: ``(B)`` int32, keys that each sequence has so far.
        page_table, cache_batch_idx: as in :func:`decode_attention`; the pages of the new positions must be in the
            table. No two sequences may share a position.

    Raises:
        TypeError, ValueError: arguments that do not fit together, naming the argument; a sequence that would outgrow
            its row or its pages. As in :func:`decode_attention`, a GPU's values are looked at once per tensor.
    """
    for name, t in (("k_new", k_new), ("v_new", v_new)):
        _checks.tensor(name, t)
        if t.dim() != 4:
            raise ValueError(f"{name}: shape {tuple(t.shape)} is not (B, Hkv, S, D)")
    capacity = _check(k_new, k_cache, v_cache, page_table, "k_new")
    batch, heads, new, _ = k_new.shape
    if k_cache.shape[1] != heads:
        raise ValueError(f"k_new: {heads} heads are not k_cache's {k_cache.shape[1]}")
    if v_new.shape != (batch, heads, new, v_cache.shape[3]):
        raise ValueError(f"v_new: shape {tuple(v_new.shape)} is not {(batch, heads, new, v_cache.shape[3])}")
    _checks.same_dtype("v_new", v_new, "k_new", k_new)
    _checks.same_device("v_new", v_new, "k_new", k_new)
    check_index("cache_seqlens", cache_seqlens, batch, k_new)
    if cache_batch_idx is not None:
        check_index("cache_batch_idx", cache_batch_idx, batch, k_new)
        if page_table is not None:
            raise ValueError("cache_batch_idx: cannot be set together with page_table, which says where every key is")
    elif page_table is None and k_cache.shape[0] < batch:
        raise ValueError(f"k_cache: {k_cache.shape[0]} rows are fewer than k_new's batch {batch}; give cache_batch_idx")
    if not through_operator(k_new, k_cache, v_cache, cache_seqlens, page_table):
        _look("cache_seqlens", cache_seqlens, new, capacity, k_cache, page_table, cache_batch_idx, None)
    position = cache_seqlens[:, None].long() + torch.arange(new, device=k_new.device)
    if page_table is not None:
        page_size = k_cache.shape[2]
        row = page_table.long().gather(1, position // page_size)
        position = position % page_size
    elif cache_batch_idx is not None:
        row = cache_batch_idx.long()[:, None]
    else:
        row = torch.arange(batch, device=k_new.device)[:, None]
    k_cache[row, :, position] = k_new.transpose(1, 2)
    v_cache[row, :, position] = v_new.transpose(1, 2)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor | None, name: str = "q") -> int:
    """The number of keys a sequence has room for."""
    for n, t in ((name, q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.tensor(n, t)
        if t.dim() != 4:
            raise ValueError(f"{n}: shape {tuple(t.shape)} is not (B, H, S, D)")
        if not 1 <= t.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{n}: head_dim {t.shape[3]} is not in [1, {MAX_HEAD_DIM}]")
    for n, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.same_dtype(n, t, name, q)
        _checks.same_device(n, t, name, q)
        if t.stride(3) != 1 and t.shape[3] > 1:
            raise ValueError(f"{n}: its last dimension has stride {t.stride(3)}; expected 1")
    if k_cache.shape[3] != q.shape[3]:
        raise ValueError(f"k_cache: head_dim {k_cache.shape[3]} is not {name}'s {q.shape[3]}")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(f"v_cache: shape {tuple(v_cache.shape)} does not go with k_cache's {tuple(k_cache.shape)}")
    if name == "q" and (k_cache.shape[1] == 0 or q.shape[1] % k_cache.shape[1]):
        raise ValueError(f"k_cache: {k_cache.shape[1]} heads do not divide q's {q.shape[1]}")
    if page_table is None:
        return k_cache.shape[2]
    if not isinstance(page_table, Tensor) or page_table.dtype != torch.int32:
        raise TypeError(f"page_table: expected an int32 tensor, got {getattr(page_table, 'dtype', type(page_table))}")
    if page_table.dim() != 2 or page_table.shape[0] != q.shape[0]:
        raise ValueError(f"page_table: shape {tuple(page_table.shape)} is not (B, pages) with B = {q.shape[0]}")
    if page_table.shape[1] > 1 and page_table.stride(1) != 1:
        raise ValueError(f"page_table: its last dimension has stride {page_table.stride(1)}; expected 1")
    _checks.same_device("page_table", page_table, name, q)
    if k_cache.shape[2] == 0:
        raise ValueError("k_cache: pages have no positions")
    return page_table.shape[1] * k_cache.shape[2]


def check_index(name: str, t: Tensor, batch: int, like: Tensor) -> None:
    """``t`` is (B) int32 on the device of ``like``."""
    if not isinstance(t, Tensor) or t.dtype != torch.int32:
        raise TypeError(f"{name}: expected an int32 tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.shape != (batch,):
        raise ValueError(f"{name}: shape {tuple(t.shape)} is not (B) = {(batch,)}")
    if t.device != like.device:
        raise ValueError(f"{name}: is on {t.device}, but the queries are on {like.device}")


# A GPU's tensors whose values have been looked at: a loop adds to its lengths in place at every token, and waiting for
# the GPU at each would cost more than the attention.
_looked_at: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _look(
    name: str,
    lengths: Tensor,
    new: int,
    capacity: int,
    k_cache: Tensor,
    page_table: Tensor | None,
    rows: Tensor | None,
    leftpad: Tensor | None,
) -> None:
    """Raises where a sequence's keys, with ``new`` more, would lie outside of the cache."""
    tensors = [t for t in (lengths, page_table, rows, leftpad) if t is not None]
    if lengths.is_cuda:
        if all(t in _looked_at for t in tensors) or torch.cuda.is_current_stream_capturing():
            return
    ends, begins = lengths.tolist(), [0] * len(lengths) if leftpad is None else leftpad.tolist()
    for b, (begin, end) in enumerate(zip(begins, ends)):
        if not 0 <= end <= capacity - new:
            more = f" (there is room for {capacity}, and {new} are new)" if new else ""
            raise ValueError(f"{name}: {end} of sequence {b} is not in [0, {capacity - new}]{more}")
        if not 0 <= begin <= end:
            raise ValueError(f"cache_leftpad: {begin} of sequence {b} is not in [0, {end}]")
    if page_table is not None:
        size, pages = k_cache.shape[2], k_cache.shape[0]
        # what is read, or with new keys what is written
        first = [(end if new else begin) // size for begin, end in zip(begins, ends)]
        last = [-(-(end + new) // size) for end in ends]
        index = torch.arange(page_table.shape[1])
        used = (index >= torch.tensor(first)[:, None]) & (index < torch.tensor(last)[:, None])
        table = page_table.cpu()
        if (bad := (used & ((table < 0) | (table >= pages))).nonzero()).numel():
            b, i = bad[0].tolist()
            raise ValueError(f"page_table: page {int(table[b, i])} of sequence {b} is not in [0, {pages})")
    if rows is not None:
        for b, row in enumerate(rows.tolist()):
            if not 0 <= row < k_cache.shape[0]:
                raise ValueError(f"cache_batch_idx: row {row} of sequence {b} is not in [0, {k_cache.shape[0]})")
    if lengths.is_cuda:
        for t in tensors:
            _looked_at[t] = True


# ---- the registered operator -----------------------------------------------------------------------------------------


def _operator(q, k_cache, v_cache, cache_seqlens, *fields):
    kernels = registry.select("decode_attention", q.device.type, q.dtype)
    return kernels.forward(q, k_cache, v_cache, cache_seqlens, DecodeOptions(*fields))


def _fake(q, k_cache, v_cache, *rest):
    return empty_out(q, v_cache), q.new_empty(q.shape[:3], dtype=acc_dtype(q.dtype))


register(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, float scale, bool causal,"
    " int window_left, int window_right, float softcap, Tensor? alibi_slopes, Tensor? page_table,"
    " Tensor? cache_batch_idx, Tensor? cache_leftpad) -> (Tensor, Tensor)",
    _operator,
    _fake,
)
