"""Rotary position embedding of q and k in one launch; the formula is in csrc/include/fastformer.h.

A program loads the cosines and sines of a few positions once and turns them into every head of its share of q's and k's
heads, so the table costs little beside the one read and one write of q and k. A position outside the table makes its
heads NaN: finding it earlier would mean waiting for the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense_like
from .launch import DTYPES as DTYPES
from .launch import TYPES, Configuration, launch, program_limit

FEATURES: frozenset[str] = frozenset()

TILE = 1024  # positions times pairs that a program turns at once
NUM_WARPS = 4


@triton.jit
def _turn(x0, x1, cos, sin, dtype: tl.constexpr):
    x0, x1 = x0.to(tl.float32), x1.to(tl.float32)
    return (x0 * cos - x1 * sin).to(dtype), (x1 * cos + x0 * sin).to(dtype)


@triton.jit
def _turn_heads(
    x_ptr, out_ptr, first, last, x_stride_h, x_stride_s, out_stride_h, out_stride_s, s, in_row, cos, sin, half,
    head_dim, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    pair = tl.arange(0, BLOCK_HALF)
    for h in tl.range(first, last):
        x = x_ptr + h * x_stride_h + s[:, None] * x_stride_s
        out = out_ptr + h * out_stride_h + s[:, None] * out_stride_s
        if INTERLEAVED:
            both = tl.arange(0, 2 * BLOCK_HALF)
            mask = in_row[:, None] & (both < 2 * half)[None, :]
            pairs = tl.load(x + both[None, :], mask=mask, other=0.0)
            x0, x1 = tl.split(tl.reshape(pairs, (pairs.shape[0], BLOCK_HALF, 2)))
            y0, y1 = _turn(x0, x1, cos, sin, dtype)
            tl.store(out + both[None, :], tl.reshape(tl.join(y0, y1), (pairs.shape[0], 2 * BLOCK_HALF)), mask=mask)
        else:
            mask = in_row[:, None] & (pair < half)[None, :]
            x0 = tl.load(x + pair[None, :], mask=mask, other=0.0)
            x1 = tl.load(x + half + pair[None, :], mask=mask, other=0.0)
            y0, y1 = _turn(x0, x1, cos, sin, dtype)
            tl.store(out + pair[None, :], y0, mask=mask)
            tl.store(out + half + pair[None, :], y1, mask=mask)
        if BLOCK_REST > 0:
            rest = 2 * half + tl.arange(0, BLOCK_REST)
            mask = in_row[:, None] & (rest < head_dim)[None, :]
            tl.store(out + rest[None, :], tl.load(x + rest[None, :], mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["seqlen", "positions", "offset", "batch_offset", "heads", "kv_heads", "shares"])
def _rotate(
    q_ptr,  # (B, heads, seqlen, head_dim), contiguous in the last dimension
    q_out_ptr,  # likewise; may be q_ptr
    k_ptr,  # (B, kv_heads, seqlen, head_dim) or None
    k_out_ptr,
    cos_ptr,  # (positions, half), rows cos_stride apart
    sin_ptr,
    ids_ptr,  # (B, seqlen) int64, or None: position s of sequence b is offset + b * batch_offset + s
    heads,
    kv_heads,
    seqlen,
    head_dim,
    half,
    positions,
    offset,
    batch_offset,
    shares,
    q_stride_b, q_stride_h, q_stride_s,
    q_out_stride_b, q_out_stride_h, q_out_stride_s,
    k_stride_b, k_stride_h, k_stride_s,
    k_out_stride_b, k_out_stride_h, k_out_stride_s,
    cos_stride, sin_stride,
    ids_stride_b, ids_stride_s,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,  # 0: nothing to copy
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """A few positions of one sequence, and one of `shares` shares of its heads."""
    program = tl.program_id(0).to(tl.int64)
    share = program % shares
    blocks = tl.cdiv(seqlen, BLOCK_ROWS)
    b = program // shares // blocks
    s = program // shares % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    pair = tl.arange(0, BLOCK_HALF)
    in_row = s < seqlen
    if ids_ptr is None:
        position = offset + b * batch_offset + s
    else:
        position = tl.load(ids_ptr + b * ids_stride_b + s * ids_stride_s, mask=in_row, other=0)
    inside = in_row & (position >= 0) & (position < positions)
    mask = inside[:, None] & (pair < half)[None, :]
    cos = tl.load(cos_ptr + position[:, None] * cos_stride + pair[None, :], mask=mask, other=float("nan")).to(
        tl.float32
    )
    sin = tl.load(sin_ptr + position[:, None] * sin_stride + pair[None, :], mask=mask, other=float("nan")).to(
        tl.float32
    )
    if INVERSE:
        sin = -sin
    _turn_heads(
        q_ptr + b * q_stride_b, q_out_ptr + b * q_out_stride_b, heads * share // shares, heads * (share + 1) // shares,
        q_stride_h, q_stride_s, q_out_stride_h, q_out_stride_s, s, in_row, cos, sin, half, head_dim,
        BLOCK_HALF, BLOCK_REST, INTERLEAVED,
    )  # fmt: skip
    if k_ptr is not None:
        _turn_heads(
            k_ptr + b * k_stride_b, k_out_ptr + b * k_out_stride_b,
            kv_heads * share // shares, kv_heads * (share + 1) // shares,
            k_stride_h, k_stride_s, k_out_stride_h, k_out_stride_s, s, in_row, cos, sin, half, head_dim,
            BLOCK_HALF, BLOCK_REST, INTERLEAVED,
        )  # fmt: skip


def _blocks(half: int, head_dim: int, copies: bool) -> tuple[int, int, int]:
    """(positions, pairs, elements that are copied) of a program."""
    block_half = triton.next_power_of_2(half)
    rest = head_dim - 2 * half
    return max(1, TILE // block_half), block_half, triton.next_power_of_2(rest) if copies and rest else 0


def forward(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offset: int,
    batch_offset: int,
    interleaved: bool,
    inverse: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    """q, k (B, H, S, D) or None, cos, sin (positions, R / 2), position_ids (B, S) int64 or None: the rotated."""
    batch, heads, seqlen, head_dim = q.shape
    half, kv_heads = cos.shape[1], 0 if k is None else k.shape[1]
    q_out = q if inplace else dense_like(q)
    k_out = k if inplace or k is None else dense_like(k)
    block_rows, block_half, block_rest = _blocks(half, head_dim, not inplace)
    tiles = batch * triton.cdiv(seqlen, block_rows)
    shares = max(1, min(heads, 8 * program_limit(q.device) // max(tiles, 1)))
    strides = [n for x in (q, q_out, k, k_out) for n in ((0, 0, 0) if x is None else x.stride()[:3])]
    ids_strides = (0, 0) if position_ids is None else position_ids.stride()
    launch(
        _rotate, (tiles * shares,), q.device,
        q, q_out, k, k_out, cos, sin, position_ids, heads, kv_heads, seqlen, head_dim, half, len(cos), offset,
        batch_offset, shares, *strides, cos.stride(0), sin.stride(0), *ids_strides,
        BLOCK_ROWS=block_rows, BLOCK_HALF=block_half, BLOCK_REST=block_rest, INTERLEAVED=interleaved, INVERSE=inverse,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return q_out, k_out


def configurations() -> Iterator[Configuration]:
    """Head sizes of models, whole and partly rotated, both orders, with and without k and ids."""
    loose = frozenset({"heads", "kv_heads", "seqlen", "positions", "offset", "batch_offset", "shares", "ids_stride_b"})
    for kind in sorted(TYPES.values()):
        data = f"*{kind}"
        for head_dim, rotary_dim in ((64, 64), (128, 128), (256, 64), (80, 32), (256, 256)):
            for interleaved, with_k, ids in ((False, True, None), (True, True, "*i64"), (False, False, "*i64")):
                other = data if with_k else None
                table = "*fp32" if with_k else data
                types = {"q_ptr": data, "q_out_ptr": data, "k_ptr": other, "k_out_ptr": other}
                types |= {"cos_ptr": table, "sin_ptr": table, "ids_ptr": ids}
                rows, half, rest = _blocks(rotary_dim // 2, head_dim, True)
                constants = {"BLOCK_ROWS": rows, "BLOCK_HALF": half, "BLOCK_REST": rest, "INTERLEAVED": interleaved}
                order = "interleaved" if interleaved else "halves"
                yield Configuration(
                    _rotate,
                    f"rotary {kind} D={head_dim} R={rotary_dim} {order}{'' if with_k else ' q alone'}",
                    types,
                    {**constants, "INVERSE": not with_k},
                    NUM_WARPS,
                    unaligned=loose | {"ids_stride_s"},
                )
