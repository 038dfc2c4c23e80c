"""Layer normalisation: out = (x - mean) * rstd * weight + bias per row, and its gradients.

With xhat = (x - mean) * rstd, g = dout * weight and <.> the mean over a row:

    dx = rstd * (g - <g> - xhat * <g * xhat>),   dweight = sum over rows of dout * xhat,   dbias = sum of dout

A row is read from memory once: up to 32k columns a program holds whole rows in registers, several short ones or one
long one, and takes the variance exactly, from the centred values. Longer rows are read in chunks, whose means and
variances are merged by Chan's formula (Chan, Golub, LeVeque 1983), and once more to normalise. In backward each program
walks over many rows and keeps dweight and dbias in registers; column_sum.py adds the programs' sums in a fixed order.
The kernels are in layer_norm_kernels.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from ..layout import row_layout
from .column_sum import column_sum, partials
from .dropout import Dropout
from .launch import DTYPES as DTYPES
from .launch import TYPES, UNBOUNDED, Configuration, RowTile, launch, program_limit, row_tile, unit_stride
from .layer_norm_kernels import backward_chunks, backward_parameters, backward_rows, forward_chunks, forward_rows

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


def run_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropped: Dropout | None,
    centred: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(out, summed, mean, rstd) of layer_norm (``residual`` None, then summed too) or add_layer_norm; of rms_norm or
    add_rms_norm if not ``centred`` (then mean is None)."""
    x = unit_stride(x)
    residual = None if residual is None else unit_stride(residual)
    rows, cols, stride = row_layout(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = None if residual is None else torch.empty_like(out)
    rstd = torch.empty((rows,), dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if centred else None
    tile = row_tile(FORWARD_TILES, cols, x.element_size())
    kernel = forward_rows if cols <= tile.block_cols else forward_chunks
    launch(
        kernel, (triton.cdiv(rows, tile.block_rows),), x.device,
        x, residual, weight, bias, out, summed, mean, rstd, rows, cols, stride,
        0 if residual is None else row_layout(residual)[2], eps, *(dropped or Dropout(0, 0, 1.0)),
        BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, DROPOUT=dropped is not None, num_warps=tile.num_warps,
    )  # fmt: skip
    return out, summed, mean, rstd


def run_backward(
    dout: Tensor,
    dsummed: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dropped: Dropout | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    param_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(gradient of dropout's input or None, gradient of what was normalised or None, dweight, dbias); of an rms norm if
    there is no ``mean``."""
    device = x.device
    x, dout = unit_stride(x), unit_stride(dout)
    dsummed = None if dsummed is None else unit_stride(dsummed)
    rows, cols, x_stride = row_layout(x)
    dout_stride, dsummed_stride = row_layout(dout)[2], 0 if dsummed is None else row_layout(dsummed)[2]
    dx = torch.empty(x.shape, dtype=x.dtype, device=device) if need_dx else None
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

    strides = (dout_stride, dsummed_stride, x_stride)
    blocks = {"BLOCK_ROWS": tile.block_rows, "BLOCK_COLS": tile.block_cols, "DROPOUT": dropped is not None}
    arguments = dropped or Dropout(0, 0, 1.0)
    if whole:
        launch(
            backward_rows, (programs,), device,
            dout, dsummed, x, weight, mean, rstd, dx, ddropped, dweight_partial, dbias_partial, rows, cols,
            *strides, *arguments, num_warps=tile.num_warps, **blocks,
        )  # fmt: skip
    else:
        if need_dx:
            launch(
                backward_chunks, (rows,), device,
                dout, dsummed, x, weight, mean, rstd, dx, ddropped, rows, cols, *strides, *arguments,
                num_warps=tile.num_warps, **blocks,
            )  # fmt: skip
        if outputs:
            launch(
                backward_parameters, (triton.cdiv(cols, summing.block_cols), programs), device,
                dout, x, mean, rstd, dweight_partial, dbias_partial, rows, cols, dout_stride, x_stride,
                BLOCK_ROWS=summing.block_rows, BLOCK_COLS=summing.block_cols, num_warps=summing.num_warps,
            )  # fmt: skip
    if partial is not None:
        first, second = (dweight, dbias) if need_dweight else (dbias, None)
        column_sum(partial, first, second)
    return ddropped, dx, dweight, dbias


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, statistics: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """x (*, cols), weight and bias (cols) or None -> out (*, cols), mean (rows), rstd (rows)."""
    out, _, mean, rstd = run_forward(x, None, weight, bias, eps, None)
    assert mean is not None
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


def build_configurations(label: str, residual: bool, dropout: bool, centred: bool = True) -> Iterator[Configuration]:
    """Every build of layer_norm, or with ``residual`` of add_layer_norm, with weight and bias, per table line; of the
    rms norms if not ``centred``."""
    scalars = {"eps": "fp32", "seed": "u64", "threshold": "u32", "keep_scale": "fp32"}
    loose, mean = frozenset({"rows"}), "*fp32" if centred else None
    for dtype, kind in sorted(TYPES.items(), key=str):
        data = f"*{kind}"
        shared = {"x_ptr": data, "weight_ptr": data, "mean_ptr": mean, "rstd_ptr": "*fp32", **scalars}
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
            (FORWARD_TILES, forward_rows, forward_chunks, forward_types),
            (BACKWARD_TILES, backward_rows, backward_chunks, backward_types),
        ):
            for line in table:
                if dtype.itemsize > line.itemsize:
                    continue
                tile = row_tile(table, min(line.columns, 2**18), dtype.itemsize)
                kernel = chunks if line.block_cols else whole
                arguments = types | sums if kernel is backward_rows else types
                yield Configuration(
                    kernel,
                    f"{label} {kernel.__name__} {kind} {min(line.columns, 2**18)}",
                    {name: arguments[name] for name in kernel.arg_names if name in arguments},
                    {"BLOCK_ROWS": tile.block_rows, "BLOCK_COLS": tile.block_cols, "DROPOUT": dropout},
                    tile.num_warps,
                    unaligned=loose,
                )
        if not residual:
            yield Configuration(
                backward_parameters,
                f"{label} backward_parameters {kind} {2**18}",
                {"dout_ptr": data, "x_ptr": data, "mean_ptr": mean, "rstd_ptr": "*fp32", **sums},
                {"BLOCK_ROWS": PARAMETER_TILE.block_rows, "BLOCK_COLS": PARAMETER_TILE.block_cols},
                PARAMETER_TILE.num_warps,
                unaligned=loose,
            )


def configurations() -> Iterator[Configuration]:
    """Every build of the kernels above as layer_norm uses them."""
    return build_configurations("layer_norm", residual=False, dropout=False)
