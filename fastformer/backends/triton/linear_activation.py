"""A feed-forward's first matmul with its epilogue, and the backward pass of both, each one kernel.

Forward   gate = x w1^T, up = x w_up^T;  out = dropout(act(gate + b1) * (up + b_up)); gate and up stored if asked for.
Backward  d = dout w2;  dgate, dup as in activation.py from the stored gate and up; sums of both over the rows of each
          tile, added up by column_sum.py in a fixed order.

The hidden tensor is written once (two or three times in training) and not read again; the library's matmul followed by
the epilogue of activation.py writes it, reads it and writes it. Floor: 2 rows K F operations per product, K the width
that is summed over. The library's inner loop may be the faster one: this runs where Triton is asked for by name.

bfloat16 and float16, products in float32 on the tensor cores. Programs walk down GROUP_ROWS tiles of rows before they
move to the next columns, so that neighbours share tiles of both operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import NO_DROPOUT, evaluate, keep_scales
from .column_sum import column_sum, partials
from .dropout import dropout
from .launch import TYPES, Configuration, capability, launch

DTYPES = frozenset({torch.bfloat16, torch.float16})


class Tile(NamedTuple):
    """A program's rows and columns of the result, the columns of the operands it multiplies at a time."""

    block_rows: int
    block_cols: int
    block_inner: int
    num_warps: int
    num_stages: int


# (capability, gated) -> tile; of two accumulators each is half as wide.
FORWARD_TILES = {
    (80, False): Tile(128, 128, 32, 8, 3),
    (80, True): Tile(128, 64, 32, 8, 3),
    (90, False): Tile(128, 128, 64, 8, 3),
    (90, True): Tile(128, 64, 64, 8, 3),
}
BACKWARD_TILES = {
    (80, False): Tile(128, 64, 32, 8, 3),
    (80, True): Tile(64, 64, 32, 8, 3),  # 128 rows spill with biases and dropout
    (90, False): Tile(128, 64, 64, 8, 3),
    (90, True): Tile(128, 64, 64, 8, 3),
}
GROUP_ROWS = 8


@triton.jit
def _place(rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, GROUP_ROWS: tl.constexpr):
    """(tile of rows, tile of columns) of this program."""
    down, across = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(cols, BLOCK_COLS)
    program = tl.program_id(0)
    group = program // (GROUP_ROWS * across)
    height = tl.minimum(down - group * GROUP_ROWS, GROUP_ROWS)
    within = program % (GROUP_ROWS * across)
    return group * GROUP_ROWS + within % height, within // height


@triton.jit
def _load_operand(ptr, outer, inner, outer_stride, inner_stride, in_outer, in_inner):
    """(outer, inner) of a matrix, zeros outside."""
    offset = outer[:, None] * outer_stride + inner[None, :] * inner_stride
    return tl.load(ptr + offset, mask=in_outer[:, None] & in_inner[None, :], other=0.0)


@triton.jit
def _load_hidden(ptr, bias_ptr, offset, col, mask, in_col):
    z = tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def _forward(
    x_ptr,  # (rows, inner), rows x_stride apart
    w1_ptr,  # (cols, inner) with any strides
    w_up_ptr,  # (cols, inner) with the strides of w1, or None
    b1_ptr,  # (cols) or None
    b_up_ptr,  # (cols) or None
    out_ptr,  # (rows, cols) contiguous
    gate_ptr,  # (rows, cols) contiguous, or None
    up_ptr,  # (rows, cols) contiguous, or None
    rows,
    cols,
    inner,
    x_stride,
    w_stride,
    w_inner_stride,
    seed: tl.uint64,
    threshold: tl.uint32,
    keep_scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    KIND: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """One tile of the result."""
    down, across = _place(rows, cols, BLOCK_ROWS, BLOCK_COLS, GROUP_ROWS)
    row = down.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = across.to(tl.int64) * BLOCK_COLS
    col = start + tl.arange(0, BLOCK_COLS)
    in_row, in_col = row < rows, col < cols
    gate = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    up = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for first in tl.range(0, inner, BLOCK_INNER):
        k = first + tl.arange(0, BLOCK_INNER)
        x = _load_operand(x_ptr, row, k, x_stride, 1, in_row, k < inner)
        w1 = _load_operand(w1_ptr, col, k, w_stride, w_inner_stride, in_col, k < inner)
        gate = tl.dot(x, tl.trans(w1), gate)
        if w_up_ptr is not None:
            w_up = _load_operand(w_up_ptr, col, k, w_stride, w_inner_stride, in_col, k < inner)
            up = tl.dot(x, tl.trans(w_up), up)
    mask = in_row[:, None] & in_col[None, :]
    offset = row[:, None] * cols + col[None, :]
    if gate_ptr is not None:
        tl.store(gate_ptr + offset, gate.to(gate_ptr.dtype.element_ty), mask=mask)
    if b1_ptr is not None:
        gate += tl.load(b1_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
    out, _ = evaluate(gate, KIND)
    if w_up_ptr is not None:
        if up_ptr is not None:
            tl.store(up_ptr + offset, up.to(up_ptr.dtype.element_ty), mask=mask)
        if b_up_ptr is not None:
            up += tl.load(b_up_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
        out *= up
    if DROPOUT:
        out *= keep_scales(seed, threshold, keep_scale, row, start, BLOCK_ROWS, BLOCK_COLS)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def _backward(
    dout_ptr,  # (rows, inner), rows dout_stride apart
    w2_ptr,  # (inner, cols) with any strides
    gate_ptr,  # (rows, cols) contiguous
    up_ptr,  # (rows, cols) contiguous, or None
    b1_ptr,  # (cols) or None
    b_up_ptr,  # (cols) or None
    dgate_ptr,  # (rows, cols), rows dgate_stride apart
    dup_ptr,  # (rows, cols), likewise, or None
    db1_ptr,  # (tiles of rows, cols) float32 partial sums, or None
    db_up_ptr,  # (tiles of rows, cols) float32 partial sums, or None
    rows,
    cols,
    inner,
    dout_stride,
    w_inner_stride,
    w_stride,
    dgate_stride,
    seed: tl.uint64,
    threshold: tl.uint32,
    keep_scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    KIND: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """One tile of dgate and dup."""
    down, across = _place(rows, cols, BLOCK_ROWS, BLOCK_COLS, GROUP_ROWS)
    row = down.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = across.to(tl.int64) * BLOCK_COLS
    col = start + tl.arange(0, BLOCK_COLS)
    in_row, in_col = row < rows, col < cols
    d = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for first in tl.range(0, inner, BLOCK_INNER):
        k = first + tl.arange(0, BLOCK_INNER)
        dout = _load_operand(dout_ptr, row, k, dout_stride, 1, in_row, k < inner)
        w2 = _load_operand(w2_ptr, k, col, w_inner_stride, w_stride, k < inner, in_col)
        d = tl.dot(dout, w2, d)
    mask = in_row[:, None] & in_col[None, :]
    offset = row[:, None] * cols + col[None, :]
    if DROPOUT:
        d *= keep_scales(seed, threshold, keep_scale, row, start, BLOCK_ROWS, BLOCK_COLS)
    value, slope = evaluate(_load_hidden(gate_ptr, b1_ptr, offset, col, mask, in_col), KIND)
    target = row[:, None] * dgate_stride + col[None, :]
    sums = down.to(tl.int64) * cols + col
    if up_ptr is not None:
        dup = d * value
        tl.store(dup_ptr + target, dup.to(dup_ptr.dtype.element_ty), mask=mask)
        if db_up_ptr is not None:
            tl.store(db_up_ptr + sums, tl.sum(dup, 0), mask=in_col)
        d *= _load_hidden(up_ptr, b_up_ptr, offset, col, mask, in_col)
    d *= slope
    tl.store(dgate_ptr + target, d.to(dgate_ptr.dtype.element_ty), mask=mask)
    if db1_ptr is not None:
        tl.store(db1_ptr + sums, tl.sum(d, 0), mask=in_col)


def _options(tile: Tile, activation: str, dropout_p: float) -> dict[str, int | str | bool]:
    return {
        "BLOCK_ROWS": tile.block_rows,
        "BLOCK_COLS": tile.block_cols,
        "BLOCK_INNER": tile.block_inner,
        "GROUP_ROWS": GROUP_ROWS,
        "KIND": activation,
        "DROPOUT": dropout_p > 0,
    }


def _grid(tile: Tile, rows: int, cols: int) -> tuple[int]:
    return (triton.cdiv(rows, tile.block_rows) * triton.cdiv(cols, tile.block_cols),)


def _tile(tiles: dict[tuple[int, bool], Tile], device: torch.device, gated: bool) -> Tile:
    return tiles[90 if capability(device) == 90 else 80, gated]


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w_up: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: int,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x (rows, K), w1, w_up (F, K), b1, b_up (F) -> out, and if ``keep`` gate and up, else None: (rows, F)."""
    rows, cols = len(x), len(w1)
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    if w_up is not None and w_up.stride() != w1.stride():
        w1, w_up = w1.contiguous(), w_up.contiguous()
    out = x.new_empty(rows, cols)
    gate = torch.empty_like(out) if keep else None
    up = torch.empty_like(out) if keep and w_up is not None else None
    dropped = dropout(dropout_p, seed) if dropout_p > 0 else NO_DROPOUT
    tile = _tile(FORWARD_TILES, x.device, w_up is not None)
    launch(
        _forward, _grid(tile, rows, cols), x.device,
        x, w1, w_up, b1, b_up, out, gate, up, rows, cols, x.shape[1], x.stride(0), *w1.stride(), *dropped,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **_options(tile, activation, dropout_p),
    )  # fmt: skip
    return out, gate, up


def backward(
    dout: Tensor,
    w2: Tensor,
    gate: Tensor,
    b1: Tensor | None,
    up: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: int,
    need_db1: bool,
    need_db_up: bool,
    dgate: Tensor,
    dup: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """dout (rows, K), w2 (K, F) and the forward's gate and up (rows, F) -> dgate and dup, filled; (db1, db_up)."""
    rows, cols = gate.shape
    if dout.stride(1) != 1 and dout.shape[1] > 1:
        dout = dout.contiguous()
    tile = _tile(BACKWARD_TILES, dout.device, up is not None)
    needed = need_db1 + need_db_up
    partial = partials(needed, triton.cdiv(rows, tile.block_rows), cols, dout.device) if needed else None
    dropped = dropout(dropout_p, seed) if dropout_p > 0 else NO_DROPOUT
    launch(
        _backward, _grid(tile, rows, cols), dout.device,
        dout, w2, gate, up, b1, b_up, dgate, dup,
        partial[0] if partial is not None and need_db1 else None,
        partial[-1] if partial is not None and need_db_up else None,
        rows, cols, dout.shape[1], dout.stride(0), *w2.stride(), dgate.stride(0), *dropped,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **_options(tile, activation, dropout_p),
    )  # fmt: skip
    db1 = gate.new_empty(cols) if need_db1 else None
    db_up = gate.new_empty(cols) if need_db_up else None
    if partial is not None:
        column_sum(partial, *(t for t in (db1, db_up) if t is not None), *([None] if needed == 1 else []))
    return db1, db_up


def configurations() -> Iterator[Configuration]:
    """Both kernels, plain and gated, for training, with the parts each is used with."""
    scalars = {"keep_scale": "fp32", "seed": "u64", "threshold": "u32"}
    for dtype in sorted(DTYPES, key=str):
        data = f"*{TYPES[dtype]}"
        for activation, gated, biases, drop in (
            ("gelu", False, True, 0.0),
            ("gelu_tanh", False, True, 0.1),
            ("silu", True, False, 0.0),
            ("gelu", True, True, 0.1),
        ):
            optional = dict.fromkeys(("w_up_ptr", "up_ptr", "dup_ptr"), data if gated else None)
            optional |= {"b1_ptr": data if biases else None, "b_up_ptr": data if biases and gated else None}
            optional |= {"db1_ptr": "*fp32" if biases else None, "db_up_ptr": "*fp32" if biases and gated else None}
            given = dict.fromkeys(("x_ptr", "w1_ptr", "out_ptr", "gate_ptr", "dout_ptr", "w2_ptr", "dgate_ptr"), data)
            for kernel, tiles in ((_forward, FORWARD_TILES), (_backward, BACKWARD_TILES)):
                types = {n: t for n, t in (given | optional | scalars).items() if n in kernel.arg_names}
                for sm in (80, 90):
                    tile = tiles[sm, gated]
                    label = "+".join([activation, *["gate"] * gated, *["bias"] * biases, *["dropout"] * (drop > 0)])
                    yield Configuration(
                        kernel,
                        f"linear_activation {kernel.__name__[1:]} {TYPES[dtype]} {label}",
                        types,
                        # the strides of nn.Linear's weights
                        _options(tile, activation, drop) | {"w_inner_stride" if kernel is _forward else "w_stride": 1},
                        tile.num_warps,
                        tile.num_stages,
                        capabilities=(sm,),
                        tensor_cores=True,
                        unaligned=frozenset({"rows", "seed", "threshold"}),
                        above_one=frozenset({"x_stride", "dout_stride", "inner", "cols"}),
                    )
