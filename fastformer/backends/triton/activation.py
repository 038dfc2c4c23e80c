"""dropout(act(x + bias) * (up + up_bias)) and its gradients; ``up`` and everything else but x is optional.

With z = x + bias and the logistic function s:   relu  max(z, 0);   gelu  z * Phi(z), derivative Phi(z) + z * phi(z);
gelu_tanh  z * s(2u), u = sqrt(2 / pi) * (z + 0.044715 z^3), which is 0.5 z (1 + tanh(u)) without the cancellation for
negative z (Hendrycks, Gimpel 2016, arXiv:1606.08415);   silu  z * s(z). With ``up``, Shazeer 2020 (arXiv:2002.05202).

The op does nothing but move memory, so biases and dropout ride along for free: added on the way in, and in backward
each program owns a block of columns, walks down the rows, and keeps the bias gradients in registers (summed by
column_sum.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import row_layout
from .column_sum import column_sum, partials
from .dropout import Dropout, dropout, keep_mask
from .launch import DTYPES as DTYPES
from .launch import TYPES, UNBOUNDED, Configuration, RowTile, launch, program_limit, row_tile

FEATURES = frozenset({"bias", "gate", "dropout"})

# A program holds block_rows x block_cols elements; rows longer than the last line are cut into blocks of columns.
TILES = (
    #       columns, rows, warps
    RowTile(32, 64, 4),
    RowTile(64, 32, 4),
    RowTile(128, 16, 4),
    RowTile(256, 8, 4),
    RowTile(512, 4, 4),
    RowTile(1024, 2, 8),  # with 4 warps, float32 spills
    RowTile(UNBOUNDED, 1, 4, block_cols=2048),
)

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def evaluate(z, KIND: tl.constexpr):
    """The activation and its derivative at z, float32."""
    if KIND == "relu":
        value = tl.where(z <= 0, 0.0, z)  # NaN passes
        slope = tl.where(z <= 0, 0.0, 1.0)
    elif KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * SQRT_HALF))
        value = z * cdf
        slope = cdf + z * (INV_SQRT_2PI * tl.exp(-0.5 * z * z))
    else:  # z s(t), from exp(-|t|): no overflow, and no 1 minus something near 1
        if KIND == "silu":
            t = z
            rate = 1.0
        else:
            t = 2.0 * SQRT_2_OVER_PI * z * (1.0 + CUBIC * z * z)
            rate = 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * z * z)
        e = tl.exp(-tl.abs(t))
        s = tl.where(t >= 0, 1.0, e) / (1.0 + e)
        value = z * s
        slope = s + z * (e / ((1.0 + e) * (1.0 + e))) * rate
    return value, slope


@triton.jit
def _load(x_ptr, bias_ptr, row, col, x_stride, mask, in_col):
    z = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _store(ptr, row, col, stride, mask, value):
    tl.store(ptr + row[:, None] * stride + col[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def keep_scales(seed, threshold, keep_scale, row, start, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    return tl.where(keep_mask(seed, threshold, row, start, BLOCK_ROWS, BLOCK_COLS), keep_scale, 0.0)


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def _forward(
    x_ptr,  # (rows, cols), rows x_stride apart
    bias_ptr,  # (cols) or None
    up_ptr,  # (rows, cols), rows up_stride apart, or None
    up_bias_ptr,  # (cols) or None
    out_ptr,  # (rows, cols), rows out_stride apart; may be x or up
    rows,
    cols,
    x_stride,
    up_stride,
    out_stride,
    seed: tl.uint64,
    threshold: tl.uint32,
    keep_scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    KIND: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """One tile; the column blocks of a row of tiles are neighbours in the grid."""
    blocks = tl.cdiv(cols, BLOCK_COLS)
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = program % blocks * BLOCK_COLS
    col = start + tl.arange(0, BLOCK_COLS)
    in_col = col < cols
    mask = (row < rows)[:, None] & in_col[None, :]
    out, _ = evaluate(_load(x_ptr, bias_ptr, row, col, x_stride, mask, in_col), KIND)
    if up_ptr is not None:
        out *= _load(up_ptr, up_bias_ptr, row, col, up_stride, mask, in_col)
    if DROPOUT:
        out *= keep_scales(seed, threshold, keep_scale, row, start, BLOCK_ROWS, BLOCK_COLS)
    _store(out_ptr, row, col, out_stride, mask, out)


@triton.jit(do_not_specialize=["rows", "strips", "seed", "threshold"])
def _backward(
    dout_ptr,  # (rows, cols), rows dout_stride apart
    x_ptr,  # (rows, cols), rows x_stride apart
    bias_ptr,  # (cols) or None
    up_ptr,  # (rows, cols), rows up_stride apart, or None
    up_bias_ptr,  # (cols) or None
    dx_ptr,  # (rows, cols), rows dx_stride apart; may be dout, x or up
    dup_ptr,  # (rows, cols), rows dup_stride apart, or None; likewise
    out_ptr,  # (rows, cols), rows out_stride apart, or None: the output once more
    dbias_ptr,  # (strips, cols) float32 partial sums, or None
    dup_bias_ptr,  # (strips, cols) float32 partial sums, or None
    rows,
    cols,
    strips,
    dout_stride,
    x_stride,
    up_stride,
    dx_stride,
    dup_stride,
    out_stride,
    seed: tl.uint64,
    threshold: tl.uint32,
    keep_scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    KIND: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """A block of columns of every strips-th tile of rows."""
    blocks = tl.cdiv(cols, BLOCK_COLS)
    program = tl.program_id(0).to(tl.int64)
    strip = program // blocks
    start = program % blocks * BLOCK_COLS
    col = start + tl.arange(0, BLOCK_COLS)
    in_col = col < cols
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    dup_bias = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for tile in tl.range(strip, tl.cdiv(rows, BLOCK_ROWS), strips):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & in_col[None, :]
        value, slope = evaluate(_load(x_ptr, bias_ptr, row, col, x_stride, mask, in_col), KIND)
        d = _load(dout_ptr, None, row, col, dout_stride, mask, in_col)
        if DROPOUT:
            scales = keep_scales(seed, threshold, keep_scale, row, start, BLOCK_ROWS, BLOCK_COLS)
            d *= scales
        if up_ptr is not None:
            up = _load(up_ptr, up_bias_ptr, row, col, up_stride, mask, in_col)
            dup = d * value
            d *= up
            value *= up
            if dup_bias_ptr is not None:
                dup_bias += dup
        d *= slope
        if dbias_ptr is not None:
            dbias += d
        if out_ptr is not None:
            if DROPOUT:
                value *= scales
            _store(out_ptr, row, col, out_stride, mask, value)
        if up_ptr is not None:  # a thread stores where it has loaded, so outputs may lie over inputs
            _store(dup_ptr, row, col, dup_stride, mask, dup)
        _store(dx_ptr, row, col, dx_stride, mask, d)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + strip * cols + col, tl.sum(dbias, 0), mask=in_col)
    if dup_bias_ptr is not None:
        tl.store(dup_bias_ptr + strip * cols + col, tl.sum(dup_bias, 0), mask=in_col)


NO_DROPOUT = Dropout(0, 0, 0.0)


def _layout(by_column: bool, x: Tensor, *others: Tensor | None) -> tuple[int, int, list[int]]:
    """(rows, columns, each tensor's row stride); one row where columns do not matter and no row is apart."""
    rows, cols, _ = row_layout(x) if x.dim() else (1, 1, 1)
    strides = [cols if t is None or not t.dim() else row_layout(t)[2] for t in (x, *others)]
    if not by_column and all(s == cols for s in strides):
        return 1, rows * cols, [rows * cols] * len(strides)
    return rows, cols, strides


def forward(
    x: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    dropout_p: float = 0.0,
    seed: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """x, up (*, cols), bias, up_bias (cols) -> out (*, cols), a new tensor or the one given, which may be x or up."""
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dropped = dropout(dropout_p, seed) if dropout_p > 0 else NO_DROPOUT
    by_column = dropout_p > 0 or bias is not None or up_bias is not None
    rows, cols, strides = _layout(by_column, x, up, out)
    tile = row_tile(TILES, cols, x.element_size())
    launch(
        _forward, (triton.cdiv(rows, tile.block_rows) * triton.cdiv(cols, tile.block_cols),), x.device,
        x, bias, up, up_bias, out, rows, cols, *strides, *dropped,
        BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, KIND=activation, DROPOUT=dropout_p > 0,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return out


def backward(
    dout: Tensor,
    x: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    dropout_p: float = 0.0,
    seed: int = 0,
    need_dbias: bool = False,
    need_dup_bias: bool = False,
    dx: Tensor | None = None,
    dup: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dup (*, cols), dbias, dup_bias (cols)), None for those not needed."""
    if dx is None:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dup is None and up is not None:
        dup = torch.empty_like(x, memory_format=torch.contiguous_format)
    dropped = dropout(dropout_p, seed) if dropout_p > 0 else NO_DROPOUT
    sums = need_dbias + need_dup_bias
    by_column = dropout_p > 0 or sums > 0 or bias is not None or up_bias is not None
    rows, cols, strides = _layout(by_column, dout, x, up, dx, dup, out)
    tile = row_tile(TILES, cols, x.element_size())
    blocks, strips = triton.cdiv(cols, tile.block_cols), triton.cdiv(rows, tile.block_rows)
    partial = None
    if sums:
        # Enough programs to fill the device several times, few enough that their sums are a small part of the work.
        strips = min(strips, max(1, 8 * program_limit(x.device) // max(blocks, 1)))
        partial = partials(sums, strips, cols, x.device)
    launch(
        _backward, (strips * blocks,), x.device,
        dout, x, bias, up, up_bias, dx, dup, out,
        partial[0] if partial is not None and need_dbias else None,
        partial[-1] if partial is not None and need_dup_bias else None,
        rows, cols, strips, *strides, *dropped,
        BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, KIND=activation, DROPOUT=dropout_p > 0,
        num_warps=tile.num_warps,
    )  # fmt: skip
    dbias = torch.empty((cols,), dtype=x.dtype, device=x.device) if need_dbias else None
    dup_bias = torch.empty((cols,), dtype=x.dtype, device=x.device) if need_dup_bias else None
    if partial is not None:
        column_sum(partial, *(t for t in (dbias, dup_bias) if t is not None), *([None] if sums == 1 else []))
    return dx, dup, dbias, dup_bias


# What each kind is compiled with, off-line: its parts, and whether backward computes the output again.
_PARTS = {"bias": ("bias_ptr", "dbias_ptr"), "gate": ("up_ptr", "dup_ptr"), "up_bias": ("up_bias_ptr", "dup_bias_ptr")}
_BUILDS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("gelu", ("bias",), False),
    ("gelu_tanh", ("bias",), False),
    ("gelu", (), False),
    ("relu", ("bias", "dropout"), False),
    ("silu", ("gate",), False),
    ("gelu", ("bias", "gate", "up_bias", "dropout"), True),
)


def configurations() -> Iterator[Configuration]:
    """Every line of the table in each dtype: the kinds with the parts they are used with, one with all of them."""
    for dtype, kind in sorted(TYPES.items(), key=str):
        data = f"*{kind}"
        for line in TILES:
            cols = min(line.columns, 2**18)
            tile = row_tile(TILES, cols, dtype.itemsize)
            for activation, parts, again in _BUILDS:
                given = {name for part in parts if part != "dropout" for name in _PARTS[part]}
                types = {"x_ptr": data, "keep_scale": "fp32", "seed": "u64", "threshold": "u32"}
                types |= {name: data if name in given else None for name in ("bias_ptr", "up_ptr", "up_bias_ptr")}
                gradients = {"dout_ptr": data, "dx_ptr": data, "dup_ptr": data if "gate" in parts else None}
                gradients |= {"out_ptr": data if again else None}
                gradients |= {name: "*fp32" if name in given else None for name in ("dbias_ptr", "dup_bias_ptr")}
                for kernel, more in ((_forward, {"out_ptr": data}), (_backward, gradients)):
                    yield Configuration(
                        kernel,
                        f"activation {kernel.__name__[1:]} {kind} {cols} {'+'.join((activation, *parts))}",
                        types | more,
                        {
                            "BLOCK_ROWS": tile.block_rows,
                            "BLOCK_COLS": tile.block_cols,
                            "KIND": activation,
                            "DROPOUT": "dropout" in parts,
                        },
                        tile.num_warps,
                        unaligned=frozenset({"rows", "strips", "seed", "threshold"}),
                    )
