"""Attention without the score matrix: out = softmax(scale q k^T + mask) v and its gradients.

Blocks of keys stream past a block of queries while a running maximum and sum rescale the partial result (Dao et al.
2022, arXiv:2205.14135; forward is algorithm 1 of arXiv:2307.08691). With p the probabilities, recomputed from the saved
log-sum-exp, and delta = sum(dout * out) - dlse per query:

    dv = p^T dout,   ds = p * (dout v^T - delta),   dq = scale ds k,   dk = scale ds^T q

Two choices make it fast and repeatable. Key blocks that no mask touches run in a loop of their own, without a single
comparison. And backward is two kernels, one that owns queries and sums over keys (dq, and delta on the way), one that
owns keys and sums over queries and over the query heads that share them (dk, dv): no sum crosses programs, so none
needs atomic additions, and the result is the same in every run. The second kernel has one loop only: a second one costs
more registers than the comparison it saves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DTYPES as DTYPES
from .launch import TYPES, Configuration, capability, launch, unit_stride

FEATURES = frozenset({"causal", "key_padding_mask", "grouped_heads"})

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Tile(NamedTuple):
    """How one program of one kernel works through its part of the score matrix."""

    block_q: int
    """Queries at once."""
    block_k: int
    """Keys at once."""
    num_warps: int
    num_stages: int
    """Blocks of the loop that are in flight at once."""


class Tiles(NamedTuple):
    """The three kernels' tiles for one head size."""

    forward: Tile
    backward_q: Tile
    backward_k: Tile


# (sm_ family, bytes per element, head_dim rounded up to a power of two) -> tiles. The largest that stay in registers
# (aot.py checks every line) and, in the sm_80 family, within the 99 KiB of shared memory of an sm_86 or sm_89.
TILES: dict[tuple[int, int, int], Tiles] = {
    (80, 2, 16): Tiles(Tile(128, 128, 4, 3), Tile(128, 64, 4, 3), Tile(128, 128, 8, 2)),
    (80, 2, 32): Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    (80, 2, 64): Tiles(Tile(128, 64, 4, 3), Tile(128, 32, 8, 3), Tile(32, 128, 8, 2)),
    (80, 2, 128): Tiles(Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), Tile(64, 64, 8, 1)),
    (80, 2, 256): Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(16, 64, 8, 1)),
    (80, 4, 16): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (80, 4, 32): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (80, 4, 64): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (80, 4, 128): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (80, 4, 256): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (90, 2, 16): Tiles(Tile(128, 128, 4, 3), Tile(128, 64, 4, 3), Tile(128, 128, 8, 2)),
    (90, 2, 32): Tiles(Tile(128, 128, 4, 3), Tile(128, 64, 4, 3), Tile(64, 128, 8, 3)),
    (90, 2, 64): Tiles(Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(64, 128, 8, 3)),
    (90, 2, 128): Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    (90, 2, 256): Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 32, 8, 2)),
    (90, 4, 16): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (90, 4, 32): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (90, 4, 64): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (90, 4, 128): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (90, 4, 256): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
}


@triton.jit
def _load(
    ptr,  # position 0 of one (batch, head)
    start,  # first position
    index,  # (BLOCK) 0, 1, ...
    length,  # positions there are
    stride,  # between positions
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHECK: tl.constexpr,  # whether the block may reach past `length`
):
    """(BLOCK, BLOCK_DIM) of consecutive positions; zeros beyond ``length`` and beyond ``HEAD_DIM``."""
    dim = tl.arange(0, BLOCK_DIM)
    block = ptr + tl.cast(start, tl.int64) * stride + (index[:, None] * stride + dim[None, :])
    if CHECK:
        mask = (start + index < length)[:, None]
        if HEAD_DIM < BLOCK_DIM:
            mask = mask & (dim < HEAD_DIM)[None, :]
        loaded = tl.load(block, mask=mask, other=0.0)
    else:
        if HEAD_DIM < BLOCK_DIM:
            loaded = tl.load(block, mask=(dim < HEAD_DIM)[None, :], other=0.0)
        else:
            loaded = tl.load(block)
    return loaded


@triton.jit
def _store(ptr, start, index, length, stride, value, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    dim = tl.arange(0, BLOCK_DIM)
    block = ptr + tl.cast(start, tl.int64) * stride + (index[:, None] * stride + dim[None, :])
    mask = (start + index < length)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(block, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _ignored(mask_ptr, start, index, length, CHECK: tl.constexpr):
    if CHECK:
        mask = tl.load(mask_ptr + start + index, mask=start + index < length, other=1)
    else:
        mask = tl.load(mask_ptr + start + index)
    return mask != 0


@triton.jit
def _key_ranges(
    start_q, seqlen_q, seqlen_k, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """(full, end): every query of the block sees all keys before ``full``, none sees a key from ``end`` on."""
    full, end = seqlen_k, seqlen_k
    if CAUSAL:
        diagonal = start_q + seqlen_k - seqlen_q  # the last key that the block's first query sees
        full = tl.minimum(seqlen_k, tl.maximum(diagonal + 1, 0))
        end = tl.minimum(seqlen_k, tl.maximum(diagonal + BLOCK_Q, 0))
    return full // BLOCK_K * BLOCK_K, end


@triton.jit
def _forward_keys(
    acc,  # (BLOCK_Q, BLOCK_DV) float32
    row_max,  # (BLOCK_Q) running maximum of the scores, times log2(e)
    row_sum,  # (BLOCK_Q)
    q,  # (BLOCK_Q, BLOCK_D)
    k_ptr, v_ptr, mask_ptr,  # one (batch, head)
    begin, end, last_key, seqlen_k, scale_log2, k_stride, v_stride,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds the keys [begin, end) to the running softmax; EDGE: some of them may be hidden from some queries."""
    index = tl.arange(0, BLOCK_K)
    for start in tl.range(begin, end, BLOCK_K):
        k = _load(k_ptr, start, index, seqlen_k, k_stride, HEAD_DIM, BLOCK_D, EDGE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if EDGE:
            visible = (start + index < seqlen_k)[None, :]
            if CAUSAL:
                visible = visible & (start + index[None, :] <= last_key[:, None])
            s = tl.where(visible, s, float("-inf"))
        if mask_ptr is not None:
            s = tl.where(_ignored(mask_ptr, start, index, seqlen_k, EDGE)[None, :], float("-inf"), s)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        shift = new_max
        if EDGE or mask_ptr is not None:  # nothing seen yet: -inf - -inf would be NaN
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(row_max - shift)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        v = _load(v_ptr, start, index, seqlen_k, v_stride, HEAD_DIM_V, BLOCK_DV, EDGE)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["heads", "groups", "seqlen_q", "seqlen_k"])
def _forward(
    q_ptr,  # (B, Hq, Sq, D)
    k_ptr,  # (B, Hkv, Sk, D)
    v_ptr,  # (B, Hkv, Sk, Dv)
    mask_ptr,  # (B, Sk) uint8, nonzero = ignored; or None
    out_ptr,  # (B, Hq, Sq, Dv)
    lse_ptr,  # (B, Hq, Sq) float32, contiguous
    heads, groups, seqlen_q, seqlen_k, scale,
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s,
    out_stride_b, out_stride_h, out_stride_s,
    mask_stride,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head."""
    if WIDE:
        q_stride_s, k_stride_s = tl.cast(q_stride_s, tl.int64), tl.cast(k_stride_s, tl.int64)
        v_stride_s, out_stride_s = tl.cast(v_stride_s, tl.int64), tl.cast(out_stride_s, tl.int64)
    blocks = tl.cdiv(seqlen_q, BLOCK_Q)
    plane = tl.program_id(0) // blocks
    # The last queries see the most keys: they start first, so that short programs fill the end of the launch.
    start_q = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q
    batch, head = (plane // heads).to(tl.int64), plane % heads
    head_kv = (head // groups).to(tl.int64)
    k_ptr += batch * k_stride_b + head_kv * k_stride_h
    v_ptr += batch * v_stride_b + head_kv * v_stride_h
    if mask_ptr is not None:
        mask_ptr += batch * mask_stride
    index = tl.arange(0, BLOCK_Q)
    last_key = start_q + index + (seqlen_k - seqlen_q)
    q = _load(
        q_ptr + batch * q_stride_b + head.to(tl.int64) * q_stride_h, start_q, index, seqlen_q, q_stride_s,
        HEAD_DIM, BLOCK_D, True,
    )  # fmt: skip
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    full, end = _key_ranges(start_q, seqlen_q, seqlen_k, BLOCK_Q, BLOCK_K, CAUSAL)
    scale_log2 = scale * LOG2_E
    acc, row_max, row_sum = _forward_keys(
        acc, row_max, row_sum, q, k_ptr, v_ptr, mask_ptr, 0, full, last_key, seqlen_k, scale_log2, k_stride_s,
        v_stride_s, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_K, CAUSAL, False,
    )  # fmt: skip
    acc, row_max, row_sum = _forward_keys(
        acc, row_max, row_sum, q, k_ptr, v_ptr, mask_ptr, full, end, last_key, seqlen_k, scale_log2, k_stride_s,
        v_stride_s, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_K, CAUSAL, True,
    )  # fmt: skip
    seen = row_sum != 0  # also NaN, which must come out as NaN
    divisor = tl.where(seen, row_sum, 1.0)
    lse = tl.where(seen, (row_max + tl.log2(divisor)) * LN_2, float("-inf"))
    tl.store(lse_ptr + plane.to(tl.int64) * seqlen_q + start_q + index, lse, mask=start_q + index < seqlen_q)
    _store(
        out_ptr + batch * out_stride_b + head.to(tl.int64) * out_stride_h, start_q, index, seqlen_q, out_stride_s,
        acc / divisor[:, None], HEAD_DIM_V, BLOCK_DV,
    )  # fmt: skip


@triton.jit
def _backward_q_keys(
    acc,  # (BLOCK_Q, BLOCK_D) float32
    q,  # (BLOCK_Q, BLOCK_D)
    dout,  # (BLOCK_Q, BLOCK_DV)
    lse_log2, delta,  # (BLOCK_Q) float32
    k_ptr, v_ptr, mask_ptr,  # one (batch, head)
    begin, end, last_key, seqlen_k, scale_log2, k_stride, v_stride,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, BLOCK_K)
    for start in tl.range(begin, end, BLOCK_K):
        k = _load(k_ptr, start, index, seqlen_k, k_stride, HEAD_DIM, BLOCK_D, EDGE)
        v = _load(v_ptr, start, index, seqlen_k, v_stride, HEAD_DIM_V, BLOCK_DV, EDGE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        p = tl.exp2(s - lse_log2[:, None])
        if EDGE:
            visible = (start + index < seqlen_k)[None, :]
            if CAUSAL:
                visible = visible & (start + index[None, :] <= last_key[:, None])
            p = tl.where(visible, p, 0.0)
        if mask_ptr is not None:
            p = tl.where(_ignored(mask_ptr, start, index, seqlen_k, EDGE)[None, :], 0.0, p)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["heads", "groups", "seqlen_q", "seqlen_k"])
def _backward_q(
    q_ptr,  # (B, Hq, Sq, D)
    k_ptr,  # (B, Hkv, Sk, D)
    v_ptr,  # (B, Hkv, Sk, Dv)
    mask_ptr,  # (B, Sk) uint8, nonzero = ignored; or None
    out_ptr,  # (B, Hq, Sq, Dv)
    dout_ptr,  # (B, Hq, Sq, Dv)
    lse_ptr,  # (B, Hq, Sq) float32, contiguous
    dlse_ptr,  # (B, Hq, Sq) float32, contiguous; or None
    lse_log2_ptr,  # (B, Hq, padded) float32, written for the second kernel: log2(e) lse, +inf where nothing was seen
    delta_ptr,  # (B, Hq, padded) float32, likewise
    dq_ptr,  # (B, Hq, Sq, D)
    heads, groups, seqlen_q, seqlen_k, padded, scale,
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s,
    out_stride_b, out_stride_h, out_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s,
    dq_stride_b, dq_stride_h, dq_stride_s,
    mask_stride,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dq, and what the second kernel needs of each query, of one block of queries of one head."""
    if WIDE:
        q_stride_s, k_stride_s = tl.cast(q_stride_s, tl.int64), tl.cast(k_stride_s, tl.int64)
        v_stride_s, out_stride_s = tl.cast(v_stride_s, tl.int64), tl.cast(out_stride_s, tl.int64)
        dout_stride_s, dq_stride_s = tl.cast(dout_stride_s, tl.int64), tl.cast(dq_stride_s, tl.int64)
    blocks = padded // BLOCK_Q
    plane = tl.program_id(0) // blocks
    start_q = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    head_kv = head // groups
    k_ptr += batch * k_stride_b + head_kv * k_stride_h
    v_ptr += batch * v_stride_b + head_kv * v_stride_h
    if mask_ptr is not None:
        mask_ptr += batch * mask_stride
    index = tl.arange(0, BLOCK_Q)
    in_q = start_q + index < seqlen_q
    last_key = start_q + index + (seqlen_k - seqlen_q)
    row = plane.to(tl.int64) * seqlen_q + start_q + index
    out = _load(
        out_ptr + batch * out_stride_b + head * out_stride_h, start_q, index, seqlen_q, out_stride_s,
        HEAD_DIM_V, BLOCK_DV, True,
    )  # fmt: skip
    dout = _load(
        dout_ptr + batch * dout_stride_b + head * dout_stride_h, start_q, index, seqlen_q, dout_stride_s,
        HEAD_DIM_V, BLOCK_DV, True,
    )  # fmt: skip
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, mask=in_q, other=0.0)
    lse = tl.load(lse_ptr + row, mask=in_q, other=float("-inf"))
    # A query that sees no key, or does not exist, gets probability zero everywhere: exp2(s - inf).
    lse_log2 = tl.where(lse != float("-inf"), lse * LOG2_E, float("inf"))
    delta = tl.where(lse != float("-inf"), delta, 0.0)
    tl.store(lse_log2_ptr + plane.to(tl.int64) * padded + start_q + index, lse_log2)
    tl.store(delta_ptr + plane.to(tl.int64) * padded + start_q + index, delta)
    q = _load(
        q_ptr + batch * q_stride_b + head * q_stride_h, start_q, index, seqlen_q, q_stride_s, HEAD_DIM, BLOCK_D, True
    )
    full, end = _key_ranges(start_q, seqlen_q, seqlen_k, BLOCK_Q, BLOCK_K, CAUSAL)
    scale_log2 = scale * LOG2_E
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    acc = _backward_q_keys(
        acc, q, dout, lse_log2, delta, k_ptr, v_ptr, mask_ptr, 0, full, last_key, seqlen_k, scale_log2, k_stride_s,
        v_stride_s, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_K, CAUSAL, False,
    )  # fmt: skip
    acc = _backward_q_keys(
        acc, q, dout, lse_log2, delta, k_ptr, v_ptr, mask_ptr, full, end, last_key, seqlen_k, scale_log2, k_stride_s,
        v_stride_s, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_K, CAUSAL, True,
    )  # fmt: skip
    _store(
        dq_ptr + batch * dq_stride_b + head * dq_stride_h, start_q, index, seqlen_q, dq_stride_s, acc * scale,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _backward_k_queries(
    dk, dv,  # (BLOCK_K, BLOCK_D), (BLOCK_K, BLOCK_DV) float32
    k, v,  # (BLOCK_K, BLOCK_D), (BLOCK_K, BLOCK_DV)
    q_ptr, dout_ptr, lse_log2_ptr, delta_ptr,  # the first query head of the group
    begin, first_query, groups, seqlen_q, padded, scale_log2,
    q_stride_h, q_stride_s, dout_stride_h, dout_stride_s,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Adds the queries from ``begin`` on of every head of the group."""
    index = tl.arange(0, BLOCK_Q)
    for _ in tl.range(groups):
        for start in tl.range(begin, seqlen_q, BLOCK_Q):
            q = _load(q_ptr, start, index, seqlen_q, q_stride_s, HEAD_DIM, BLOCK_D, True)
            lse_log2 = tl.load(lse_log2_ptr + start + index)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2  # transposed: keys by queries
            p = tl.exp2(s - lse_log2[None, :])
            if CAUSAL:
                p = tl.where(start + index[None, :] >= first_query[:, None], p, 0.0)
            dout = _load(dout_ptr, start, index, seqlen_q, dout_stride_s, HEAD_DIM_V, BLOCK_DV, True)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            delta = tl.load(delta_ptr + start + index)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        q_ptr += q_stride_h
        dout_ptr += dout_stride_h
        lse_log2_ptr += padded
        delta_ptr += padded
    return dk, dv


@triton.jit(do_not_specialize=["heads_kv", "groups", "seqlen_q", "seqlen_k"])
def _backward_k(
    q_ptr,  # (B, Hq, Sq, D)
    k_ptr,  # (B, Hkv, Sk, D)
    v_ptr,  # (B, Hkv, Sk, Dv)
    mask_ptr,  # (B, Sk) uint8, nonzero = ignored; or None
    dout_ptr,  # (B, Hq, Sq, Dv)
    lse_log2_ptr,  # (B, Hq, padded) float32, contiguous
    delta_ptr,  # (B, Hq, padded) float32, contiguous
    dk_ptr,  # (B, Hkv, Sk, D)
    dv_ptr,  # (B, Hkv, Sk, Dv)
    heads_kv, groups, seqlen_q, seqlen_k, padded, scale,
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s,
    dk_stride_b, dk_stride_h, dk_stride_s,
    dv_stride_b, dv_stride_h, dv_stride_s,
    mask_stride,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key/value head, summed over the query heads that read it."""
    if WIDE:
        q_stride_s, k_stride_s = tl.cast(q_stride_s, tl.int64), tl.cast(k_stride_s, tl.int64)
        v_stride_s, dout_stride_s = tl.cast(v_stride_s, tl.int64), tl.cast(dout_stride_s, tl.int64)
        dk_stride_s, dv_stride_s = tl.cast(dk_stride_s, tl.int64), tl.cast(dv_stride_s, tl.int64)
    blocks = tl.cdiv(seqlen_k, BLOCK_K)
    plane = tl.program_id(0) // blocks
    start_k = tl.program_id(0) % blocks * BLOCK_K
    batch, head_kv = (plane // heads_kv).to(tl.int64), (plane % heads_kv).to(tl.int64)
    index = tl.arange(0, BLOCK_K)
    first_query = start_k + index - (seqlen_k - seqlen_q)  # the first query that sees each key, under causal
    k = _load(
        k_ptr + batch * k_stride_b + head_kv * k_stride_h, start_k, index, seqlen_k, k_stride_s, HEAD_DIM, BLOCK_D, True
    )
    v = _load(
        v_ptr + batch * v_stride_b + head_kv * v_stride_h, start_k, index, seqlen_k, v_stride_s,
        HEAD_DIM_V, BLOCK_DV, True,
    )  # fmt: skip
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(start_k - (seqlen_k - seqlen_q), 0) // BLOCK_Q * BLOCK_Q
    scale_log2 = scale * LOG2_E
    head = head_kv * groups
    row = (batch * heads_kv * groups + head) * padded
    q_ptr += batch * q_stride_b + head * q_stride_h
    dout_ptr += batch * dout_stride_b + head * dout_stride_h
    lse_log2_ptr += row
    delta_ptr += row
    dk, dv = _backward_k_queries(
        dk, dv, k, v, q_ptr, dout_ptr, lse_log2_ptr, delta_ptr, begin, first_query, groups, seqlen_q, padded,
        scale_log2, q_stride_h, q_stride_s, dout_stride_h, dout_stride_s,
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_Q, CAUSAL,
    )  # fmt: skip
    dk *= scale
    if mask_ptr is not None:  # a hidden key touches only its own rows of dk and dv, so hiding can wait until here
        ignored = _ignored(mask_ptr + batch * mask_stride, start_k, index, seqlen_k, True)
        dk = tl.where(ignored[:, None], 0.0, dk)
        dv = tl.where(ignored[:, None], 0.0, dv)
    _store(
        dk_ptr + batch * dk_stride_b + head_kv * dk_stride_h, start_k, index, seqlen_k, dk_stride_s, dk,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    _store(
        dv_ptr + batch * dv_stride_b + head_kv * dv_stride_h, start_k, index, seqlen_k, dv_stride_s, dv,
        HEAD_DIM_V, BLOCK_DV,
    )  # fmt: skip


def block_dim(head_dim: int) -> int:
    """``head_dim`` as the kernels hold it: a power of two that a matrix instruction can take."""
    return max(16, triton.next_power_of_2(head_dim))


@functools.cache
def _tiles(device: torch.device, itemsize: int, head_dim: int, head_dim_v: int) -> Tiles:
    return TILES[family(capability(device)), itemsize, max(block_dim(head_dim), block_dim(head_dim_v))]


def family(sm: int) -> int:
    """Which lines of TILES a GPU of compute capability ``sm`` uses: 90 from Hopper's data-centre line on, else 80."""
    return 90 if sm // 10 in (9, 10) else 80


def _blocks(tile: Tile, q: Tensor, v: Tensor, causal: bool, *strided: Tensor) -> dict[str, int | bool]:
    """Everything a launch is specialised for. ``strided``: the remaining tensors that are read or written in blocks."""
    widest = max(abs(x.stride(2)) for x in (q, v, *strided))
    return {
        "HEAD_DIM": q.shape[3],
        "HEAD_DIM_V": v.shape[3],
        "BLOCK_D": block_dim(q.shape[3]),
        "BLOCK_DV": block_dim(v.shape[3]),
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "CAUSAL": causal,
        "WIDE": widest * max(tile.block_q, tile.block_k) >= 2**31,  # else offsets within a block fit in 32 bits
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _mask(key_padding_mask: Tensor | None) -> tuple[Tensor | None, int]:
    if key_padding_mask is None:
        return None, 0
    mask = unit_stride(key_padding_mask).view(torch.uint8)
    return mask, mask.stride(0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq) float32.

    key_padding_mask (B, Sk) bool, True = ignored. A query that sees no key gives zeros and lse = -inf. ``out`` lies in
    memory as (B, Sq, Hq, Dv), so that merging the heads afterwards is a view.
    """
    batch, heads, seqlen_q, head_dim = q.shape
    heads_kv, seqlen_k, head_dim_v = v.shape[1:]
    out = torch.empty((batch, seqlen_q, heads, head_dim_v), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, heads, seqlen_q), dtype=torch.float32, device=q.device)
    tile = _tiles(q.device, q.element_size(), head_dim, head_dim_v).forward
    mask, mask_stride = _mask(key_padding_mask)
    launch(
        _forward, (batch * heads * triton.cdiv(seqlen_q, tile.block_q),), q.device,
        q, k, v, mask, out, lse, heads, heads // max(heads_kv, 1), seqlen_q, seqlen_k, scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], mask_stride,
        **_blocks(tile, q, v, causal, k, out),
    )  # fmt: skip
    return out, lse


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
    batch, heads, seqlen_q, head_dim = q.shape
    heads_kv, seqlen_k, head_dim_v = v.shape[1:]
    dq = torch.empty_like(q) if dq is None else dq
    dk = torch.empty_like(k) if dk is None else dk
    dv = torch.empty_like(v) if dv is None else dv
    dout = unit_stride(dout)
    dlse = None if dlse is None else dlse.contiguous()
    tiles = _tiles(q.device, q.element_size(), head_dim, head_dim_v)
    # Both kernels read and write whole blocks of the two statistics, without comparing.
    block = max(tiles.backward_q.block_q, tiles.backward_k.block_q)
    padded = triton.cdiv(seqlen_q, block) * block
    lse_log2, delta = torch.empty((2, batch, heads, padded), dtype=torch.float32, device=q.device)
    mask, mask_stride = _mask(key_padding_mask)
    groups = heads // max(heads_kv, 1)
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    launch(
        _backward_q, (batch * heads * (padded // tiles.backward_q.block_q),), q.device,
        q, k, v, mask, out, dout, lse, dlse, lse_log2, delta, dq, heads, groups, seqlen_q, seqlen_k, padded, scale,
        *inputs, *out.stride()[:3], *dout.stride()[:3], *dq.stride()[:3], mask_stride,
        **_blocks(tiles.backward_q, q, v, causal, k, out, dout, dq),
    )  # fmt: skip
    launch(
        _backward_k, (batch * heads_kv * triton.cdiv(seqlen_k, tiles.backward_k.block_k),), q.device,
        q, k, v, mask, dout, lse_log2, delta, dk, dv, heads_kv, groups, seqlen_q, seqlen_k, padded, scale,
        *inputs, *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], mask_stride,
        **_blocks(tiles.backward_k, q, v, causal, k, dout, dk, dv),
    )  # fmt: skip
    return dq, dk, dv


# Head sizes that are built off-line: each line of TILES, and sizes between two powers of two.
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)


def configuration(
    direction: str, sm_family: int, kind: str, head_dim: int, causal: bool, padding: bool, tile: Tile
) -> Configuration:
    """One build of the kernel ``direction`` ("forward", "backward_q" or "backward_k") with ``tile``."""
    kernel = {"forward": _forward, "backward_q": _backward_q, "backward_k": _backward_k}[direction]
    data = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "dout_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    types: dict[str, str | None] = {name: f"*{kind}" for name in kernel.arg_names if name in data}
    types |= {
        name: "*fp32" for name in ("lse_ptr", "lse_log2_ptr", "delta_ptr", "dlse_ptr") if name in kernel.arg_names
    }
    constants = {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim,
        "BLOCK_D": block_dim(head_dim),
        "BLOCK_DV": block_dim(head_dim),
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "CAUSAL": causal,
        "WIDE": False,
    }
    features = ("causal" if causal else "full") + ("+padding" if padding else "")
    return Configuration(
        kernel,
        f"attention {direction} {kind} D={head_dim} {features}",
        types | {"mask_ptr": "*u8" if padding else None, "scale": "fp32"},
        constants,
        tile.num_warps,
        tile.num_stages,
        capabilities=(sm_family,),
        tensor_cores=kind != "fp32",  # float32 is multiplied exactly, which no matrix instruction does
        unaligned=frozenset({"heads", "heads_kv", "groups", "seqlen_q", "seqlen_k"}),
    )


def configurations() -> Iterator[Configuration]:
    """Every line of TILES in each dtype, causal and not; with a padding mask where it adds most, under causal."""
    for dtype, kind in sorted(TYPES.items(), key=str):
        for head_dim in HEAD_DIMS:
            for sm_family in (80, 90):
                tiles = TILES[sm_family, dtype.itemsize, block_dim(head_dim)]
                for direction, tile in zip(Tiles._fields, tiles):
                    for causal, padding in ((False, False), (True, False), (True, True)):
                        yield configuration(direction, sm_family, kind, head_dim, causal, padding, tile)
