"""Layer normalisation: out = (x - mean) * rstd * weight + bias per row, and its gradients.

With xhat = (x - mean) * rstd, g = dout * weight and <.> the mean over a row:

    dx = rstd * (g - <g> - xhat * <g * xhat>),   dweight = sum over rows of dout * xhat,   dbias = sum of dout

A row is read from memory once: up to 32k columns a program holds whole rows in registers, several short ones or one long
one, and takes the variance exactly, from the centred values. Longer rows are read in chunks, whose means and variances
are merged by Chan's formula (Chan, Golub, LeVeque 1983), and once more to normalise. In backward each program walks over
many rows and keeps dweight and dbias in registers; column_sum.py adds the programs' sums in a fixed order.

The same kernels compute add_layer_norm: with ``residual_ptr`` what is normalised is residual + dropout(x).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .column_sum import column_sum, partials
from .dropout import Dropout, keep_mask
from .launch import DTYPES as DTYPES
from .launch import TYPES, UNBOUNDED, Configuration, RowTile, launch, program_limit, row_tile, unit_stride

FEATURES: frozenset[str] = frozenset()

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
# Backward holds x, dout, weight, dweight and dbias at once, so its rows stay half as long.
BACKWARD_TILES = (
    RowTile(32, 64, 4),
    RowTile(64, 32, 4),
    RowTile(128, 16, 4),
    RowTile(256, 8, 4),
    RowTile(512, 4, 4),
    RowTile(1024, 2, 4),
    RowTile(2048, 1, 4),
    RowTile(4096, 1, 8),
    RowTile(8192, 1, 16),
    RowTile(UNBOUNDED, 1, 16, block_cols=4096),
)
# dweight and dbias of rows longer than any one-block line above: a program owns these columns of a strip of rows.
PARAMETER_TILE = RowTile(UNBOUNDED, 16, 4, block_cols=128)


@triton.jit
def _load_summand(
    x_ptr, residual_ptr, offset_x, offset_residual, row, start, mask, seed, threshold, keep_scale,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """What is normalised, in float32: x, or residual + dropout(x) rounded to the dtype it is stored in."""
    x = tl.load(x_ptr + offset_x, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        keep = keep_mask(seed, threshold, row, start, BLOCK_ROWS, BLOCK_COLS)
        x = tl.where(keep, x * keep_scale, 0.0)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + offset_residual, mask=mask, other=0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _store_normalised(out_ptr, weight_ptr, bias_ptr, offset, col, in_col, xhat, mask):
    if weight_ptr is not None:
        xhat *= tl.load(weight_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        xhat += tl.load(bias_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offset, xhat.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def _forward_rows(
    x_ptr,  # (rows, cols), rows x_stride apart
    residual_ptr,  # (rows, cols), rows residual_stride apart, or None
    weight_ptr,  # (cols) or None
    bias_ptr,  # (cols) or None
    out_ptr,  # (rows, cols) contiguous
    summed_ptr,  # (rows, cols) contiguous, or None with residual_ptr
    mean_ptr,  # (rows) float32
    rstd_ptr,  # (rows) float32
    rows,
    cols,
    x_stride,
    residual_stride,
    eps,
    seed: tl.uint64,
    threshold: tl.uint32,
    keep_scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,  # >= cols
    DROPOUT: tl.constexpr,
):
    """Whole rows in registers."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_COLS)
    in_row, in_col = row < rows, col < cols
    mask = in_row[:, None] & in_col[None, :]
    offset = row[:, None] * cols + col[None, :]
    x = _load_summand(
        x_ptr, residual_ptr, row[:, None] * x_stride + col[None, :], row[:, None] * residual_stride + col[None, :],
        row, 0, mask, seed, threshold, keep_scale, BLOCK_ROWS, BLOCK_COLS, DROPOUT,
    )  # fmt: skip
    if summed_ptr is not None:
        tl.store(summed_ptr + offset, x.to(summed_ptr.dtype.element_ty), mask=mask)
    mean = tl.sum(x, 1) / cols
    centred = tl.where(in_col[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / cols
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    tl.store(mean_ptr + row, mean, mask=in_row)
    tl.store(rstd_ptr + row, rstd, mask=in_row)
    _store_normalised(out_ptr, weight_ptr, bias_ptr, offset, col, in_col, centred * rstd[:, None], mask)


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def _forward_chunks(
    x_ptr,  # (rows, cols), rows x_stride apart
    residual_ptr,  # (rows, cols), rows residual_stride apart, or None
    weight_ptr,  # (cols) or None
    bias_ptr,  # (cols) or None
    out_ptr,  # (rows, cols) contiguous
    summed_ptr,  # (rows, cols) contiguous, or None with residual_ptr
    mean_ptr,  # (rows) float32
    rstd_ptr,  # (rows) float32
    rows,
    cols,
    x_stride,
    residual_stride,
    eps,
    seed: tl.uint64,
    threshold: tl.uint32,
    keep_scale,
    BLOCK_ROWS: tl.constexpr,  # 1
    BLOCK_COLS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """One row longer than a block: statistics chunk by chunk, then a second reading."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_ROWS)
    in_row = row < rows
    mean = tl.zeros([BLOCK_ROWS], tl.float32)
    squares = tl.zeros([BLOCK_ROWS], tl.float32)  # sum of squared distances from the mean so far
    for start in tl.range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS).to(tl.int64)
        mask = in_row[:, None] & (col < cols)[None, :]
        x = _load_summand(
            x_ptr, residual_ptr, row[:, None] * x_stride + col[None, :], row[:, None] * residual_stride + col[None, :],
            row, start, mask, seed, threshold, keep_scale, BLOCK_ROWS, BLOCK_COLS, DROPOUT,
        )  # fmt: skip
        if summed_ptr is not None:
            tl.store(summed_ptr + row[:, None] * cols + col[None, :], x.to(summed_ptr.dtype.element_ty), mask=mask)
        count = tl.minimum(cols - start, BLOCK_COLS).to(tl.float32)
        chunk_mean = tl.sum(x, 1) / count
        centred = tl.where(mask, x - chunk_mean[:, None], 0.0)
        distance = chunk_mean - mean
        share = count / (start + count)
        mean += distance * share
        squares += tl.sum(centred * centred, 1) + distance * distance * (share * start)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / cols + eps))
    tl.store(mean_ptr + row, mean, mask=in_row)
    tl.store(rstd_ptr + row, rstd, mask=in_row)
    for start in tl.range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS).to(tl.int64)
        in_col = col < cols
        mask = in_row[:, None] & in_col[None, :]
        offset = row[:, None] * cols + col[None, :]
        if summed_ptr is not None:
            x = tl.load(summed_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        else:
            x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        xhat = (x - mean[:, None]) * rstd[:, None]
        _store_normalised(out_ptr, weight_ptr, bias_ptr, offset, col, in_col, xhat, mask)


@triton.jit
def _store_gradient(
    dx_ptr, dropped_ptr, dsummed_ptr, offset, offset_dsummed, row, start, dx, mask, seed, threshold, keep_scale,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    if dsummed_ptr is not None:
        dx += tl.load(dsummed_ptr + offset_dsummed, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if DROPOUT:
        keep = keep_mask(seed, threshold, row, start, BLOCK_ROWS, BLOCK_COLS)
        dropped = tl.where(keep, dx * keep_scale, 0.0)
        tl.store(dropped_ptr + offset, dropped.to(dropped_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def _backward_rows(
    dout_ptr,  # (rows, cols), rows dout_stride apart
    dsummed_ptr,  # (rows, cols), rows dsummed_stride apart, or None: added to dx
    x_ptr,  # (rows, cols), rows x_stride apart: what was normalised
    weight_ptr,  # (cols) or None
    mean_ptr,  # (rows) float32
    rstd_ptr,  # (rows) float32
    dx_ptr,  # (rows, cols) contiguous, or None
    dropped_ptr,  # (rows, cols) contiguous: gradient of dropout's input; None without dropout
    dweight_ptr,  # (programs, cols) float32 partial sums, or None
    dbias_ptr,  # (programs, cols) float32 partial sums, or None
    rows,
    cols,
    dout_stride,
    dsummed_stride,
    x_stride,
    seed: tl.uint64,
    threshold: tl.uint32,
    keep_scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,  # >= cols
    DROPOUT: tl.constexpr,
):
    """All three gradients; each program takes every (number of programs)-th tile of rows."""
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_COLS)
    in_col = col < cols
    weight = tl.full([BLOCK_COLS], 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + col, mask=in_col, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_row = row < rows
        mask = in_row[:, None] & in_col[None, :]
        mean = tl.load(mean_ptr + row, mask=in_row, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + row[:, None] * dout_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        if dweight_ptr is not None:
            dweight += dout * xhat
        if dbias_ptr is not None:
            dbias += dout
        if dx_ptr is not None:
            g = dout * weight[None, :]
            mean_g = tl.sum(g, 1) / cols
            mean_gx = tl.sum(g * xhat, 1) / cols
            dx = rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])
            _store_gradient(
                dx_ptr, dropped_ptr, dsummed_ptr, row[:, None] * cols + col[None, :],
                row[:, None] * dsummed_stride + col[None, :], row, 0, dx, mask, seed, threshold, keep_scale,
                BLOCK_ROWS, BLOCK_COLS, DROPOUT,
            )  # fmt: skip
    offset = program.to(tl.int64) * cols + col
    if dweight_ptr is not None:
        tl.store(dweight_ptr + offset, tl.sum(dweight, 0), mask=in_col)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offset, tl.sum(dbias, 0), mask=in_col)


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def _backward_chunks(
    dout_ptr,  # (rows, cols), rows dout_stride apart
    dsummed_ptr,  # (rows, cols), rows dsummed_stride apart, or None
    x_ptr,  # (rows, cols), rows x_stride apart
    weight_ptr,  # (cols) or None
    mean_ptr,  # (rows) float32
    rstd_ptr,  # (rows) float32
    dx_ptr,  # (rows, cols) contiguous
    dropped_ptr,  # (rows, cols) contiguous, or None
    rows,
    cols,
    dout_stride,
    dsummed_stride,
    x_stride,
    seed: tl.uint64,
    threshold: tl.uint32,
    keep_scale,
    BLOCK_ROWS: tl.constexpr,  # 1
    BLOCK_COLS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """dx of one row longer than a block."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_ROWS)
    in_row = row < rows
    mean = tl.load(mean_ptr + row, mask=in_row, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)
    sum_g = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    sum_gx = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for start in tl.range(0, cols, BLOCK_COLS):
        g, xhat, _, _ = _load_gradient(
            dout_ptr, x_ptr, weight_ptr, row, start, rows, cols, dout_stride, x_stride, mean, rstd, BLOCK_COLS
        )
        sum_g += g
        sum_gx += g * xhat
    mean_g = tl.sum(sum_g, 1) / cols
    mean_gx = tl.sum(sum_gx, 1) / cols
    for start in tl.range(0, cols, BLOCK_COLS):
        g, xhat, col, mask = _load_gradient(
            dout_ptr, x_ptr, weight_ptr, row, start, rows, cols, dout_stride, x_stride, mean, rstd, BLOCK_COLS
        )
        dx = rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])
        _store_gradient(
            dx_ptr, dropped_ptr, dsummed_ptr, row[:, None] * cols + col[None, :],
            row[:, None] * dsummed_stride + col[None, :], row, start, dx, mask, seed, threshold, keep_scale,
            BLOCK_ROWS, BLOCK_COLS, DROPOUT,
        )  # fmt: skip


@triton.jit
def _load_gradient(
    dout_ptr, x_ptr, weight_ptr, row, start, rows, cols, dout_stride, x_stride, mean, rstd, BLOCK_COLS: tl.constexpr
):
    col = start + tl.arange(0, BLOCK_COLS).to(tl.int64)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dout_ptr + row[:, None] * dout_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        g *= tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
    return g, xhat, col, mask


@triton.jit(do_not_specialize=["rows"])
def _backward_parameters(
    dout_ptr,  # (rows, cols), rows dout_stride apart
    x_ptr,  # (rows, cols), rows x_stride apart
    mean_ptr,  # (rows) float32
    rstd_ptr,  # (rows) float32
    dweight_ptr,  # (strips, cols) float32 partial sums, or None
    dbias_ptr,  # (strips, cols) float32 partial sums, or None
    rows,
    cols,
    dout_stride,
    x_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """dweight and dbias of BLOCK_COLS columns; grid (column blocks, strips of rows)."""
    col = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    strip = tl.program_id(1)
    in_col = col < cols
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for tile in tl.range(strip, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(1)):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_row = row < rows
        mask = in_row[:, None] & in_col[None, :]
        dout = tl.load(dout_ptr + row[:, None] * dout_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if dweight_ptr is not None:
            mean = tl.load(mean_ptr + row, mask=in_row, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)
            x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
            dweight += dout * ((x - mean[:, None]) * rstd[:, None])
        if dbias_ptr is not None:
            dbias += dout
    offset = strip.to(tl.int64) * cols + col
    if dweight_ptr is not None:
        tl.store(dweight_ptr + offset, tl.sum(dweight, 0), mask=in_col)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offset, tl.sum(dbias, 0), mask=in_col)


def run_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dropped: Dropout | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(out, summed, mean, rstd) of layer_norm (``residual`` None, then summed too) or add_layer_norm."""
    rows, cols = x.shape
    x = unit_stride(x)
    out = torch.empty((rows, cols), dtype=x.dtype, device=x.device)
    summed = None if residual is None else torch.empty_like(out)
    residual = None if residual is None else unit_stride(residual)
    mean = torch.empty((rows,), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    tile = row_tile(FORWARD_TILES, cols, x.element_size())
    kernel = _forward_rows if cols <= tile.block_cols else _forward_chunks
    launch(
        kernel, (triton.cdiv(rows, tile.block_rows),), x.device,
        x, residual, weight, bias, out, summed, mean, rstd, rows, cols, x.stride(0),
        0 if residual is None else residual.stride(0), eps, *(dropped or Dropout(0, 0, 1.0)),
        BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, DROPOUT=dropped is not None, num_warps=tile.num_warps,
    )  # fmt: skip
    return out, summed, mean, rstd


def run_backward(
    dout: Tensor,
    dsummed: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropped: Dropout | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    param_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(gradient of dropout's input or None, gradient of what was normalised or None, dweight, dbias)."""
    rows, cols = x.shape
    device = x.device
    x, dout = unit_stride(x), unit_stride(dout)
    dsummed = None if dsummed is None else unit_stride(dsummed)
    dx = torch.empty((rows, cols), dtype=x.dtype, device=device) if need_dx else None
    ddropped = torch.empty_like(dx) if need_dx and dropped is not None else None
    dweight = torch.empty((cols,), dtype=param_dtype, device=device) if need_dweight else None
    dbias = torch.empty((cols,), dtype=param_dtype, device=device) if need_dbias else None
    outputs = need_dweight + need_dbias

    tile = row_tile(BACKWARD_TILES, cols, x.element_size())
    whole = cols <= tile.block_cols
    summing = tile if whole else PARAMETER_TILE
    programs = triton.cdiv(rows, summing.block_rows)
    partial = dweight_partial = dbias_partial = None
    if outputs:
        limit = program_limit(device)
        programs = min(programs, limit if whole else max(1, 4 * limit // triton.cdiv(cols, summing.block_cols)))
        partial = partials(outputs, programs, cols, device)
        dweight_partial = partial[0] if need_dweight else None
        dbias_partial = partial[-1] if need_dbias else None

    strides = (dout.stride(0), 0 if dsummed is None else dsummed.stride(0), x.stride(0))
    blocks = {"BLOCK_ROWS": tile.block_rows, "BLOCK_COLS": tile.block_cols, "DROPOUT": dropped is not None}
    arguments = dropped or Dropout(0, 0, 1.0)
    if whole:
        launch(
            _backward_rows, (programs,), device,
            dout, dsummed, x, weight, mean, rstd, dx, ddropped, dweight_partial, dbias_partial, rows, cols,
            *strides, *arguments, num_warps=tile.num_warps, **blocks,
        )  # fmt: skip
    else:
        if need_dx:
            launch(
                _backward_chunks, (rows,), device,
                dout, dsummed, x, weight, mean, rstd, dx, ddropped, rows, cols, *strides, *arguments,
                num_warps=tile.num_warps, **blocks,
            )  # fmt: skip
        if outputs:
            launch(
                _backward_parameters, (triton.cdiv(cols, summing.block_cols), programs), device,
                dout, x, mean, rstd, dweight_partial, dbias_partial, rows, cols, dout.stride(0), x.stride(0),
                BLOCK_ROWS=summing.block_rows, BLOCK_COLS=summing.block_cols, num_warps=summing.num_warps,
            )  # fmt: skip
    if partial is not None:
        first, second = (dweight, dbias) if need_dweight else (dbias, None)
        column_sum(partial, first, second)
    return ddropped, dx, dweight, dbias


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, cols), weight and bias (cols) or None -> out (rows, cols), mean (rows), rstd (rows)."""
    out, _, mean, rstd = run_forward(x, None, weight, bias, eps, None)
    return out, mean, rstd


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    param_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx in x's dtype, dweight and dbias in ``param_dtype``), None for those not needed."""
    needs = (need_dx, need_dweight, need_dbias)
    return run_backward(dout, None, x, weight, mean, rstd, None, *needs, param_dtype)[1:]


def build_configurations(label: str, residual: bool, dropout: bool) -> Iterator[Configuration]:
    """Every build of layer_norm, or with ``residual`` of add_layer_norm, with weight and bias, per table line."""
    scalars = {"eps": "fp32", "seed": "u64", "threshold": "u32", "keep_scale": "fp32"}
    loose = frozenset({"rows"})
    for dtype, kind in sorted(TYPES.items(), key=str):
        data = f"*{kind}"
        shared = {"x_ptr": data, "weight_ptr": data, "mean_ptr": "*fp32", "rstd_ptr": "*fp32", **scalars}
        extra = data if residual else None
        forward_types = shared | {"residual_ptr": extra, "summed_ptr": extra, "bias_ptr": data, "out_ptr": data}
        backward_types = shared | {
            "dout_ptr": data,
            "dsummed_ptr": extra,
            "dx_ptr": data,
            "dropped_ptr": data if dropout else None,
        }
        sums = {"dweight_ptr": "*fp32", "dbias_ptr": "*fp32"}
        for table, whole, chunks, types in (
            (FORWARD_TILES, _forward_rows, _forward_chunks, forward_types),
            (BACKWARD_TILES, _backward_rows, _backward_chunks, backward_types),
        ):
            for line in table:
                if dtype.itemsize > line.itemsize:
                    continue
                tile = row_tile(table, min(line.columns, 2**18), dtype.itemsize)
                kernel = chunks if line.block_cols else whole
                arguments = types | sums if kernel is _backward_rows else types
                yield Configuration(
                    kernel,
                    f"{label} {kernel.__name__[1:]} {kind} {min(line.columns, 2**18)}",
                    {name: arguments[name] for name in kernel.arg_names if name in arguments},
                    {"BLOCK_ROWS": tile.block_rows, "BLOCK_COLS": tile.block_cols, "DROPOUT": dropout},
                    tile.num_warps,
                    unaligned=loose,
                )
        if not residual:
            yield Configuration(
                _backward_parameters,
                f"{label} backward_parameters {kind} {2**18}",
                {"dout_ptr": data, "x_ptr": data, "mean_ptr": "*fp32", "rstd_ptr": "*fp32", **sums},
                {"BLOCK_ROWS": PARAMETER_TILE.block_rows, "BLOCK_COLS": PARAMETER_TILE.block_cols},
                PARAMETER_TILE.num_warps,
                unaligned=loose,
            )


def configurations() -> Iterator[Configuration]:
    """Every build of the kernels above as layer_norm uses them."""
    return build_configurations("layer_norm", residual=False, dropout=False)
