"""Cross-entropy of class indices per row, and the gradient of the logits; the formula is in csrc/include/fastformer.h.

Forward reads the logits once: running maximum and sum of exponentials per column of the block, rescaled as the maximum
grows (Milakov, Gimelshein 2018, arXiv:1805.02867), together with the two sums that label smoothing needs. Only the
log-sum-exp of each row is kept, from which backward makes every gradient in one more pass, in tiles that need nothing
from each other.

A target outside [0, cols) that is not ignore_index makes its loss and its row of the gradient NaN: finding it earlier
would mean waiting for the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DTYPES as DTYPES
from .launch import TYPES, UNBOUNDED, Configuration, RowTile, launch, row_tile, unit_stride

FEATURES = frozenset({"weight", "label_smoothing"})

FORWARD_TILES = (
    #       columns, rows, warps
    RowTile(32, 64, 4),
    RowTile(64, 32, 4),
    RowTile(128, 16, 4),
    RowTile(256, 8, 4),
    RowTile(512, 4, 4),
    RowTile(1024, 2, 4),
    RowTile(2048, 1, 4),
    RowTile(UNBOUNDED, 1, 8, block_cols=4096),
)
BACKWARD_TILES = (
    RowTile(32, 64, 4),
    RowTile(64, 32, 4),
    RowTile(128, 16, 4),
    RowTile(256, 8, 4),
    RowTile(512, 4, 4),
    RowTile(1024, 2, 4),
    RowTile(UNBOUNDED, 1, 4, block_cols=2048),
)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _forward(
    logits_ptr,  # (rows, cols), rows logits_stride apart
    target_ptr,  # (rows) int64
    weight_ptr,  # (cols) float32, or None = 1
    loss_ptr,  # (rows) float32
    lse_ptr,  # (rows) float32
    rows,
    cols,
    logits_stride,
    target_stride,
    ignore_index,
    smoothing,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_row = row < rows
    maximum = tl.full([BLOCK_ROWS, BLOCK_COLS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    weighted = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)  # weight * z, for label smoothing
    weights = tl.zeros([BLOCK_COLS], tl.float32)
    for start in tl.range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS).to(tl.int64)
        in_col = col < cols
        mask = in_row[:, None] & in_col[None, :]
        z = tl.load(logits_ptr + row[:, None] * logits_stride + col[None, :], mask=mask, other=float("-inf"))
        z = z.to(tl.float32)
        if SMOOTH:
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + col, mask=in_col, other=0.0)
                weights += weight
                weighted += tl.where(mask, weight[None, :] * z, 0.0)
            else:
                weighted += tl.where(mask, z, 0.0)
        grown = tl.maximum(maximum, z)
        shift = tl.where(grown == float("-inf"), 0.0, grown)
        total = total * tl.exp(maximum - shift) + tl.exp(z - shift)
        maximum = grown
    row_max = tl.max(maximum, 1)
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    lse = shift + tl.log(tl.sum(total * tl.exp(maximum - shift[:, None]), 1))
    target = tl.load(target_ptr + row * target_stride, mask=in_row, other=0)
    valid = in_row & (target >= 0) & (target < cols)
    z_target = tl.load(logits_ptr + row * logits_stride + target, mask=valid, other=float("nan")).to(tl.float32)
    loss = lse - z_target
    if weight_ptr is not None:
        loss *= tl.load(weight_ptr + target, mask=valid, other=1.0)
    if SMOOTH:
        weight_sum = tl.cast(cols, tl.float32)
        if weight_ptr is not None:
            weight_sum = tl.sum(weights, 0)
        loss = (1.0 - smoothing) * loss + smoothing * ((lse * weight_sum - tl.sum(weighted, 1)) / cols)
    loss = tl.where(target == ignore_index, 0.0, loss)
    tl.store(loss_ptr + row, loss, mask=in_row)
    tl.store(lse_ptr + row, lse, mask=in_row)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _backward(
    dloss_ptr,  # (rows) float32, dloss_stride apart (0: one value for all)
    logits_ptr,  # (rows, cols), rows logits_stride apart
    target_ptr,  # (rows) int64
    weight_ptr,  # (cols) float32, or None = 1
    weight_sum_ptr,  # () float32 sum of weight; None without weight or label smoothing
    lse_ptr,  # (rows) float32
    dlogits_ptr,  # (rows, cols) contiguous
    rows,
    cols,
    dloss_stride,
    logits_stride,
    target_stride,
    ignore_index,
    smoothing,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    blocks = tl.cdiv(cols, BLOCK_COLS)
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = program % blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_row, in_col = row < rows, col < cols
    mask = in_row[:, None] & in_col[None, :]
    target = tl.load(target_ptr + row * target_stride, mask=in_row, other=0)
    counted = in_row & (target != ignore_index)
    valid = in_row & (target >= 0) & (target < cols)
    lse = tl.load(lse_ptr + row, mask=in_row, other=0.0)
    dloss = tl.load(dloss_ptr + row * dloss_stride, mask=in_row, other=0.0)
    dloss = tl.where(counted, tl.where(valid, dloss, float("nan")), 0.0)
    z = tl.load(logits_ptr + row[:, None] * logits_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    probability = tl.exp(z - lse[:, None])
    gradient = probability - (col[None, :] == target[:, None]).to(tl.float32)
    if weight_ptr is not None:
        gradient *= tl.load(weight_ptr + target, mask=valid, other=1.0)[:, None]
    if SMOOTH:
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + col, mask=in_col, other=0.0)
            even = probability * tl.load(weight_sum_ptr) - weight[None, :]
        else:
            even = probability * tl.cast(cols, tl.float32) - 1.0
        gradient = (1.0 - smoothing) * gradient + smoothing * (even / cols)
    gradient = tl.where(counted[:, None], gradient * dloss[:, None], 0.0)
    tl.store(
        dlogits_ptr + row[:, None] * cols + col[None, :], gradient.to(dlogits_ptr.dtype.element_ty), mask=mask
    )  # fmt: skip


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """logits (rows, cols), target (rows) int64, weight (cols) float32 or None -> loss (rows), lse (rows) float32."""
    rows, cols = logits.shape
    logits = unit_stride(logits)
    loss = torch.empty((rows,), dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(loss)
    tile = row_tile(FORWARD_TILES, cols, logits.element_size())
    launch(
        _forward, (triton.cdiv(rows, tile.block_rows),), logits.device,
        logits, target, weight, loss, lse, rows, cols, logits.stride(0), target.stride(0), ignore_index,
        float(label_smoothing), BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, SMOOTH=label_smoothing > 0,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return loss, lse


def backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """dloss (rows) float32 (an expanded scalar is fine) -> dlogits (rows, cols) in the dtype of logits."""
    rows, cols = logits.shape
    logits = unit_stride(logits)
    dlogits = torch.empty((rows, cols), dtype=logits.dtype, device=logits.device)
    tile = row_tile(BACKWARD_TILES, cols, logits.element_size())
    smooth = label_smoothing > 0
    launch(
        _backward, (triton.cdiv(rows, tile.block_rows) * triton.cdiv(cols, tile.block_cols),), logits.device,
        dloss, logits, target, weight, weight.sum() if smooth and weight is not None else None, lse, dlogits,
        rows, cols, dloss.stride(0), logits.stride(0), target.stride(0), ignore_index, float(label_smoothing),
        BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, SMOOTH=smooth, num_warps=tile.num_warps,
    )  # fmt: skip
    return dlogits


def configurations() -> Iterator[Configuration]:
    """Every line of both tables in each dtype: bare, as language models use it, and with everything."""
    for dtype, kind in sorted(TYPES.items(), key=str):
        for full in (False, True):
            weight = "*fp32" if full else None
            types = {
                "dloss_ptr": "*fp32",
                "logits_ptr": f"*{kind}",
                "target_ptr": "*i64",
                "weight_ptr": weight,
                "weight_sum_ptr": weight,
                "loss_ptr": "*fp32",
                "lse_ptr": "*fp32",
                "dlogits_ptr": f"*{kind}",
                "smoothing": "fp32",
            }
            for table, kernel in ((FORWARD_TILES, _forward), (BACKWARD_TILES, _backward)):
                for line in table:
                    cols = min(line.columns, 2**18)
                    tile = row_tile(table, cols, dtype.itemsize)
                    features = " weight+smoothing" if full else ""
                    yield Configuration(
                        kernel,
                        f"cross_entropy {kernel.__name__[1:]} {kind} {cols}{features}",
                        {name: types[name] for name in kernel.arg_names if name in types},
                        {"BLOCK_ROWS": tile.block_rows, "BLOCK_COLS": tile.block_cols, "SMOOTH": full},
                        tile.num_warps,
                        unaligned=frozenset({"rows", "ignore_index", "target_stride", "dloss_stride"}),
                    )
