"""The Triton kernels of attention.py, where the formulas are.

One program of ``forward`` and ``backward_q`` owns a block of queries of one head and walks over the keys; one of
``backward_k`` owns a block of keys of one key/value head and walks over the queries of every head that reads it. Scores
are kept in units of log2, because exp2 is the instruction the hardware has.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


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
def forward(
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
def backward_q(
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
def backward_k(
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
