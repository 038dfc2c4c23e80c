"""The Triton kernels of attention.py for the gradients of what is added to the scores.

Both are sums of dz = p (dp - delta), whose blocks are computed once more here: by ``backward_bias`` for the elements
of the bias, summed over the dimensions it is broadcast along, by ``backward_distance_bias`` for each distance j - p(i).
The second is a sum of blocks like the first, because the blocks on one diagonal of the score matrix have the same
distances at the same places: a program adds them up element by element, and sorts by distance once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_scores import (
    Scores,
    base_of,
    first_row,
    kept,
    load_block,
    products,
    query_range,
    scored,
    sequence,
    slope_of,
)


@triton.jit
def _dz(
    start_q, start_k,  # start_q may be negative
    index_q, index_k,
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_log2_ptr, delta_ptr,  # one head of one sequence
    q_stride, k_stride, v_stride, dout_stride,
    x,  # Scores
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_Q, BLOCK_K) of the gradient of the scores after the cap; zero where a query or key is not there."""
    i = start_q + index_q
    in_q = (i >= 0) & (i < x.seqlen_q)
    q = load_block(q_ptr, start_q, index_q, x.seqlen_q, q_stride, HEAD_DIM, BLOCK_D, True, True)
    k = load_block(k_ptr, start_k, index_k, x.seqlen_k, k_stride, HEAD_DIM, BLOCK_D, True)
    qk = products(
        q, q_ptr, start_q, index_q, x.seqlen_q, q_stride, k, k_ptr, start_k, index_k, x.seqlen_k, k_stride,
        HEAD_DIM, BLOCK_D, True, True, True,
    )  # fmt: skip
    s, _ = scored(qk, i, start_k + index_k, x, True, True)
    p = tl.exp2(s - tl.load(lse_log2_ptr + i, mask=in_q, other=float("inf"))[:, None])
    dout = load_block(dout_ptr, start_q, index_q, x.seqlen_q, dout_stride, HEAD_DIM_V, BLOCK_DV, True, True)
    v = load_block(v_ptr, start_k, index_k, x.seqlen_k, v_stride, HEAD_DIM_V, BLOCK_DV, True)
    dp = products(
        dout, dout_ptr, start_q, index_q, x.seqlen_q, dout_stride, v, v_ptr, start_k, index_k, x.seqlen_k, v_stride,
        HEAD_DIM_V, BLOCK_DV, True, True, True,
    )  # fmt: skip
    if x.dropout:
        dp = tl.where(kept(x, i, start_k, BLOCK_Q, BLOCK_K), dp * x.keep_scale, 0.0)
    return p * (dp - tl.load(delta_ptr + i, mask=in_q, other=0.0)[:, None])


@triton.jit(
    do_not_specialize=[
        "heads", "groups", "seqlen_q", "seqlen_k", "loops", "loops_heads", "split", "max_distance", "window_left",
        "window_right", "seed", "threshold",
    ]
)  # fmt: skip
def backward_bias(
    q_ptr,  # (B, Hq, Sq, D)
    k_ptr,  # (B, Hkv, Sk, D)
    v_ptr,  # (B, Hkv, Sk, Dv)
    dout_ptr,  # (B, Hq, Sq, Dv)
    lse_log2_ptr,  # (B, Hq, padded) float32, contiguous
    delta_ptr,  # (B, Hq, padded) float32, contiguous
    dbias_ptr,  # (splits, B | 1, Hq | 1, Sq | 1, Sk), contiguous; the caller sums over the splits
    heads, groups, seqlen_q, seqlen_k, padded, scale,
    bias_batches, bias_heads,  # the bias's, B or 1 and Hq or 1
    loops, loops_heads,  # pairs of (batch, head) that share an element of the bias, and how many are heads
    split,  # how many of the pairs one program sums
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s,
    padding_ptr, padding_stride,  # as in the forward kernel, to keep_scale
    mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q,
    bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q,
    distance_bias_ptr, max_distance,
    slopes_ptr, slopes_stride,
    window_left, window_right, softcap,
    seed: tl.uint64, threshold: tl.uint32, keep_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TOP_LEFT: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr,  # whether every query has a bias of its own
):  # fmt: skip
    """One block of the bias's gradient, summed over ``split`` of the pairs of (batch, head) that share it."""
    if WIDE:
        q_stride_s, k_stride_s = tl.cast(q_stride_s, tl.int64), tl.cast(k_stride_s, tl.int64)
        v_stride_s, dout_stride_s = tl.cast(v_stride_s, tl.int64), tl.cast(dout_stride_s, tl.int64)
    blocks_k = tl.cdiv(seqlen_k, BLOCK_K)
    start_k = tl.program_id(0) % blocks_k * BLOCK_K
    rest = tl.program_id(0) // blocks_k
    own_q, rows = 0, 1
    if ROWS:
        blocks_q = tl.cdiv(seqlen_q, BLOCK_Q)
        own_q, rows = rest % blocks_q * BLOCK_Q, seqlen_q
        rest = rest // blocks_q
    plane = rest % (bias_batches * bias_heads)
    first_loop = rest // (bias_batches * bias_heads) * split
    index_q, index_k = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    # Of the largest heads, what the compiler would take out of the loops is more than there are registers.
    last_loop = tl.minimum(first_loop + split, loops)
    for loop in tl.range(first_loop, last_loop, disable_licm=BLOCK_D > 128):
        batch = (plane // bias_heads + loop // loops_heads).to(tl.int64)
        head = (plane % bias_heads + loop % loops_heads).to(tl.int64)
        head_kv = ((plane % bias_heads + loop % loops_heads) // groups).to(tl.int64)
        x = Scores(
            batch, head, (batch * heads + head) * seqlen_q, seqlen_q, seqlen_k, base_of(seqlen_q, seqlen_k, TOP_LEFT),
            slope_of(slopes_ptr, slopes_stride, batch, head), scale, padding_ptr, padding_stride,
            mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q,
            bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q,
            distance_bias_ptr, max_distance, slopes_ptr, slopes_stride, window_left, window_right, softcap,
            seed, threshold, keep_scale, DROPOUT,
        )  # fmt: skip
        begin, end = query_range(start_k, x, BLOCK_Q, BLOCK_K)
        if ROWS:
            begin, end = tl.maximum(begin, own_q), tl.minimum(end, own_q + BLOCK_Q)
        for start_q in tl.range(begin, end, BLOCK_Q, disable_licm=BLOCK_D > 128):
            acc += _dz(
                start_q, start_k, index_q, index_k,
                q_ptr + batch * q_stride_b + head * q_stride_h,
                k_ptr + batch * k_stride_b + head_kv * k_stride_h,
                v_ptr + batch * v_stride_b + head_kv * v_stride_h,
                dout_ptr + batch * dout_stride_b + head * dout_stride_h,
                lse_log2_ptr + (batch * heads + head) * padded, delta_ptr + (batch * heads + head) * padded,
                q_stride_s, k_stride_s, v_stride_s, dout_stride_s, x,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
    j = start_k + index_k
    dbias_ptr += rest.to(tl.int64) * rows * seqlen_k
    if ROWS:
        i = own_q + index_q
        at = dbias_ptr + i.to(tl.int64)[:, None] * seqlen_k + j[None, :]
        tl.store(at, acc.to(dbias_ptr.dtype.element_ty), mask=(i < seqlen_q)[:, None] & (j < seqlen_k)[None, :])
    else:
        tl.store(dbias_ptr + j, tl.sum(acc, 0).to(dbias_ptr.dtype.element_ty), mask=j < seqlen_k)


@triton.jit(
    do_not_specialize=[
        "batches", "heads", "groups", "seqlen_q", "seqlen_k", "total_q", "first_diagonal", "diagonals", "split",
        "max_distance", "window_left", "window_right", "seed", "threshold",
    ]
)  # fmt: skip
def backward_distance_bias(
    q_ptr,  # (B, Hq, Sq, D)
    k_ptr,  # (B, Hkv, Sk, D)
    v_ptr,  # (B, Hkv, Sk, Dv)
    dout_ptr,  # (B, Hq, Sq, Dv)
    lse_log2_ptr,  # (B, Hq, padded) float32, contiguous
    delta_ptr,  # (B, Hq, padded) float32, contiguous
    line_ptr,  # (2, splits, Hq, (diagonals + 1) BLOCK) float32, contiguous: see the end of the kernel
    batches, heads, groups,
    seqlen_q, seqlen_k,  # the longest sequence's
    padded, scale,
    first_diagonal, diagonals,
    split,  # how many sequences one program sums
    line_stride,  # between the two halves of line_ptr
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, total_q,  # as in the forward kernel, to keep_scale
    padding_ptr, padding_stride,
    mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q,
    bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q,
    distance_bias_ptr, max_distance,
    slopes_ptr, slopes_stride,
    window_left, window_right, softcap,
    seed: tl.uint64, threshold: tl.uint32, keep_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    TOP_LEFT: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All blocks of one head whose first query and first key are ``n`` BLOCK apart, in ``split`` sequences."""
    if WIDE:
        q_stride_s, k_stride_s = tl.cast(q_stride_s, tl.int64), tl.cast(k_stride_s, tl.int64)
        v_stride_s, dout_stride_s = tl.cast(v_stride_s, tl.int64), tl.cast(dout_stride_s, tl.int64)
    place = tl.program_id(0) % diagonals
    plane = tl.program_id(0) // diagonals
    head = (plane % heads).to(tl.int64)
    head_kv = (plane % heads // groups).to(tl.int64)
    apart = (first_diagonal + place) * BLOCK
    longest_q, longest_k = seqlen_q, seqlen_k
    index = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    first_batch = plane // heads * split
    last_batch = tl.minimum(first_batch + split, batches)
    for b in tl.range(first_batch, last_batch, disable_licm=BLOCK_D > 128):
        batch = tl.cast(b, tl.int64)
        begin_q, length_q = sequence(cu_seqlens_q_ptr, batch, longest_q)
        begin_k, length_k = sequence(cu_seqlens_k_ptr, batch, longest_k)
        row = first_row(batch, head, heads, begin_q, length_q, total_q)
        statistics = row
        if total_q is None:
            statistics = (batch * heads + head) * padded
        x = Scores(
            batch, head, row, length_q, length_k, base_of(length_q, length_k, TOP_LEFT),
            slope_of(slopes_ptr, slopes_stride, batch, head), scale, padding_ptr, padding_stride,
            mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q,
            bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q,
            distance_bias_ptr, max_distance, slopes_ptr, slopes_stride, window_left, window_right, softcap,
            seed, threshold, keep_scale, DROPOUT,
        )  # fmt: skip
        # Blocks of keys begin at multiples of BLOCK, as dropout needs it, so blocks of queries begin anywhere.
        shift = x.base + apart
        begin = tl.cdiv(tl.maximum(shift - BLOCK + 1, 0), BLOCK) * BLOCK
        end = tl.minimum(length_k, length_q + shift)
        for start_k in tl.range(begin, end, BLOCK, disable_licm=BLOCK_D > 128):
            acc += _dz(
                start_k - shift, start_k, index, index,
                q_ptr + batch * q_stride_b + head * q_stride_h + tl.cast(begin_q, tl.int64) * q_stride_s,
                k_ptr + batch * k_stride_b + head_kv * k_stride_h + tl.cast(begin_k, tl.int64) * k_stride_s,
                v_ptr + batch * v_stride_b + head_kv * v_stride_h + tl.cast(begin_k, tl.int64) * v_stride_s,
                dout_ptr + batch * dout_stride_b + head * dout_stride_h + tl.cast(begin_q, tl.int64) * dout_stride_s,
                lse_log2_ptr + statistics, delta_ptr + statistics,
                q_stride_s, k_stride_s, v_stride_s, dout_stride_s, x,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK, BLOCK,
            )  # fmt: skip
    # Element (r, c) is at distance apart + c - r. With row r turned left by r, column c holds the distance apart + c
    # and, where the turn wrapped around, apart + c - BLOCK. A line of the output begins at the distance
    # (first_diagonal - 1) BLOCK; its two halves, which the caller adds, are there so that no two programs share a word.
    turned = (index[None, :] + index[:, None]) % BLOCK
    acc = tl.gather(acc, turned, 1)
    wrapped = index[None, :] + index[:, None] >= BLOCK
    line_ptr += (plane.to(tl.int64) * (diagonals + 1) + place) * BLOCK + index
    tl.store(line_ptr + BLOCK, tl.sum(tl.where(wrapped, 0.0, acc), 0))
    tl.store(line_ptr + line_stride, tl.sum(tl.where(wrapped, acc, 0.0), 0))
