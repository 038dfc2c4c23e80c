"""gelu(x + bias) (Hendrycks, Gimpel 2016, arXiv:1606.08415), exact or by the tanh approximation, and the gradients.

With z = x + bias:   exact: z * Phi(z), derivative Phi(z) + z * phi(z);   tanh: z * sigmoid(2u) with
u = sqrt(2 / pi) * (z + 0.044715 z^3), which is 0.5 z (1 + tanh(u)) without the cancellation for negative z.

The op does nothing but move memory, so the bias rides along for free: added on the way in, and in backward each program
owns a block of columns, walks down the rows, and keeps the bias gradient in registers (summed up by column_sum.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import bias_layout
from .column_sum import column_sum, partials
from .launch import DTYPES as DTYPES
from .launch import TYPES, UNBOUNDED, Configuration, RowTile, launch, program_limit, row_tile

FEATURES = frozenset({"bias"})

# A program holds block_rows x block_cols elements; rows longer than the last line are cut into blocks of columns.
TILES = (
    #       columns, rows, warps
    RowTile(32, 64, 4),
    RowTile(64, 32, 4),
    RowTile(128, 16, 4),
    RowTile(256, 8, 4),
    RowTile(512, 4, 4),
    RowTile(1024, 2, 4),
    RowTile(UNBOUNDED, 1, 4, block_cols=2048),
)

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _tanh_form(z):
    """(sigmoid(2u), its derivative by 2u), from exp(-|2u|): no overflow, and no 1 minus something near 1."""
    u = SQRT_2_OVER_PI * z * (1.0 + CUBIC * z * z)
    e = tl.exp(-2.0 * tl.abs(u))
    return tl.where(u >= 0, 1.0, e) / (1.0 + e), e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _gelu(z, TANH: tl.constexpr):
    if TANH:
        s, _ = _tanh_form(z)
        value = z * s
    else:
        value = 0.5 * z * (1.0 + tl.erf(z * SQRT_HALF))
    return value


@triton.jit
def _gelu_derivative(z, TANH: tl.constexpr):
    if TANH:
        s, ds = _tanh_form(z)
        slope = s + 2.0 * z * ds * (SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * z * z))
    else:
        slope = 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * (INV_SQRT_2PI * tl.exp(-0.5 * z * z))
    return slope


@triton.jit
def _load_biased(x_ptr, bias_ptr, row, col, x_stride, mask, in_col):
    z = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr,  # (rows, cols), rows x_stride apart
    bias_ptr,  # (cols) or None
    out_ptr,  # (rows, cols) contiguous
    rows,
    cols,
    x_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TANH: tl.constexpr,
):
    """One tile; the column blocks of a row of tiles are neighbours in the grid."""
    blocks = tl.cdiv(cols, BLOCK_COLS)
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = program % blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_col = col < cols
    mask = (row < rows)[:, None] & in_col[None, :]
    out = _gelu(_load_biased(x_ptr, bias_ptr, row, col, x_stride, mask, in_col), TANH)
    tl.store(out_ptr + row[:, None] * cols + col[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "strips"])
def _backward(
    dout_ptr,  # (rows, cols), rows dout_stride apart
    x_ptr,  # (rows, cols), rows x_stride apart
    bias_ptr,  # (cols) or None
    dx_ptr,  # (rows, cols) contiguous
    dbias_ptr,  # (strips, cols) float32 partial sums, or None
    rows,
    cols,
    strips,
    dout_stride,
    x_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TANH: tl.constexpr,
):
    """A block of columns of every strips-th tile of rows."""
    blocks = tl.cdiv(cols, BLOCK_COLS)
    program = tl.program_id(0).to(tl.int64)
    strip = program // blocks
    col = program % blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_col = col < cols
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for tile in tl.range(strip, tl.cdiv(rows, BLOCK_ROWS), strips):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & in_col[None, :]
        z = _load_biased(x_ptr, bias_ptr, row, col, x_stride, mask, in_col)
        dout = tl.load(dout_ptr + row[:, None] * dout_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        dx = dout * _gelu_derivative(z, TANH)
        tl.store(dx_ptr + row[:, None] * cols + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            dbias += dx
    if dbias_ptr is not None:
        tl.store(dbias_ptr + strip * cols + col, tl.sum(dbias, 0), mask=in_col)


def forward(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """x (*, cols) contiguous, bias (cols) or None -> out (*, cols)."""
    rows, cols = bias_layout(x, bias)
    out = torch.empty_like(x)
    tile = row_tile(TILES, cols, x.element_size())
    launch(
        _forward, (triton.cdiv(rows, tile.block_rows) * triton.cdiv(cols, tile.block_cols),), x.device,
        x, bias, out, rows, cols, cols,
        BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, TANH=tanh, num_warps=tile.num_warps,
    )  # fmt: skip
    return out


def backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_dbias: bool
) -> tuple[Tensor, Tensor | None]:
    """dout, x (*, cols) contiguous -> dx (*, cols), dbias (cols) or None."""
    rows, cols = bias_layout(x, bias)
    dx = torch.empty_like(x)
    tile = row_tile(TILES, cols, x.element_size())
    blocks, strips = triton.cdiv(cols, tile.block_cols), triton.cdiv(rows, tile.block_rows)
    partial = None
    if need_dbias:
        # Enough programs to fill the device several times, few enough that their sums are a small part of the work.
        strips = min(strips, max(1, 8 * program_limit(x.device) // max(blocks, 1)))
        partial = partials(1, strips, cols, x.device)
    launch(
        _backward, (strips * blocks,), x.device,
        dout, x, bias, dx, None if partial is None else partial[0], rows, cols, strips, cols, cols,
        BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, TANH=tanh, num_warps=tile.num_warps,
    )  # fmt: skip
    if partial is None:
        return dx, None
    dbias = torch.empty((cols,), dtype=x.dtype, device=x.device)
    column_sum(partial, dbias, None)
    return dx, dbias


def configurations() -> Iterator[Configuration]:
    """Every line of the table in each dtype: both forms with the bias, and the exact one without."""
    for dtype, kind in sorted(TYPES.items(), key=str):
        data = f"*{kind}"
        for line in TILES:
            cols = min(line.columns, 2**18)
            tile = row_tile(TILES, cols, dtype.itemsize)
            for form, tanh, bias in (("exact+bias", False, data), ("tanh+bias", True, data), ("exact", False, None)):
                types = {"x_ptr": data, "bias_ptr": bias}
                gradients = {"dout_ptr": data, "dx_ptr": data, "dbias_ptr": "*fp32" if bias else None}
                for kernel, more in ((_forward, {"out_ptr": data}), (_backward, gradients)):
                    yield Configuration(
                        kernel,
                        f"gelu {kernel.__name__[1:]} {kind} {cols} {form}",
                        types | more,
                        {"BLOCK_ROWS": tile.block_rows, "BLOCK_COLS": tile.block_cols, "TANH": tanh},
                        tile.num_warps,
                        unaligned=frozenset({"rows", "strips"}),
                    )
