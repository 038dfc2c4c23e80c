"""Embedding: the rows of up to three tables added up, normalised and dropped out in one pass; formula in fastformer.h.

Forward reads the rows that are taken and writes as many. With a norm a program holds whole rows in registers (the
tiles are layer_norm.py's); rows longer than that go through layer_norm's own kernels. Backward of a norm gathers the
sum again and runs layer_norm's kernel on it. Then each table's gradient is written once, row by row, by the program
that owns the row: the indices are sorted (stably, so equal ones stay in order), a row's takers are one run of them,
and the program adds those up in that order. Nothing is added atomically, so the result repeats bit for bit. Of a table
of few rows, such as two segments, the runs are long: several programs share each, and column_sum.py adds their sums.
Floor: dout read once per table, each gradient written once.

An index outside its table makes its row of the output NaN, and gives no gradient: finding it earlier would mean waiting
for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..embedding_table import Table
from . import layer_norm
from .column_sum import column_sum
from .dropout import Dropout, dropout, keep_mask
from .launch import DTYPES as DTYPES
from .launch import TYPES, UNBOUNDED, Configuration, RowTile, launch, program_limit, row_tile, unit_stride

FEATURES = frozenset({"norm", "dropout"})

TILES = (
    #       columns, rows, warps
    RowTile(32, 64, 4),
    RowTile(64, 32, 4),
    RowTile(128, 16, 4),
    RowTile(256, 8, 4),
    RowTile(512, 4, 4),
    RowTile(UNBOUNDED, 2, 4, block_cols=1024),
)
# Takers a program adds up at once, and columns: of a table with many rows most have one taker or none.
SPARSE, DENSE = RowTile(UNBOUNDED, 1, 4, block_cols=1024), RowTile(UNBOUNDED, 16, 4, block_cols=128)


@triton.jit
def _gather(table_ptr, ids_ptr, size, stride, period, offset, row, col, in_row, in_col):
    place = row % period
    if ids_ptr is None:
        index = place + offset
    else:
        index = tl.load(ids_ptr + place, mask=in_row, other=0)
    inside = in_row & (index >= 0) & (index < size)
    mask = inside[:, None] & in_col[None, :]
    value = tl.load(table_ptr + index[:, None] * stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where((in_row & ~inside)[:, None] & in_col[None, :], float("nan"), value)


@triton.jit(
    do_not_specialize=[
        *("rows", "first_size", "second_size", "third_size", "first_period", "second_period", "third_period"),
        *("first_offset", "second_offset", "third_offset", "seed", "threshold"),
    ]
)
def _forward(
    first_ptr,  # (first_size, cols), rows first_stride apart
    second_ptr,  # likewise, or None
    third_ptr,  # likewise, or None
    first_ids_ptr,  # (first_period) int64, or None: the i-th index is first_offset + i
    second_ids_ptr,
    third_ids_ptr,
    weight_ptr,  # (cols) or None: the norm's
    bias_ptr,  # (cols) or None
    out_ptr,  # (rows, cols) contiguous
    mean_ptr,  # (rows) float32, with NORMALIZE
    rstd_ptr,  # (rows) float32
    rows,
    cols,
    first_size,
    second_size,
    third_size,
    first_stride,
    second_stride,
    third_stride,
    first_period,
    second_period,
    third_period,
    first_offset,
    second_offset,
    third_offset,
    scale,
    eps,
    seed: tl.uint64,
    threshold: tl.uint32,
    keep_scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,  # >= cols with NORMALIZE
    NORMALIZE: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """One tile; the column blocks of a row of tiles are neighbours in the grid."""
    blocks = tl.cdiv(cols, BLOCK_COLS)
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = program % blocks * BLOCK_COLS
    col = start + tl.arange(0, BLOCK_COLS)
    in_row, in_col = row < rows, col < cols
    x = _gather(
        first_ptr, first_ids_ptr, first_size, first_stride, first_period, first_offset, row, col, in_row, in_col
    )
    x *= scale
    if second_ptr is not None:
        x += _gather(
            second_ptr, second_ids_ptr, second_size, second_stride, second_period, second_offset,
            row, col, in_row, in_col,
        )  # fmt: skip
    if third_ptr is not None:
        x += _gather(
            third_ptr, third_ids_ptr, third_size, third_stride, third_period, third_offset,
            row, col, in_row, in_col,
        )  # fmt: skip
    if NORMALIZE:
        x = x.to(out_ptr.dtype.element_ty).to(tl.float32)  # backward gathers this very sum
        mean = tl.sum(x, 1) / cols
        centred = tl.where(in_col[None, :], x - mean[:, None], 0.0)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, 1) / cols + eps))
        tl.store(mean_ptr + row, mean, mask=in_row)
        tl.store(rstd_ptr + row, rstd, mask=in_row)
        x = centred * rstd[:, None]
        if weight_ptr is not None:
            x *= tl.load(weight_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
        if bias_ptr is not None:
            x += tl.load(bias_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        x = tl.where(keep_mask(seed, threshold, row, start, BLOCK_ROWS, BLOCK_COLS), x * keep_scale, 0.0)
    mask = in_row[:, None] & in_col[None, :]
    tl.store(out_ptr + row[:, None] * cols + col[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size", "period", "repeats", "padding_idx", "parts"])
def _sum_takers(
    dout_ptr,  # (rows, cols), rows dout_stride apart
    start_ptr,  # (size + 1) int64: row v was taken by the indices from start[v] to start[v + 1]
    order_ptr,  # (period) int64, the indices by the row they name, or None = 0, 1, ...
    out_ptr,  # (parts, size, cols) contiguous
    cols,
    dout_stride,
    size,
    period,
    repeats,
    padding_idx,
    parts,
    scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """The sum of one part of a row's takers, in a block of columns. dout's rows i, i + period, ... used index i."""
    blocks = tl.cdiv(cols, BLOCK_COLS)
    program = tl.program_id(0).to(tl.int64)
    v = program // blocks
    part = tl.program_id(1)
    col = program % blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_col = col < cols
    begin = tl.load(start_ptr + v)
    terms = (tl.load(start_ptr + v + 1) - begin) * repeats
    terms = tl.where(v == padding_idx, 0, terms)
    last = terms * (part + 1) // parts
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for first in tl.range(terms * part // parts, last, BLOCK_ROWS):
        term = first + tl.arange(0, BLOCK_ROWS)
        there = term < last
        index = begin + term // repeats
        if order_ptr is not None:
            index = tl.load(order_ptr + index, mask=there, other=0)
        row = index + term % repeats * period
        mask = there[:, None] & in_col[None, :]
        total += tl.load(dout_ptr + row[:, None] * dout_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    out = tl.sum(total, 0) * scale
    offset = (tl.cast(part, tl.int64) * size + v) * cols + col
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=in_col)


def forward(
    tables: tuple[Table, ...],
    shape: Sequence[int],
    scale: float,
    normalize: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> out (*shape, cols), and with ``normalize`` mean, rstd (rows) float32."""
    dropped = dropout(dropout_p, seed) if dropout_p > 0 else None
    weight = tables[0].weight
    rows, cols = math.prod(shape), weight.shape[1]
    out = weight.new_empty((*shape, cols))
    if not normalize:
        return _run(tables, rows, scale, None, out, dropped), None, None
    tile = row_tile(layer_norm.FORWARD_TILES, cols, weight.element_size())
    if cols > tile.block_cols:
        summed = _run(tables, rows, scale, None, out, None)
        out, mean, rstd = layer_norm.forward(summed, norm_weight, norm_bias, eps)
        return (out if dropped is None else _dropped(out.view(rows, cols), dropped).view(out.shape)), mean, rstd
    mean = weight.new_empty(rows, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    _run(tables, rows, scale, (norm_weight, norm_bias, mean, rstd, eps, tile), out, dropped)
    return out, mean, rstd


def _run(
    tables: tuple[Table, ...], rows: int, scale: float, norm: tuple | None, out: Tensor, dropped: Dropout | None
) -> Tensor:
    cols = out.shape[-1]
    weight, bias, mean, rstd, eps, tile = norm or (
        None,
        None,
        None,
        None,
        0.0,
        row_tile(TILES, cols, out.element_size()),
    )
    columns = [
        [t.weight for t in tables],
        [t.ids for t in tables],
        [t.weight.shape[0] for t in tables],
        [t.weight.stride(0) for t in tables],
        [t.period for t in tables],
        [t.offset for t in tables],
    ]
    missing = 3 - len(tables)
    weights, ids, sizes, strides, periods, offsets = (
        [*column, *[fill] * missing] for column, fill in zip(columns, (None, None, 0, 0, 1, 0), strict=True)
    )
    launch(
        _forward, (triton.cdiv(rows, tile.block_rows) * triton.cdiv(cols, tile.block_cols),), out.device,
        *weights, *ids, weight, bias, out, mean, rstd, rows, cols, *sizes, *strides, *periods, *offsets, scale, eps,
        *(dropped or Dropout(0, 0, 1.0)),
        BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, NORMALIZE=norm is not None, DROPOUT=dropped is not None,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return out


def _dropped(x: Tensor, dropped: Dropout) -> Tensor:
    """x with the mask of dropout, as a table whose r-th row is taken by row r."""
    x = unit_stride(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _run((Table(x, None, max(len(x), 1), 0, -1, ""),), len(x), 1.0, None, out, dropped)


def backward(
    dout: Tensor,
    tables: tuple[Table, ...],
    scale: float,
    normalize: bool,
    norm_weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    dropout_p: float,
    seed: int,
    needs: tuple[bool, ...],
    need_dweight: bool,
    need_dbias: bool,
    param_dtype: torch.dtype,
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    """dout (rows, cols) -> dense gradients of the tables, None where ``needs`` is False; of the norm's parameters."""
    dweight = dbias = None
    if dropout_p > 0:
        dout = _dropped(dout, dropout(dropout_p, seed))
    if normalize:
        assert mean is not None and rstd is not None
        summed = _run(
            tables, len(dout), scale, None, torch.empty(dout.shape, dtype=dout.dtype, device=dout.device), None
        )
        dx, dweight, dbias = layer_norm.backward(
            dout, summed, norm_weight, mean, rstd, any(needs), need_dweight, need_dbias, param_dtype
        )
        dout = dout if dx is None else dx
    dout = unit_stride(dout)
    gradients = [
        _table_gradient(table, dout, scale if i == 0 else 1.0) if needed else None
        for i, (table, needed) in enumerate(zip(tables, needs, strict=True))
    ]
    return gradients, dweight, dbias


def _table_gradient(table: Table, dout: Tensor, scale: float) -> Tensor:
    (rows, cols), size = dout.shape, table.weight.shape[0]
    gradient = torch.empty((size, cols), dtype=dout.dtype, device=dout.device)
    every_row = torch.arange(size + 1, device=dout.device)
    if rows == 0:
        return gradient.zero_()
    if table.ids is None:
        order, start = None, (every_row - table.offset).clamp_(0, table.period)
    else:
        named, order = torch.sort(table.ids.view(-1), stable=True)
        start = torch.searchsorted(named, every_row)
    tile = DENSE if rows >= 8 * size else SPARSE
    blocks, parts = triton.cdiv(cols, tile.block_cols), 1
    if tile is DENSE:
        parts = max(1, min(2 * program_limit(dout.device) // (size * blocks), rows // (size * tile.block_rows)))
    out = gradient if parts == 1 else torch.empty((1, parts, size * cols), dtype=torch.float32, device=dout.device)
    launch(
        _sum_takers, (size * blocks, parts), dout.device,
        dout, start, order, out, cols, dout.stride(0), size, table.period, rows // table.period, table.padding_idx,
        parts, scale, BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, num_warps=tile.num_warps,
    )  # fmt: skip
    if parts > 1:
        column_sum(out, gradient.view(-1), None)
    return gradient


def configurations() -> Iterator[Configuration]:
    """Every build: per table line one, two and three tables as models have them, with and without norm and dropout."""
    for dtype, kind in sorted(TYPES.items(), key=str):
        for line in TILES:
            cols = min(line.columns, 2**14)
            tile = row_tile(TILES, cols, dtype.itemsize)
            yield _forward_build(f"{kind} {cols}", kind, tile, 1, norm=False, dropped=False)
            yield _forward_build(f"{kind} {cols} of 2+dropout", kind, tile, 2, norm=False, dropped=True)
        for line in layer_norm.FORWARD_TILES:
            if dtype.itemsize <= line.itemsize and not line.block_cols:
                tile = row_tile(layer_norm.FORWARD_TILES, line.columns, dtype.itemsize)
                label = f"{kind} {line.columns} of 3+norm+dropout"
                yield _forward_build(label, kind, tile, 3, norm=True, dropped=True)
        for label, tile, order, out in (("sparse", SPARSE, "*i64", f"*{kind}"), ("dense", DENSE, None, "*fp32")):
            yield Configuration(
                _sum_takers,
                f"embedding sum_takers {kind} {label}",
                {"dout_ptr": f"*{kind}", "start_ptr": "*i64", "order_ptr": order, "out_ptr": out, "scale": "fp32"},
                {"BLOCK_ROWS": tile.block_rows, "BLOCK_COLS": tile.block_cols},
                tile.num_warps,
                unaligned=frozenset({"size", "period", "repeats", "padding_idx", "parts"}),
            )


def _forward_build(label: str, kind: str, tile: RowTile, tables: int, *, norm: bool, dropped: bool) -> Configuration:
    which, data = ("first", "second", "third"), f"*{kind}"
    types: dict[str, str | None] = {f"{name}_ptr": data if i < tables else None for i, name in enumerate(which)}
    # Tokens and segments by index, positions in order.
    types |= {"first_ids_ptr": "*i64", "second_ids_ptr": None, "third_ids_ptr": "*i64" if tables > 2 else None}
    types |= {f"{name}_ptr": data if norm else None for name in ("weight", "bias")}
    types |= {f"{name}_ptr": "*fp32" if norm else None for name in ("mean", "rstd")}
    types |= {"out_ptr": data, "scale": "fp32", "eps": "fp32", "seed": "u64", "threshold": "u32", "keep_scale": "fp32"}
    blocks = {"BLOCK_ROWS": tile.block_rows, "BLOCK_COLS": tile.block_cols, "NORMALIZE": norm, "DROPOUT": dropped}
    loose = frozenset({"rows", *(f"{name}_{what}" for name in which for what in ("size", "period", "offset"))})
    return Configuration(_forward, f"embedding forward {label}", types, blocks, tile.num_warps, unaligned=loose)
