"""The Triton kernels of attention.py for dq, dk and dv, where the formulas are.

One program of ``backward_q`` owns a block of queries of one head and walks over the keys; one of ``backward_k`` owns a
block of keys of one key/value head and walks over the queries of every head that reads it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_scores import (
    LOG2_E,
    Scores,
    base_of,
    first_row,
    kept,
    key_ranges,
    load_block,
    products,
    query_range,
    scored,
    sequence,
    slope_of,
    store_block,
)


@triton.jit
def _keys(
    acc,  # (BLOCK_Q, BLOCK_D) float32
    q,  # (BLOCK_Q, BLOCK_D)
    dout,  # (BLOCK_Q, BLOCK_DV)
    lse_log2, delta,  # (BLOCK_Q) float32
    start_q, index_q,  # the queries are start_q + index_q
    q_ptr, dout_ptr, k_ptr, v_ptr,  # one (batch, head)
    begin, end, q_stride, dout_stride, k_stride, v_stride,
    x,  # Scores
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds what the keys [begin, end) contribute; EDGE: some of them may be hidden from some queries."""
    i, index = start_q + index_q, tl.arange(0, BLOCK_K)
    for start in tl.range(begin, end, BLOCK_K):
        k = load_block(k_ptr, start, index, x.seqlen_k, k_stride, HEAD_DIM, BLOCK_D, EDGE)
        v = load_block(v_ptr, start, index, x.seqlen_k, v_stride, HEAD_DIM_V, BLOCK_DV, EDGE)
        qk = products(
            q, q_ptr, start_q, index_q, x.seqlen_q, q_stride, k, k_ptr, start, index, x.seqlen_k, k_stride,
            HEAD_DIM, BLOCK_D, True, EDGE,
        )  # fmt: skip
        s, tanh = scored(qk, i, start + index, x, EDGE, EDGE)
        p = tl.exp2(s - lse_log2[:, None])
        dp = products(
            dout, dout_ptr, start_q, index_q, x.seqlen_q, dout_stride, v, v_ptr, start, index, x.seqlen_k, v_stride,
            HEAD_DIM_V, BLOCK_DV, True, EDGE,
        )  # fmt: skip
        if x.dropout:
            keep = kept(x, i, start, BLOCK_Q, BLOCK_K)
            dp = tl.where(keep, dp * x.keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if x.softcap is not None:
            ds *= 1.0 - tanh * tanh
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@triton.jit(
    do_not_specialize=[
        "heads", "groups", "seqlen_q", "seqlen_k", "total_q", "max_distance", "window_left", "window_right", "seed",
        "threshold",
    ]
)  # fmt: skip
def backward_q(
    q_ptr,  # (B, Hq, Sq, D)
    k_ptr,  # (B, Hkv, Sk, D)
    v_ptr,  # (B, Hkv, Sk, Dv)
    out_ptr,  # (B, Hq, Sq, Dv)
    dout_ptr,  # (B, Hq, Sq, Dv)
    lse_ptr,  # (B, Hq, Sq) float32, contiguous
    dlse_ptr,  # (B, Hq, Sq) float32, contiguous; or None
    lse_log2_ptr,  # (B, Hq, padded) float32, written for the other kernels: log2(e) lse, +inf where nothing was seen
    delta_ptr,  # (B, Hq, padded) float32, likewise
    dq_ptr,  # (B, Hq, Sq, D)
    heads, groups,
    seqlen_q, seqlen_k,  # the longest sequence's
    padded,  # seqlen_q rounded up to whole blocks; of packed sequences the two statistics are laid out as lse is
    scale,
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s,
    out_stride_b, out_stride_h, out_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s,
    dq_stride_b, dq_stride_h, dq_stride_s,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, total_q,  # as in the forward kernel, to keep_scale
    padding_ptr, padding_stride,
    mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q,
    bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q,
    distance_bias_ptr, max_distance,
    slopes_ptr, slopes_stride,
    window_left, window_right, softcap,
    seed: tl.uint64, threshold: tl.uint32, keep_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TOP_LEFT: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dq, and what the other kernels need of each query, of one block of queries of one head."""
    if WIDE:
        q_stride_s, k_stride_s = tl.cast(q_stride_s, tl.int64), tl.cast(k_stride_s, tl.int64)
        v_stride_s, out_stride_s = tl.cast(v_stride_s, tl.int64), tl.cast(out_stride_s, tl.int64)
        dout_stride_s, dq_stride_s = tl.cast(dout_stride_s, tl.int64), tl.cast(dq_stride_s, tl.int64)
    blocks = padded // BLOCK_Q
    plane = tl.program_id(0) // blocks
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
    dout_ptr += batch * dout_stride_b + head * dout_stride_h + tl.cast(begin_q, tl.int64) * dout_stride_s
    dq_ptr += batch * dq_stride_b + head * dq_stride_h + tl.cast(begin_q, tl.int64) * dq_stride_s
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
    in_q = i < seqlen_q
    out = load_block(out_ptr, start_q, index, seqlen_q, out_stride_s, HEAD_DIM_V, BLOCK_DV, True)
    dout = load_block(dout_ptr, start_q, index, seqlen_q, dout_stride_s, HEAD_DIM_V, BLOCK_DV, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row + i, mask=in_q, other=0.0)
    lse = tl.load(lse_ptr + row + i, mask=in_q, other=float("-inf"))
    # A query that sees no key, or does not exist, gets probability zero everywhere: exp2(s - inf).
    lse_log2 = tl.where(lse != float("-inf"), lse * LOG2_E, float("inf"))
    delta = tl.where(lse != float("-inf"), delta, 0.0)
    if total_q is not None:
        tl.store(lse_log2_ptr + row + i, lse_log2, mask=in_q)
        tl.store(delta_ptr + row + i, delta, mask=in_q)
    else:
        tl.store(lse_log2_ptr + plane.to(tl.int64) * padded + i, lse_log2)
        tl.store(delta_ptr + plane.to(tl.int64) * padded + i, delta)
    q = load_block(q_ptr, start_q, index, seqlen_q, q_stride_s, HEAD_DIM, BLOCK_D, True)
    begin, full_begin, full_end, end = key_ranges(start_q, x, BLOCK_Q, BLOCK_K)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if x.window_left is not None:
        acc = _keys(
            acc, q, dout, lse_log2, delta, start_q, index, q_ptr, dout_ptr, k_ptr, v_ptr,
            begin, tl.minimum(full_begin, end), q_stride_s, dout_stride_s, k_stride_s, v_stride_s, x,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, True,
        )  # fmt: skip
    acc = _keys(
        acc, q, dout, lse_log2, delta, start_q, index, q_ptr, dout_ptr, k_ptr, v_ptr,
        full_begin, full_end, q_stride_s, dout_stride_s, k_stride_s, v_stride_s, x,
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, False,
    )  # fmt: skip
    if x.window_left is not None:
        full_end = tl.maximum(full_begin, full_end)
    acc = _keys(
        acc, q, dout, lse_log2, delta, start_q, index, q_ptr, dout_ptr, k_ptr, v_ptr,
        full_end, end, q_stride_s, dout_stride_s, k_stride_s, v_stride_s, x,
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, True,
    )  # fmt: skip
    store_block(dq_ptr, start_q, index, seqlen_q, dq_stride_s, acc * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def load_statistic(ptr, i, seqlen_q, other, PACKED: tl.constexpr):
    """lse_log2 or delta of the queries ``i``: whole blocks can be read where they are padded."""
    if PACKED:
        value = tl.load(ptr + i, mask=(i >= 0) & (i < seqlen_q), other=other)
    else:
        value = tl.load(ptr + i)
    return value


@triton.jit(
    do_not_specialize=[
        "heads_kv", "groups", "seqlen_q", "seqlen_k", "total_q", "max_distance", "window_left", "window_right", "seed",
        "threshold",
    ]
)  # fmt: skip
def backward_k(
    q_ptr,  # (B, Hq, Sq, D)
    k_ptr,  # (B, Hkv, Sk, D)
    v_ptr,  # (B, Hkv, Sk, Dv)
    dout_ptr,  # (B, Hq, Sq, Dv)
    lse_log2_ptr,  # (B, Hq, padded) float32, contiguous
    delta_ptr,  # (B, Hq, padded) float32, contiguous
    dk_ptr,  # (B, Hkv, Sk, D)
    dv_ptr,  # (B, Hkv, Sk, Dv)
    heads_kv, groups,
    seqlen_q, seqlen_k,  # the longest sequence's
    padded, scale,
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s,
    dk_stride_b, dk_stride_h, dk_stride_s,
    dv_stride_b, dv_stride_h, dv_stride_s,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, total_q,  # as in the forward kernel, to keep_scale
    padding_ptr, padding_stride,
    mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q,
    bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q,
    distance_bias_ptr, max_distance,
    slopes_ptr, slopes_stride,
    window_left, window_right, softcap,
    seed: tl.uint64, threshold: tl.uint32, keep_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TOP_LEFT: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr,
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
    begin_q, seqlen_q = sequence(cu_seqlens_q_ptr, batch, seqlen_q)
    begin_k, seqlen_k = sequence(cu_seqlens_k_ptr, batch, seqlen_k)
    if total_q is not None:
        if start_k >= seqlen_k:
            return
    k_ptr += batch * k_stride_b + head_kv * k_stride_h + tl.cast(begin_k, tl.int64) * k_stride_s
    v_ptr += batch * v_stride_b + head_kv * v_stride_h + tl.cast(begin_k, tl.int64) * v_stride_s
    dk_ptr += batch * dk_stride_b + head_kv * dk_stride_h + tl.cast(begin_k, tl.int64) * dk_stride_s
    dv_ptr += batch * dv_stride_b + head_kv * dv_stride_h + tl.cast(begin_k, tl.int64) * dv_stride_s
    first_head = head_kv * groups
    q_ptr += batch * q_stride_b + first_head * q_stride_h + tl.cast(begin_q, tl.int64) * q_stride_s
    dout_ptr += batch * dout_stride_b + first_head * dout_stride_h + tl.cast(begin_q, tl.int64) * dout_stride_s
    index_k, index = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Q)
    j = start_k + index_k
    k = load_block(k_ptr, start_k, index_k, seqlen_k, k_stride_s, HEAD_DIM, BLOCK_D, True)
    v = load_block(v_ptr, start_k, index_k, seqlen_k, v_stride_s, HEAD_DIM_V, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    for group in tl.range(groups):
        head = first_head + group
        row = first_row(batch, head, heads_kv * groups, begin_q, seqlen_q, total_q)
        statistics = row
        if total_q is None:
            statistics = (batch * heads_kv * groups + head) * padded
        # A key that padding hides touches only its own rows of dk and dv, so hiding it can wait until the end.
        x = Scores(
            batch, head, row, seqlen_q, seqlen_k, base_of(seqlen_q, seqlen_k, TOP_LEFT),
            slope_of(slopes_ptr, slopes_stride, batch, head), scale, None, None,
            mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q,
            bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q,
            distance_bias_ptr, max_distance, slopes_ptr, slopes_stride, window_left, window_right, softcap,
            seed, threshold, keep_scale, DROPOUT,
        )  # fmt: skip
        begin, end = query_range(start_k, x, BLOCK_Q, BLOCK_K)
        for start in tl.range(begin, end, BLOCK_Q):
            i = start + index
            q = load_block(q_ptr, start, index, seqlen_q, q_stride_s, HEAD_DIM, BLOCK_D, True)
            lse_log2 = load_statistic(lse_log2_ptr + statistics, i, seqlen_q, float("inf"), total_q is not None)
            qk = products(  # transposed: keys by queries
                k, k_ptr, start_k, index_k, seqlen_k, k_stride_s, q, q_ptr, start, index, seqlen_q, q_stride_s,
                HEAD_DIM, BLOCK_D, True, True,
            )  # fmt: skip
            s, tanh = scored(qk, i, j, x, True, True, TRANSPOSED=True)
            p = tl.exp2(s - lse_log2[None, :])
            dout = load_block(dout_ptr, start, index, seqlen_q, dout_stride_s, HEAD_DIM_V, BLOCK_DV, True)
            dp = products(
                v, v_ptr, start_k, index_k, seqlen_k, v_stride_s,
                dout, dout_ptr, start, index, seqlen_q, dout_stride_s, HEAD_DIM_V, BLOCK_DV, True, True,
            )  # fmt: skip
            p_kept = p
            if DROPOUT:
                keep = tl.trans(kept(x, i, start_k, BLOCK_Q, BLOCK_K))
                p_kept = tl.where(keep, p, 0.0)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            dv = tl.dot(p_kept.to(dout.dtype), dout, dv, input_precision="ieee")
            delta = load_statistic(delta_ptr + statistics, i, seqlen_q, 0.0, total_q is not None)
            ds = p * (dp - delta[None, :])
            if softcap is not None:
                ds *= 1.0 - tanh * tanh
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        q_ptr += q_stride_h
        dout_ptr += dout_stride_h
    dk *= scale
    if DROPOUT:
        dv *= keep_scale
    if padding_ptr is not None:
        ignored = tl.load(padding_ptr + batch * padding_stride + j, mask=j < seqlen_k, other=1) != 0
        dk = tl.where(ignored[:, None], 0.0, dk)
        dv = tl.where(ignored[:, None], 0.0, dv)
    store_block(dk_ptr, start_k, index_k, seqlen_k, dk_stride_s, dk, HEAD_DIM, BLOCK_D)
    store_block(dv_ptr, start_k, index_k, seqlen_k, dv_stride_s, dv, HEAD_DIM_V, BLOCK_DV)
