"""The Triton kernels of layer_norm.py and rms_norm.py, where the formulas are, and of both behind a residual addition.

``*_rows`` hold whole rows in registers, ``*_chunks`` walk through one row that is longer than a block, and
``backward_parameters`` sums dweight and dbias for such rows. Arguments that are None switch their part off: a kernel
with ``residual_ptr`` normalises residual + dropout(x), one without normalises x; one with ``mean_ptr`` is a layer norm,
one without an rms norm, which subtracts no mean.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import keep_mask


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
def forward_rows(
    x_ptr,  # (rows, cols), rows x_stride apart
    residual_ptr,  # (rows, cols), rows residual_stride apart, or None
    weight_ptr,  # (cols) or None
    bias_ptr,  # (cols) or None
    out_ptr,  # (rows, cols) contiguous
    summed_ptr,  # (rows, cols) contiguous, or None with residual_ptr
    mean_ptr,  # (rows) float32, or None
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
    if mean_ptr is not None:
        mean = tl.sum(x, 1) / cols
        tl.store(mean_ptr + row, mean, mask=in_row)
        x = tl.where(in_col[None, :], x - mean[:, None], 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 1) / cols + eps))
    tl.store(rstd_ptr + row, rstd, mask=in_row)
    _store_normalised(out_ptr, weight_ptr, bias_ptr, offset, col, in_col, x * rstd[:, None], mask)


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def forward_chunks(
    x_ptr,  # (rows, cols), rows x_stride apart
    residual_ptr,  # (rows, cols), rows residual_stride apart, or None
    weight_ptr,  # (cols) or None
    bias_ptr,  # (cols) or None
    out_ptr,  # (rows, cols) contiguous
    summed_ptr,  # (rows, cols) contiguous, or None with residual_ptr
    mean_ptr,  # (rows) float32, or None
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
    squares = tl.zeros([BLOCK_ROWS], tl.float32)  # sum of squared distances from the mean so far, if there is one
    for start in tl.range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS).to(tl.int64)
        mask = in_row[:, None] & (col < cols)[None, :]
        x = _load_summand(
            x_ptr, residual_ptr, row[:, None] * x_stride + col[None, :], row[:, None] * residual_stride + col[None, :],
            row, start, mask, seed, threshold, keep_scale, BLOCK_ROWS, BLOCK_COLS, DROPOUT,
        )  # fmt: skip
        if summed_ptr is not None:
            tl.store(summed_ptr + row[:, None] * cols + col[None, :], x.to(summed_ptr.dtype.element_ty), mask=mask)
        if mean_ptr is not None:
            count = tl.minimum(cols - start, BLOCK_COLS).to(tl.float32)
            chunk_mean = tl.sum(x, 1) / count
            x = tl.where(mask, x - chunk_mean[:, None], 0.0)
            distance = chunk_mean - mean
            share = count / (start + count)
            mean += distance * share
            squares += distance * distance * (share * start)
        squares += tl.sum(x * x, 1)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / cols + eps))
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=in_row)
    tl.store(rstd_ptr + row, rstd, mask=in_row)
    tl.debug_barrier()  # another thread may have stored what this one now loads from summed_ptr
    for start in tl.range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS).to(tl.int64)
        in_col = col < cols
        mask = in_row[:, None] & in_col[None, :]
        offset = row[:, None] * cols + col[None, :]
        if summed_ptr is not None:
            x = tl.load(summed_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        else:
            x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            x -= mean[:, None]
        xhat = x * rstd[:, None]
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


@triton.jit
def _normalised(x, mean_ptr, rstd, row, in_row, mask):
    """xhat of a tile; 0 outside of ``mask``."""
    if mean_ptr is not None:
        x -= tl.load(mean_ptr + row, mask=in_row, other=0.0)[:, None]
    return tl.where(mask, x * rstd[:, None], 0.0)


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def backward_rows(
    dout_ptr,  # (rows, cols), rows dout_stride apart
    dsummed_ptr,  # (rows, cols), rows dsummed_stride apart, or None: added to dx
    x_ptr,  # (rows, cols), rows x_stride apart: what was normalised
    weight_ptr,  # (cols) or None
    mean_ptr,  # (rows) float32, or None
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
        rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + row[:, None] * dout_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        xhat = _normalised(x, mean_ptr, rstd, row, in_row, mask)
        if dweight_ptr is not None:
            dweight += dout * xhat
        if dbias_ptr is not None:
            dbias += dout
        if dx_ptr is not None:
            g = dout * weight[None, :]
            mean_gx = tl.sum(g * xhat, 1) / cols
            if mean_ptr is not None:
                g -= (tl.sum(g, 1) / cols)[:, None]
            dx = rstd[:, None] * (g - xhat * mean_gx[:, None])
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
def backward_chunks(
    dout_ptr,  # (rows, cols), rows dout_stride apart
    dsummed_ptr,  # (rows, cols), rows dsummed_stride apart, or None
    x_ptr,  # (rows, cols), rows x_stride apart
    weight_ptr,  # (cols) or None
    mean_ptr,  # (rows) float32, or None
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
    rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)
    sum_g = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    sum_gx = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for start in tl.range(0, cols, BLOCK_COLS):
        g, xhat, _, _ = _load_gradient(
            dout_ptr, x_ptr, weight_ptr, mean_ptr, row, start, rows, cols, dout_stride, x_stride, rstd, BLOCK_COLS
        )
        if mean_ptr is not None:
            sum_g += g
        sum_gx += g * xhat
    mean_g = tl.sum(sum_g, 1) / cols
    mean_gx = tl.sum(sum_gx, 1) / cols
    for start in tl.range(0, cols, BLOCK_COLS):
        g, xhat, col, mask = _load_gradient(
            dout_ptr, x_ptr, weight_ptr, mean_ptr, row, start, rows, cols, dout_stride, x_stride, rstd, BLOCK_COLS
        )
        if mean_ptr is not None:
            g -= mean_g[:, None]
        dx = rstd[:, None] * (g - xhat * mean_gx[:, None])
        _store_gradient(
            dx_ptr, dropped_ptr, dsummed_ptr, row[:, None] * cols + col[None, :],
            row[:, None] * dsummed_stride + col[None, :], row, start, dx, mask, seed, threshold, keep_scale,
            BLOCK_ROWS, BLOCK_COLS, DROPOUT,
        )  # fmt: skip


@triton.jit
def _load_gradient(
    dout_ptr, x_ptr, weight_ptr, mean_ptr, row, start, rows, cols, dout_stride, x_stride, rstd, BLOCK_COLS: tl.constexpr
):
    col = start + tl.arange(0, BLOCK_COLS).to(tl.int64)
    in_row = row < rows
    mask = in_row[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dout_ptr + row[:, None] * dout_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        g *= tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    xhat = _normalised(x, mean_ptr, rstd, row, in_row, mask)
    return g, xhat, col, mask


@triton.jit(do_not_specialize=["rows"])
def backward_parameters(
    dout_ptr,  # (rows, cols), rows dout_stride apart
    x_ptr,  # (rows, cols), rows x_stride apart
    mean_ptr,  # (rows) float32, or None
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
            rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)
            x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
            dweight += dout * _normalised(x, mean_ptr, rstd, row, in_row, mask)
        if dbias_ptr is not None:
            dbias += dout
    offset = strip.to(tl.int64) * cols + col
    if dweight_ptr is not None:
        tl.store(dweight_ptr + offset, tl.sum(dweight, 0), mask=in_col)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offset, tl.sum(dbias, 0), mask=in_col)
