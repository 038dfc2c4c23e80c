"""The forward Triton kernel of attention.py, where the formulas are.

One program owns a block of queries of one head and walks over the keys. The first and the last blocks of these may be
hidden in part, by the window (under causal, by the diagonal) or the end of the sequence; those between run in a loop of
their own, which compares nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_scores import (
    LN_2,
    Scores,
    base_of,
    first_row,
    kept,
    key_ranges,
    load_block,
    products,
    scored,
    sequence,
    slope_of,
    store_block,
)


@triton.jit
def _keys(
    acc,  # (BLOCK_Q, BLOCK_DV) float32
    row_max,  # (BLOCK_Q) running maximum of the scores, times log2(e)
    row_sum,  # (BLOCK_Q)
    q,  # (BLOCK_Q, BLOCK_D)
    start_q, index_q,  # its queries are start_q + index_q
    q_ptr, k_ptr, v_ptr,  # one (batch, head)
    begin, end, q_stride, k_stride, v_stride,
    x,  # Scores
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds the keys [begin, end) to the running softmax; EDGE: some of them may be hidden from some queries."""
    i, index = start_q + index_q, tl.arange(0, BLOCK_K)
    for start in tl.range(begin, end, BLOCK_K):
        k = load_block(k_ptr, start, index, x.seqlen_k, k_stride, HEAD_DIM, BLOCK_D, EDGE)
        qk = products(
            q, q_ptr, start_q, index_q, x.seqlen_q, q_stride, k, k_ptr, start, index, x.seqlen_k, k_stride,
            HEAD_DIM, BLOCK_D, True, EDGE,
        )  # fmt: skip
        s, _ = scored(qk, i, start + index, x, EDGE, EDGE)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        shift = new_max
        # Nothing seen yet: -inf - -inf would be NaN.
        if (
            EDGE or x.padding_ptr is not None or x.mask_ptr is not None or x.bias_ptr is not None
            or x.distance_bias_ptr is not None
        ):  # fmt: skip
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(row_max - shift)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        if x.dropout:
            p = tl.where(kept(x, i, start, BLOCK_Q, BLOCK_K), p, 0.0)
        v = load_block(v_ptr, start, index, x.seqlen_k, v_stride, HEAD_DIM_V, BLOCK_DV, EDGE)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(
    do_not_specialize=[
        "heads", "groups", "seqlen_q", "seqlen_k", "total_q", "max_distance", "window_left", "window_right", "seed",
        "threshold",
    ]
)  # fmt: skip
def forward(
    q_ptr,  # (B, Hq, Sq, D)
    k_ptr,  # (B, Hkv, Sk, D)
    v_ptr,  # (B, Hkv, Sk, Dv)
    out_ptr,  # (B, Hq, Sq, Dv)
    lse_ptr,  # (B, Hq, Sq) float32, contiguous
    heads, groups,
    seqlen_q, seqlen_k,  # the longest sequence's
    scale,
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s,
    out_stride_b, out_stride_h, out_stride_s,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, total_q,  # (B + 1) int32, and positions in all; None where nothing is packed
    padding_ptr, padding_stride,  # (B, Sk) uint8, nonzero = ignored; from here on each may be None
    mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q,  # (B, Hq, Sq, Sk) uint8, nonzero = visible
    bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q,  # (B, Hq, Sq, Sk)
    distance_bias_ptr, max_distance,  # (Hq, 2 max_distance + 1) float32
    slopes_ptr, slopes_stride,  # (B, Hq) float32
    window_left, window_right, softcap,
    seed: tl.uint64, threshold: tl.uint32, keep_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TOP_LEFT: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head."""
    if WIDE:
        q_stride_s, k_stride_s = tl.cast(q_stride_s, tl.int64), tl.cast(k_stride_s, tl.int64)
        v_stride_s, out_stride_s = tl.cast(v_stride_s, tl.int64), tl.cast(out_stride_s, tl.int64)
    blocks = tl.cdiv(seqlen_q, BLOCK_Q)
    plane = tl.program_id(0) // blocks
    # The last queries see the most keys: they start first, so that short programs fill the end of the launch.
    start_q = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    head_kv = (plane % heads // groups).to(tl.int64)
    begin_q, seqlen_q = sequence(cu_seqlens_q_ptr, batch, seqlen_q)
    begin_k, seqlen_k = sequence(cu_seqlens_k_ptr, batch, seqlen_k)
    if total_q is not None:
        if start_q >= seqlen_q:
            return
    q_ptr += batch * q_stride_b + head * q_stride_h + tl.cast(begin_q, tl.int64) * q_stride_s
    k_ptr += batch * k_stride_b + head_kv * k_stride_h + tl.cast(begin_k, tl.int64) * k_stride_s
    v_ptr += batch * v_stride_b + head_kv * v_stride_h + tl.cast(begin_k, tl.int64) * v_stride_s
    out_ptr += batch * out_stride_b + head * out_stride_h + tl.cast(begin_q, tl.int64) * out_stride_s
    row = first_row(batch, head, heads, begin_q, seqlen_q, total_q)
    x = Scores(
        batch, head, row, seqlen_q, seqlen_k, base_of(seqlen_q, seqlen_k, TOP_LEFT),
        slope_of(slopes_ptr, slopes_stride, batch, head), scale, padding_ptr, padding_stride,
        mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q, bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q,
        distance_bias_ptr, max_distance, slopes_ptr, slopes_stride, window_left, window_right, softcap,
        seed, threshold, keep_scale, DROPOUT,
    )  # fmt: skip
    index = tl.arange(0, BLOCK_Q)
    i = start_q + index
    q = load_block(q_ptr, start_q, index, seqlen_q, q_stride_s, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    begin, full_begin, full_end, end = key_ranges(start_q, x, BLOCK_Q, BLOCK_K)
    if x.window_left is not None:
        acc, row_max, row_sum = _keys(
            acc, row_max, row_sum, q, start_q, index, q_ptr, k_ptr, v_ptr, begin, tl.minimum(full_begin, end),
            q_stride_s, k_stride_s, v_stride_s, x,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, True,
        )  # fmt: skip
    acc, row_max, row_sum = _keys(
        acc, row_max, row_sum, q, start_q, index, q_ptr, k_ptr, v_ptr, full_begin, full_end,
        q_stride_s, k_stride_s, v_stride_s, x,
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, False,
    )  # fmt: skip
    if x.window_left is not None:
        full_end = tl.maximum(full_begin, full_end)
    acc, row_max, row_sum = _keys(
        acc, row_max, row_sum, q, start_q, index, q_ptr, k_ptr, v_ptr, full_end, end,
        q_stride_s, k_stride_s, v_stride_s, x,
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, True,
    )  # fmt: skip
    seen = row_sum != 0  # also NaN, which must come out as NaN
    divisor = tl.where(seen, row_sum, 1.0)
    lse = tl.where(seen, (row_max + tl.log2(divisor)) * LN_2, float("-inf"))
    tl.store(lse_ptr + row + i, lse, mask=i < seqlen_q)
    acc = acc / divisor[:, None]
    if DROPOUT:
        acc *= keep_scale
    store_block(out_ptr, start_q, index, seqlen_q, out_stride_s, acc, HEAD_DIM_V, BLOCK_DV)
