"""What the attention kernels share: blocks of positions in and out, and what happens to a score before the softmax.

    s = cap(scale q k^T) + bias + distance_bias - slope |j - p(i)|,   cap(x) = softcap tanh(x / softcap),   or -inf

Everything optional is a pointer or number that may be None. Triton compiles a kernel anew for each pattern of None, so
that a call pays for what it uses and for nothing else. Scores are in units of log2: exp2 is what the hardware has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .dropout import keep_mask

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Scores(NamedTuple):
    """What happens to the scores of one head of one sequence; what a kernel is not given is None."""

    batch: Any  # int64, as head and row
    head: Any
    row: Any  # the first query's row number for dropout
    seqlen_q: Any
    seqlen_k: Any
    base: Any  # query i sits at position p(i) = i + base
    slope: Any  # read where there are slopes_ptr
    scale: Any
    padding_ptr: Any
    padding_stride: Any
    mask_ptr: Any
    mask_stride_b: Any
    mask_stride_h: Any
    mask_stride_q: Any  # None = the same for all queries, likewise of bias
    bias_ptr: Any
    bias_stride_b: Any
    bias_stride_h: Any
    bias_stride_q: Any
    distance_bias_ptr: Any
    max_distance: Any
    slopes_ptr: Any
    slopes_stride: Any
    window_left: Any
    window_right: Any  # causal is 0
    softcap: Any
    seed: Any
    threshold: Any
    keep_scale: Any
    dropout: Any  # whether there is any


@triton.jit
def load_block(
    ptr,  # position 0 of one (batch, head)
    start,  # first position
    index,  # (BLOCK) 0, 1, ...
    length,  # positions there are
    stride,  # between positions
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHECK: tl.constexpr,  # whether the block may reach past `length`
    BELOW: tl.constexpr = False,  # whether `start` may be negative
    first_dim=0,  # a multiple of BLOCK_DIM
):
    """(BLOCK, BLOCK_DIM) of consecutive positions; zeros where there are none and beyond ``HEAD_DIM``."""
    dim = first_dim + tl.arange(0, BLOCK_DIM)
    block = ptr + tl.cast(start, tl.int64) * stride + (index[:, None] * stride + dim[None, :])
    if CHECK:
        mask = (start + index < length)[:, None]
        if BELOW:
            mask = mask & (start + index >= 0)[:, None]
        if HEAD_DIM % BLOCK_DIM != 0:
            mask = mask & (dim < HEAD_DIM)[None, :]
        loaded = tl.load(block, mask=mask, other=0.0)
    else:
        if HEAD_DIM % BLOCK_DIM != 0:
            loaded = tl.load(block, mask=(dim < HEAD_DIM)[None, :], other=0.0)
        else:
            loaded = tl.load(block)
    return loaded


@triton.jit
def products(
    a,  # (BLOCK_A, BLOCK_DIM), what load_block makes of the next five
    a_ptr, a_start, a_index, a_length, a_stride,
    b,  # (BLOCK_B, BLOCK_DIM), likewise
    b_ptr, b_start, b_index, b_length, b_stride,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, CHECK_A: tl.constexpr, CHECK_B: tl.constexpr,
    BELOW_A: tl.constexpr = False, SLICE: tl.constexpr = 32,
):  # fmt: skip
    """(BLOCK_A, BLOCK_B) of a b^T.

    Without a matrix instruction a thread holds whole rows of both operands in registers, more than it has. Float32 is
    therefore multiplied in slices of the head dimension, which are read again, from the cache.
    """
    if a.dtype == tl.float32 and BLOCK_DIM > SLICE:
        ab = tl.zeros([a_index.shape[0], b_index.shape[0]], tl.float32)
        for dim in tl.range(0, HEAD_DIM, SLICE):
            some_a = load_block(a_ptr, a_start, a_index, a_length, a_stride, HEAD_DIM, SLICE, CHECK_A, BELOW_A, dim)
            some_b = load_block(b_ptr, b_start, b_index, b_length, b_stride, HEAD_DIM, SLICE, CHECK_B, False, dim)
            ab = tl.dot(some_a, tl.trans(some_b), ab, input_precision="ieee")
    else:
        ab = tl.dot(a, tl.trans(b), input_precision="ieee")
    return ab


@triton.jit
def store_block(ptr, start, index, length, stride, value, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    dim = tl.arange(0, BLOCK_DIM)
    block = ptr + tl.cast(start, tl.int64) * stride + (index[:, None] * stride + dim[None, :])
    mask = (start + index < length)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(block, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def sequence(cu_seqlens_ptr, batch, seqlen):
    """(position at which a sequence begins, its length); without packing every sequence begins at 0."""
    begin = 0
    if cu_seqlens_ptr is not None:
        begin = tl.load(cu_seqlens_ptr + batch)
        seqlen = tl.load(cu_seqlens_ptr + batch + 1) - begin
    return begin, seqlen


@triton.jit
def first_row(batch, head, heads, begin_q, seqlen_q, total_q):
    """The number of a sequence's first row of one head: among all sequences, or among ``total_q`` packed positions."""
    if total_q is not None:
        row = tl.cast(head, tl.int64) * total_q + begin_q
    else:
        row = (tl.cast(batch, tl.int64) * heads + head) * seqlen_q
    return row


@triton.jit
def base_of(seqlen_q, seqlen_k, TOP_LEFT: tl.constexpr):
    """The position of query 0."""
    base = 0
    if not TOP_LEFT:
        base = seqlen_k - seqlen_q
    return base


@triton.jit
def slope_of(slopes_ptr, slopes_stride, batch, head):
    slope = 0.0
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * slopes_stride + head)
    return slope


@triton.jit
def _tanh(x):
    """To a few units in the last place. The quotient alone would lose the small values, which are most of them."""
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    y = x * x
    series = y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835 + y * (-1382.0 / 155925)))))
    return tl.where(y < 0.1225, x + x * series, tl.where(x < 0, -large, large))


@triton.jit
def _of_query_and_key(ptr, stride, i, j, x, TAIL: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Elements (i, j) of a mask or bias, zeros beyond the last key; of a query that is not there, another's."""
    if stride is None:
        if TAIL:
            loaded = tl.load(ptr + j, mask=j < x.seqlen_k, other=0)
        else:
            loaded = tl.load(ptr + j)
        loaded = _along_keys(loaded, TRANSPOSED)
    else:
        row = tl.minimum(tl.maximum(i, 0), x.seqlen_q - 1).to(tl.int64) * stride
        at = ptr + _along_queries(row, TRANSPOSED) + _along_keys(j, TRANSPOSED)
        if TAIL:
            loaded = tl.load(at, mask=_along_keys(j < x.seqlen_k, TRANSPOSED), other=0)
        else:
            loaded = tl.load(at)
    return loaded


@triton.jit
def _along_queries(t, TRANSPOSED: tl.constexpr):
    return t[None, :] if TRANSPOSED else t[:, None]


@triton.jit
def _along_keys(t, TRANSPOSED: tl.constexpr):
    return t[:, None] if TRANSPOSED else t[None, :]


@triton.jit
def scored(
    qk,  # (BLOCK_Q, BLOCK_K) of q k^T; TRANSPOSED: (BLOCK_K, BLOCK_Q)
    i,  # (BLOCK_Q) int32, the queries
    j,  # (BLOCK_K) int32, the keys
    x,  # Scores
    TAIL: tl.constexpr,  # whether keys may reach past seqlen_k
    EDGE: tl.constexpr,  # whether the window may hide something
    TRANSPOSED: tl.constexpr = False,
):
    """(the scores in units of log2, tanh of the uncapped ones where there is a cap). In transposed blocks keys beyond
    the last are not hidden: they are whole rows, of which the caller stores nothing."""
    if x.softcap is not None:
        tanh = _tanh(qk * (x.scale / x.softcap))
        s = tanh * (x.softcap * LOG2_E)
    else:
        tanh = qk
        s = qk * (x.scale * LOG2_E)
    query, key = _along_queries(i, TRANSPOSED), _along_keys(j, TRANSPOSED)
    if x.bias_ptr is not None:
        bias_ptr = x.bias_ptr + x.batch * x.bias_stride_b + x.head * x.bias_stride_h
        s += _of_query_and_key(bias_ptr, x.bias_stride_q, i, j, x, TAIL, TRANSPOSED).to(tl.float32) * LOG2_E
    if x.distance_bias_ptr is not None:
        table_ptr = x.distance_bias_ptr + x.head * (2 * x.max_distance + 1) + x.max_distance
        distance = tl.minimum(tl.maximum(key - (query + x.base), -x.max_distance), x.max_distance)
        s += tl.load(table_ptr + distance) * LOG2_E
    if x.slopes_ptr is not None:
        s -= x.slope * LOG2_E * tl.abs(key - (query + x.base)).to(tl.float32)
    if TAIL and not TRANSPOSED:
        s = tl.where(key < x.seqlen_k, s, float("-inf"))
    if EDGE:
        if x.window_right is not None:
            s = tl.where(key <= query + (x.base + x.window_right), s, float("-inf"))
        if x.window_left is not None:
            s = tl.where(key >= query + (x.base - x.window_left), s, float("-inf"))
    if x.padding_ptr is not None:
        padding_ptr = x.padding_ptr + x.batch * x.padding_stride
        s = tl.where(_of_query_and_key(padding_ptr, None, i, j, x, TAIL, TRANSPOSED) != 0, float("-inf"), s)
    if x.mask_ptr is not None:
        mask_ptr = x.mask_ptr + x.batch * x.mask_stride_b + x.head * x.mask_stride_h
        visible = _of_query_and_key(mask_ptr, x.mask_stride_q, i, j, x, TAIL, TRANSPOSED)
        s = tl.where(visible != 0, s, float("-inf"))
    return s, tanh


@triton.jit
def kept(x, i, start_k, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_Q, BLOCK_K) of booleans, True where dropout keeps a probability; ``start_k`` is a multiple of 32."""
    return keep_mask(x.seed, x.threshold, x.row + i, start_k, BLOCK_Q, BLOCK_K)


@triton.jit
def key_ranges(start_q, x, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """(begin, full_begin, full_end, end): the queries from ``start_q`` on see nothing outside [begin, end) and, as far
    as the window is concerned, all of [full_begin, full_end), which may be empty."""
    begin, full_begin, full_end, end = 0, 0, x.seqlen_k, x.seqlen_k
    if x.window_left is not None:
        first = start_q + x.base - x.window_left
        begin = tl.maximum(first, 0) // BLOCK_K * BLOCK_K
        full_begin = tl.cdiv(tl.maximum(first + BLOCK_Q - 1, 0), BLOCK_K) * BLOCK_K
    if x.window_right is not None:
        last = start_q + x.base + x.window_right
        full_end = tl.minimum(x.seqlen_k, tl.maximum(last + 1, 0))
        end = tl.minimum(x.seqlen_k, tl.maximum(last + BLOCK_Q, 0))
    return begin, full_begin, full_end // BLOCK_K * BLOCK_K, end


@triton.jit
def query_range(start_k, x, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """(begin, end), begin a multiple of BLOCK_Q: no query outside sees a key of the block from ``start_k`` on."""
    begin, end = 0, x.seqlen_q
    if x.window_right is not None:
        begin = tl.maximum(start_k - (x.base + x.window_right), 0) // BLOCK_Q * BLOCK_Q
    if x.window_left is not None:
        end = tl.minimum(x.seqlen_q, tl.maximum(start_k + BLOCK_K - (x.base - x.window_left), 0))
    return begin, end
