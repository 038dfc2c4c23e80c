"""The Triton kernels of decode_attention.py, where the formulas are.

One program of ``decode`` owns the queries of up to BLOCK_M rows (query heads that share a key/value head, times new
positions) and one part of a sequence's keys; ``merge`` adds the parts up. Scores are kept in units of log2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x):
    """tanh to a few units in the last place. Near 0 a polynomial, because 1 - 2 / (e^2x + 1) cancels there."""
    z = x * x
    near = (((z * -5.70498872745e-3 + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    near = (near - 3.33332819422e-1) * z * x + x
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(tl.minimum(size, 40.0) * (2 * LOG2_E)) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit(
    do_not_specialize=["heads_kv", "groups", "seqlen_q", "cache_rows", "capacity", "window_left", "window_right"]
)
def decode(
    q_ptr,  # (B, Hq, Sq, D)
    k_ptr,  # (rows, Hkv, capacity, D), or (pages, Hkv, page_size, D)
    v_ptr,  # the same with Dv
    out_ptr,  # (splits, B, Hq, Sq, Dv) partial results, or the result
    lse_ptr,  # (splits, B, Hq, Sq) float32, contiguous
    seqlens_ptr,  # (B) int32
    leftpad_ptr,  # (B) int32 or None
    rows_ptr,  # (B) int32 or None
    pages_ptr,  # (B, pages of a sequence) int32 or None
    slopes_ptr,  # (B, Hq) float32 or None
    heads_kv, groups, seqlen_q, cache_rows, capacity, page_size, splits, scale, softcap, window_left, window_right,
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s,
    out_stride_split, out_stride_b, out_stride_h, out_stride_s,
    pages_stride, slopes_stride,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One block of rows of one (batch, key/value head), over one part of the keys that some query sees."""
    rows = groups * seqlen_q
    blocks = tl.cdiv(rows, BLOCK_M)
    split = tl.program_id(0) % splits
    plane = tl.program_id(0) // splits // blocks
    row = tl.program_id(0) // splits % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    batch, head_kv = (plane // heads_kv).to(tl.int64), plane % heads_kv
    is_row = row < rows
    head, query = head_kv * groups + row // seqlen_q, row % seqlen_q

    # What is out of range reads nothing and gives NaN.
    length = tl.load(seqlens_ptr + batch)
    first = 0
    if leftpad_ptr is not None:
        first = tl.load(leftpad_ptr + batch)
    valid = (length >= 0) & (length <= capacity) & (first >= 0)
    cache_row = batch
    if rows_ptr is not None:
        cache_row = tl.load(rows_ptr + batch).to(tl.int64)
    if pages_ptr is None:
        valid = valid & (cache_row >= 0) & (cache_row < cache_rows)
        k_ptr += tl.where(valid, cache_row, 0) * k_stride_b
        v_ptr += tl.where(valid, cache_row, 0) * v_stride_b
    k_ptr += head_kv.to(tl.int64) * k_stride_h
    v_ptr += head_kv.to(tl.int64) * v_stride_h
    length, first, bad = tl.where(valid, length, 0), tl.where(valid, first, 0), tl.where(valid, 0, 1)

    position = length - seqlen_q + query
    begin, end = first, length
    if LEFT:
        begin = tl.maximum(begin, length - seqlen_q - window_left)
    if RIGHT:
        end = tl.minimum(end, length + window_right)
    part = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_K), splits) * BLOCK_K
    begin = begin + split * part
    end = tl.minimum(end, begin + part)

    dim, dim_v, index = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_K)
    q = tl.load(
        q_ptr + batch * q_stride_b + head.to(tl.int64)[:, None] * q_stride_h
        + query.to(tl.int64)[:, None] * q_stride_s + dim[None, :],
        mask=is_row[:, None] & (dim < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * slopes_stride + head, mask=is_row, other=0.0) * LOG2_E
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(begin, end, BLOCK_K):
        j = start + index
        there = j < end
        if pages_ptr is not None:
            page = tl.load(pages_ptr + batch * pages_stride + j // page_size, mask=there, other=0).to(tl.int64)
            known = (page >= 0) & (page < cache_rows)
            read = there & known
            bad = tl.maximum(bad, tl.max((there & ~known).to(tl.int32), 0))
            k_row = page * k_stride_b + (j % page_size).to(tl.int64) * k_stride_s
            v_row = page * v_stride_b + (j % page_size).to(tl.int64) * v_stride_s
        else:
            read = there
            k_row, v_row = j.to(tl.int64) * k_stride_s, j.to(tl.int64) * v_stride_s
        k = tl.load(
            k_ptr + k_row[:, None] + dim[None, :], mask=read[:, None] & (dim < HEAD_DIM)[None, :], other=0.0
        )  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            s = _tanh(s / softcap) * softcap
        s = s * LOG2_E
        distance = j[None, :] - position[:, None]
        if slopes_ptr is not None:
            s -= slope[:, None] * tl.abs(distance).to(tl.float32)
        seen = there[None, :]
        if CAUSAL:
            seen = seen & (distance <= 0)
        if LEFT:
            seen = seen & (distance >= -window_left)
        if RIGHT:
            seen = seen & (distance <= window_right)
        s = tl.where(seen, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(row_max - shift)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        v = tl.load(
            v_ptr + v_row[:, None] + dim_v[None, :], mask=read[:, None] & (dim_v < HEAD_DIM_V)[None, :], other=0.0
        )  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        row_max = new_max
    row_sum = tl.where(bad == 0, row_sum, float("nan"))
    some = row_sum != 0  # also NaN, which must come out as NaN
    divisor = tl.where(some, row_sum, 1.0)
    lse = tl.where(some, (row_max + tl.log2(divisor)) * LN_2, float("-inf"))
    lse = tl.where(row_sum == row_sum, lse, float("nan"))
    batches = tl.num_programs(0) // splits // blocks // heads_kv
    lse_row = ((split.to(tl.int64) * batches + batch) * heads_kv * groups + head) * seqlen_q + query
    tl.store(lse_ptr + lse_row, lse, mask=is_row)
    out_ptr += split.to(tl.int64) * out_stride_split + batch * out_stride_b
    tl.store(
        out_ptr + head.to(tl.int64)[:, None] * out_stride_h
        + query.to(tl.int64)[:, None] * out_stride_s + dim_v[None, :],
        (acc / divisor[:, None]).to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & (dim_v < HEAD_DIM_V)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "seqlen_q", "splits"])
def merge(
    part_ptr,  # (splits, B, Hq, Sq, Dv) float32, contiguous
    part_lse_ptr,  # (splits, B, Hq, Sq) float32, contiguous
    out_ptr,  # (B, Hq, Sq, Dv)
    lse_ptr,  # (B, Hq, Sq) float32, contiguous
    heads, seqlen_q, splits,
    out_stride_b, out_stride_h, out_stride_s,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """One row: its parts weighted by exp(lse of the part - lse)."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    dim, split = tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_SPLITS)
    lses = tl.load(part_lse_ptr + split * rows + row, mask=split < splits, other=float("-inf"))
    top = tl.max(tl.where(lses == lses, lses, float("-inf")), 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2((lses - shift) * LOG2_E)  # NaN where a part is
    total = tl.sum(weights, 0)
    parts = tl.load(
        part_ptr + (split * rows + row)[:, None] * HEAD_DIM_V + dim[None, :],
        mask=(split < splits)[:, None] & (dim < HEAD_DIM_V)[None, :], other=0.0,
    )  # fmt: skip
    some = total != 0
    divisor = tl.where(some, total, 1.0)
    out = tl.sum(parts * weights[:, None], 0) / divisor
    lse = tl.where(some, shift + tl.log2(divisor) * LN_2, float("-inf"))
    tl.store(lse_ptr + row, lse)
    batch, head, query = row // seqlen_q // heads, row // seqlen_q % heads, row % seqlen_q
    out_ptr += batch * out_stride_b + head * out_stride_h + query * out_stride_s
    tl.store(out_ptr + dim, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM_V)
