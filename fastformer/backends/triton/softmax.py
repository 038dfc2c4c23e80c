"""softmax(scale * x + bias + mask) over rows, or its logarithm, and the gradient.

    softmax:      dx = scale * out * (dout - sum(dout * out))
    log_softmax:  dx = scale * (dout - exp(out) * sum(dout))

Up to 32k columns a row is read once and stays in registers. Longer rows are read twice: the first time for the maximum
and the sum of exponentials together, kept per column of the block and rescaled as the maximum grows (Milakov,
Gimelshein 2018, arXiv:1805.02867), the second time to write. A row of only -inf gives zeros (-inf for the logarithm).

Mask and bias are read where they lie, by the strides of three leading dimensions, 0 where they are broadcast; backward
needs them for the logarithm alone, whose output has no value to tell a masked column by.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import row_layout
from .launch import DTYPES as DTYPES
from .launch import TYPES, UNBOUNDED, Configuration, RowTile, launch, row_tile, unit_stride

FEATURES = frozenset({"mask", "bias", "causal"})

FORWARD_TILES = (
    #       columns, rows, warps
    RowTile(32, 64, 4),
    RowTile(64, 32, 4),
    RowTile(128, 16, 4),
    RowTile(256, 8, 4),
    RowTile(512, 4, 4),
    RowTile(1024, 4, 8),
    RowTile(2048, 2, 8),
    RowTile(4096, 1, 4),
    RowTile(8192, 1, 8),
    RowTile(16384, 1, 16),
    RowTile(32768, 1, 32, itemsize=2),
    RowTile(UNBOUNDED, 1, 16, block_cols=8192),
)
BACKWARD_TILES = (
    RowTile(32, 64, 4),
    RowTile(64, 32, 4),
    RowTile(128, 16, 4),
    RowTile(256, 8, 4),
    RowTile(512, 4, 4),
    RowTile(1024, 4, 8),
    RowTile(2048, 2, 8),
    RowTile(4096, 1, 8),
    RowTile(8192, 1, 8),
    RowTile(16384, 1, 16),
    RowTile(UNBOUNDED, 1, 16, block_cols=8192),
)


@triton.jit
def _shift(maximum):
    """What to subtract before exponentiating: the maximum, or 0 where it is -inf (so that -inf - shift is not NaN)."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _offset(row, col, size1, size2, stride0, stride1, stride2, stride3):
    """Of an element of a mask or bias (size0, size1, size2, cols): row is row (i, j, k) of it."""
    i, j, k = row // (size1 * size2), row // size2 % size1, row % size2
    return (i * stride0 + j * stride1 + k * stride2)[:, None] + col[None, :] * stride3


@triton.jit
def _visible(
    row, col, inside, cols, mask_ptr, size1, size2, mask_0, mask_1, mask_2, mask_3, CAUSAL: tl.constexpr
):  # fmt: skip
    """Which elements of the block take part, beside lying inside the tensor."""
    if mask_ptr is not None:
        offset = _offset(row, col, size1, size2, mask_0, mask_1, mask_2, mask_3)
        inside = inside & (tl.load(mask_ptr + offset, mask=inside, other=0) != 0)
    if CAUSAL:
        inside = inside & (col[None, :] <= (row % size2 + (cols - size2))[:, None])
    return inside


@triton.jit
def _scores(
    x, row, col, inside, cols, scale, mask_ptr, bias_ptr, size1, size2, mask_0, mask_1, mask_2, mask_3,
    bias_0, bias_1, bias_2, bias_3, CAUSAL: tl.constexpr,
):  # fmt: skip
    z = x.to(tl.float32) * scale
    if bias_ptr is not None:
        offset = _offset(row, col, size1, size2, bias_0, bias_1, bias_2, bias_3)
        z += tl.load(bias_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    visible = _visible(row, col, inside, cols, mask_ptr, size1, size2, mask_0, mask_1, mask_2, mask_3, CAUSAL)
    return tl.where(visible, z, float("-inf"))


@triton.jit
def _store_forward(out_ptr, offset, z, shift, total, mask, LOG: tl.constexpr):
    if LOG:
        # total is 0 only in a row of -inf, where -inf - 0 - log(1) is the -inf that is wanted.
        out = z - shift[:, None] - tl.log(tl.where(total == 0, 1.0, total))[:, None]
    else:
        out = tl.exp(z - shift[:, None]) / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _forward_rows(
    x_ptr,  # (rows, cols), rows x_stride apart
    out_ptr,  # (rows, cols) contiguous
    mask_ptr,  # uint8 (rows / size1 / size2, size1, size2, cols), or None
    bias_ptr,  # the same in x's dtype or float32, or None
    rows,
    cols,
    x_stride,
    scale,
    size1,
    size2,
    mask_0,  # strides
    mask_1,
    mask_2,
    mask_3,
    bias_0,
    bias_1,
    bias_2,
    bias_3,
    CAUSAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,  # >= cols
    LOG: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_COLS)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
    z = _scores(
        x, row, col, mask, cols, scale, mask_ptr, bias_ptr, size1, size2, mask_0, mask_1, mask_2, mask_3,
        bias_0, bias_1, bias_2, bias_3, CAUSAL,
    )  # fmt: skip
    shift = _shift(tl.max(z, 1))
    total = tl.sum(tl.exp(z - shift[:, None]), 1)
    _store_forward(out_ptr, row[:, None] * cols + col[None, :], z, shift, total, mask, LOG)


@triton.jit(do_not_specialize=["rows"])
def _forward_chunks(
    x_ptr,  # (rows, cols), rows x_stride apart
    out_ptr,  # (rows, cols) contiguous
    mask_ptr,  # uint8 (rows / size1 / size2, size1, size2, cols), or None
    bias_ptr,  # the same in x's dtype or float32, or None
    rows,
    cols,
    x_stride,
    scale,
    size1,
    size2,
    mask_0,  # strides
    mask_1,
    mask_2,
    mask_3,
    bias_0,
    bias_1,
    bias_2,
    bias_3,
    CAUSAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,  # 1
    BLOCK_COLS: tl.constexpr,
    LOG: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_ROWS)
    maximum = tl.full([BLOCK_ROWS, BLOCK_COLS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for start in tl.range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS).to(tl.int64)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
        z = _scores(
            x, row, col, mask, cols, scale, mask_ptr, bias_ptr, size1, size2, mask_0, mask_1, mask_2, mask_3,
            bias_0, bias_1, bias_2, bias_3, CAUSAL,
        )  # fmt: skip
        grown = tl.maximum(maximum, z)
        shift = _shift(grown)
        total = total * tl.exp(maximum - shift) + tl.exp(z - shift)
        maximum = grown
    shift = _shift(tl.max(maximum, 1))
    row_total = tl.sum(total * tl.exp(maximum - shift[:, None]), 1)
    for start in tl.range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS).to(tl.int64)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
        z = _scores(
            x, row, col, mask, cols, scale, mask_ptr, bias_ptr, size1, size2, mask_0, mask_1, mask_2, mask_3,
            bias_0, bias_1, bias_2, bias_3, CAUSAL,
        )  # fmt: skip
        _store_forward(out_ptr, row[:, None] * cols + col[None, :], z, shift, row_total, mask, LOG)


@triton.jit
def _row_factor(dout, out, LOG: tl.constexpr):
    """The elements whose sum over a row enters every dx of it."""
    return dout if LOG else dout * out


@triton.jit
def _store_backward(dx_ptr, offset, dout, out, total, scale, mask, visible, LOG: tl.constexpr):
    if LOG:
        # In a row of -inf nothing was computed from x, so nothing flows back; elsewhere exp(-inf) is 0 by itself.
        dx = tl.where(visible, dout - tl.exp(out) * total[:, None], 0.0)
    else:
        dx = out * (dout - total[:, None])
    tl.store(dx_ptr + offset, (dx * scale).to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward_rows(
    dout_ptr,  # (rows, cols), rows dout_stride apart
    out_ptr,  # (rows, cols), rows out_stride apart
    dx_ptr,  # (rows, cols) contiguous
    mask_ptr,  # as in forward; None for softmax
    rows,
    cols,
    dout_stride,
    out_stride,
    scale,
    size1,
    size2,
    mask_0,
    mask_1,
    mask_2,
    mask_3,
    CAUSAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,  # >= cols
    LOG: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_COLS)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    empty = float("-inf") if LOG else 0.0
    dout = tl.load(dout_ptr + row[:, None] * dout_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + row[:, None] * out_stride + col[None, :], mask=mask, other=empty).to(tl.float32)
    if LOG:
        dout = tl.where((tl.max(out, 1) == float("-inf"))[:, None], 0.0, dout)
    total = tl.sum(_row_factor(dout, out, LOG), 1)
    visible = _visible(row, col, mask, cols, mask_ptr, size1, size2, mask_0, mask_1, mask_2, mask_3, CAUSAL)
    _store_backward(dx_ptr, row[:, None] * cols + col[None, :], dout, out, total, scale, mask, visible, LOG)


@triton.jit(do_not_specialize=["rows"])
def _backward_chunks(
    dout_ptr,  # (rows, cols), rows dout_stride apart
    out_ptr,  # (rows, cols), rows out_stride apart
    dx_ptr,  # (rows, cols) contiguous
    mask_ptr,  # as in forward; None for softmax
    rows,
    cols,
    dout_stride,
    out_stride,
    scale,
    size1,
    size2,
    mask_0,
    mask_1,
    mask_2,
    mask_3,
    CAUSAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,  # 1
    BLOCK_COLS: tl.constexpr,
    LOG: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_ROWS)
    empty = float("-inf") if LOG else 0.0
    factor = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    maximum = tl.full([BLOCK_ROWS, BLOCK_COLS], float("-inf"), tl.float32)
    for start in tl.range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS).to(tl.int64)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        dout = tl.load(dout_ptr + row[:, None] * dout_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        out = tl.load(out_ptr + row[:, None] * out_stride + col[None, :], mask=mask, other=empty).to(tl.float32)
        factor += _row_factor(dout, out, LOG)
        if LOG:
            maximum = tl.maximum(maximum, out)
    total = tl.sum(factor, 1)
    row_scale = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    if LOG:
        row_scale = tl.where(tl.max(maximum, 1) == float("-inf"), 0.0, 1.0)
    for start in tl.range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS).to(tl.int64)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        dout = tl.load(dout_ptr + row[:, None] * dout_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        out = tl.load(out_ptr + row[:, None] * out_stride + col[None, :], mask=mask, other=empty).to(tl.float32)
        offset = row[:, None] * cols + col[None, :]
        visible = _visible(row, col, mask, cols, mask_ptr, size1, size2, mask_0, mask_1, mask_2, mask_3, CAUSAL)
        _store_backward(dx_ptr, offset, dout, out, total, scale * row_scale[:, None], mask, visible, LOG)


def forward(
    x: Tensor,
    scale: float,
    log: bool,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    row_shape: tuple[int, int, int] | None = None,
    causal: bool = False,
) -> Tensor:
    """x (*, cols) -> out (*, cols); the rest as in backends/reference/softmax.py."""
    x = unit_stride(x)
    rows, cols, stride = row_layout(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = row_tile(FORWARD_TILES, cols, x.element_size() if row_shape is None else 4)
    _, size1, size2 = row_shape or (1, 1, 1)
    launch(
        _forward_rows if cols <= tile.block_cols else _forward_chunks, (triton.cdiv(rows, tile.block_rows),), x.device,
        x, out, _bytes(mask), bias, rows, cols, stride, float(scale), size1, size2, *_strides(mask), *_strides(bias),
        CAUSAL=causal, BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, LOG=log, num_warps=tile.num_warps,
    )  # fmt: skip
    return out


def backward(
    dout: Tensor,
    out: Tensor,
    scale: float,
    log: bool,
    mask: Tensor | None = None,
    row_shape: tuple[int, int, int] | None = None,
    causal: bool = False,
) -> Tensor:
    """dout, out (*, cols) -> dx (*, cols)."""
    if not log:
        mask, row_shape, causal = None, None, False
    dout, out = unit_stride(dout), unit_stride(out)
    rows, cols, stride = row_layout(out)
    dx = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    tile = row_tile(BACKWARD_TILES, cols, out.element_size())
    _, size1, size2 = row_shape or (1, 1, 1)
    launch(
        _backward_rows if cols <= tile.block_cols else _backward_chunks,
        (triton.cdiv(rows, tile.block_rows),), out.device,
        dout, out, dx, _bytes(mask), rows, cols, row_layout(dout)[2], stride, float(scale), size1, size2,
        *_strides(mask),
        CAUSAL=causal, BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, LOG=log, num_warps=tile.num_warps,
    )  # fmt: skip
    return dx


def _bytes(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None else mask.view(torch.uint8)


def _strides(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if t is None else t.stride()


def configurations() -> Iterator[Configuration]:
    """Every line of both tables in each dtype, softmax and log_softmax; and with everything that can be added."""
    for dtype, kind in sorted(TYPES.items(), key=str):
        types = dict.fromkeys(("x_ptr", "dout_ptr", "out_ptr", "dx_ptr"), f"*{kind}") | {"scale": "fp32"}
        for table, whole, chunks in (
            (FORWARD_TILES, _forward_rows, _forward_chunks),
            (BACKWARD_TILES, _backward_rows, _backward_chunks),
        ):
            for line, log, masked in itertools.product(table, (False, True), (False, True)):
                backward_of_softmax = table is BACKWARD_TILES and not log
                if (4 if masked else dtype.itemsize) > line.itemsize or (masked and backward_of_softmax):
                    continue
                kernel, cols = chunks if line.block_cols else whole, min(line.columns, 2**18)
                tile = row_tile(table, cols, 4 if masked else dtype.itemsize)
                added = {"mask_ptr": "*u8", "bias_ptr": "*fp32"} if masked else {"mask_ptr": None, "bias_ptr": None}
                yield Configuration(
                    kernel,
                    f"{'log_' if log else ''}softmax {kernel.__name__[1:]} {kind} {cols}{'+mask' if masked else ''}",
                    {name: kind for name, kind in (types | added).items() if name in kernel.arg_names},
                    {"BLOCK_ROWS": tile.block_rows, "BLOCK_COLS": tile.block_cols, "LOG": log, "CAUSAL": masked},
                    tile.num_warps,
                    unaligned=frozenset({"rows", "size1", "size2", "mask_2", "mask_3", "bias_2", "bias_3"}),
                )
