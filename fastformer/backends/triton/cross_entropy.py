"""Cross-entropy per row, and the gradient of the logits; the formula is in csrc/include/fastformer.h.

Forward reads the logits once: running maximum and sum of exponentials per column of the block, rescaled as the maximum
grows (Milakov, Gimelshein 2018, arXiv:1805.02867), together with two sums over the classes' targets q', which are label
smoothing's share, s / V * w, or the smoothed and weighted probabilities. Where the gradient is wanted at once, the same
program goes over its row again, which is then in L2. Else only the log-sum-exp of each row is kept, from which backward
makes every gradient in one more pass, in tiles that need nothing from each other; that of probabilities needs the sums
again and is the forward kernel's.

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

FEATURES = frozenset({"weight", "label_smoothing", "z_loss", "probabilities"})

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


@triton.jit
def _soft_targets(row, col, mask, in_col, cols, probabilities_ptr, probabilities_stride, weight_ptr, smoothing):
    """q', the factor of lse - z in each class's term: ((1 - s) q + s / V) w, without q label smoothing's share."""
    target = tl.zeros([row.shape[0], col.shape[0]], tl.float32) + smoothing / cols
    if probabilities_ptr is not None:
        q = tl.load(probabilities_ptr + row[:, None] * probabilities_stride + col[None, :], mask=mask, other=0.0)
        target += (1.0 - smoothing) * q.to(tl.float32)
    if weight_ptr is not None:
        target *= tl.load(weight_ptr + col, mask=in_col, other=0.0)[None, :]
    return tl.where(mask, target, 0.0)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _forward(
    logits_ptr,  # (rows, cols), rows logits_stride apart
    target_ptr,  # (rows) int64, or None
    probabilities_ptr,  # (rows, cols), rows probabilities_stride apart, where there is no target; or None
    weight_ptr,  # (cols) float32, or None = 1
    dloss_ptr,  # (rows) float32, dloss_stride apart (0: one value for all), beside dlogits; or None
    loss_ptr,  # (rows) float32, or None
    lse_ptr,  # (rows) float32, or None
    dlogits_ptr,  # (rows, cols), rows dlogits_stride apart, or None; may be logits
    dprobabilities_ptr,  # (rows, cols) contiguous, or None
    rows,
    cols,
    logits_stride,
    target_stride,
    probabilities_stride,
    dloss_stride,
    dlogits_stride,
    ignore_index,
    smoothing,
    z_loss,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    SOFT: tl.constexpr,  # probabilities or label smoothing
    Z_LOSS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_row = row < rows
    maximum = tl.full([BLOCK_ROWS, BLOCK_COLS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    targets = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    moment = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)  # q' * z
    for start in tl.range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS).to(tl.int64)
        in_col = col < cols
        mask = in_row[:, None] & in_col[None, :]
        z = tl.load(logits_ptr + row[:, None] * logits_stride + col[None, :], mask=mask, other=float("-inf"))
        z = z.to(tl.float32)
        if SOFT:
            q = _soft_targets(
                row, col, mask, in_col, cols, probabilities_ptr, probabilities_stride, weight_ptr, smoothing
            )  # fmt: skip
            targets += q
            moment += tl.where(mask, q * z, 0.0)
        grown = tl.maximum(maximum, z)
        shift = tl.where(grown == float("-inf"), 0.0, grown)
        total = total * tl.exp(maximum - shift) + tl.exp(z - shift)
        maximum = grown
    row_max = tl.max(maximum, 1)
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    lse = shift + tl.log(tl.sum(total * tl.exp(maximum - shift[:, None]), 1))
    one_hot = tl.zeros([BLOCK_ROWS], tl.float32)  # weight of the target's own term
    loss = tl.zeros([BLOCK_ROWS], tl.float32)
    counted = in_row
    if target_ptr is not None:
        target = tl.load(target_ptr + row * target_stride, mask=in_row, other=0)
        counted = in_row & (target != ignore_index)
        valid = in_row & (target >= 0) & (target < cols)
        z_target = tl.load(logits_ptr + row * logits_stride + target, mask=valid, other=float("nan")).to(tl.float32)
        one_hot += 1.0 - smoothing
        if weight_ptr is not None:
            one_hot *= tl.load(weight_ptr + target, mask=valid, other=1.0)
        loss += one_hot * (lse - z_target)
    of_p = one_hot
    if SOFT:
        row_targets = tl.sum(targets, 1)
        loss += lse * row_targets - tl.sum(moment, 1)
        of_p += row_targets
    if Z_LOSS:
        loss += z_loss * lse * lse
        of_p += 2.0 * z_loss * lse
    if loss_ptr is not None:
        tl.store(loss_ptr + row, tl.where(counted, loss, 0.0), mask=in_row)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, lse, mask=in_row)
    if dlogits_ptr is not None:
        dloss = tl.load(dloss_ptr + row * dloss_stride, mask=in_row, other=0.0)
        if target_ptr is not None:
            dloss = tl.where(valid, dloss, float("nan"))
        for start in tl.range(0, cols, BLOCK_COLS):
            col = start + tl.arange(0, BLOCK_COLS).to(tl.int64)
            in_col = col < cols
            mask = in_row[:, None] & in_col[None, :]
            z = tl.load(logits_ptr + row[:, None] * logits_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
            gradient = tl.exp(z - lse[:, None]) * of_p[:, None]
            if SOFT:
                gradient -= _soft_targets(
                    row, col, mask, in_col, cols, probabilities_ptr, probabilities_stride, weight_ptr, smoothing
                )  # fmt: skip
            if target_ptr is not None:
                gradient -= tl.where(col[None, :] == target[:, None], one_hot[:, None], 0.0)
            gradient = tl.where(counted[:, None], gradient * dloss[:, None], 0.0)
            if dprobabilities_ptr is not None:
                offset = row[:, None] * cols + col[None, :]
                dq = (1.0 - smoothing) * (lse[:, None] - z) * dloss[:, None]
                if weight_ptr is not None:
                    dq *= tl.load(weight_ptr + col, mask=in_col, other=0.0)[None, :]
                tl.store(dprobabilities_ptr + offset, dq.to(dprobabilities_ptr.dtype.element_ty), mask=mask)
            offset = row[:, None] * dlogits_stride + col[None, :]
            tl.store(dlogits_ptr + offset, gradient.to(dlogits_ptr.dtype.element_ty), mask=mask)


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
    z_loss,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    SMOOTH: tl.constexpr,
    Z_LOSS: tl.constexpr,
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
    if Z_LOSS:
        gradient += 2.0 * z_loss * lse[:, None] * probability
    gradient = tl.where(counted[:, None], gradient * dloss[:, None], 0.0)
    tl.store(
        dlogits_ptr + row[:, None] * cols + col[None, :], gradient.to(dlogits_ptr.dtype.element_ty), mask=mask
    )  # fmt: skip


SCALE_BLOCK, SCALE_WARPS = 4096, 4


@triton.jit(do_not_specialize=["count"])
def _scale(
    gradient_ptr,  # (count) contiguous
    factor_ptr,  # ()
    count,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(gradient_ptr + offset, mask=offset < count).to(tl.float32) * factor
        tl.store(gradient_ptr + offset, value.to(gradient_ptr.dtype.element_ty), mask=offset < count)


def scale(gradient: Tensor, factor: Tensor) -> None:
    """gradient (rows, cols) contiguous *= factor, one number, without a trip over memory where that is 1: only the
    device knows, and asking it would be waiting for it."""
    count = gradient.numel()
    launch(
        _scale, (triton.cdiv(count, SCALE_BLOCK),), gradient.device,
        gradient, factor, count, BLOCK=SCALE_BLOCK, num_warps=SCALE_WARPS,
    )  # fmt: skip


def gradient_in_forward(cols: int, dtype: torch.dtype) -> bool:
    """Whether writing the gradient of rows of ``cols`` logits in the forward pass is the faster way.

    It saves reading the logits from memory again. Never for float16: what trains in it scales the loss, because small
    gradients underflow, and here the scale would come too late.
    """
    return dtype != torch.float16


def forward(
    logits: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float = 0.0,
    probabilities: Tensor | None = None,
    dloss: Tensor | None = None,
    dlogits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """logits (rows, cols), target (rows) int64 or probabilities (rows, cols), weight (cols) float32 or None
    -> loss (rows), lse (rows) float32; with dlogits (rows, cols) and dloss (rows) the gradient as well."""
    loss = torch.empty((logits.shape[0],), dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(loss)
    _whole_rows(
        logits, target, probabilities, weight, dloss, loss, lse, dlogits, None, ignore_index, label_smoothing, z_loss
    )
    return loss, lse


def backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float = 0.0,
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
        float(z_loss), BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, SMOOTH=smooth, Z_LOSS=z_loss != 0,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return dlogits


def backward_probabilities(
    dloss: Tensor,
    logits: Tensor,
    probabilities: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    z_loss: float = 0.0,
    need_dprobabilities: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """dloss (rows) float32 -> dlogits, and dprobabilities (or None), both (rows, cols) in the dtype of logits."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    dprobabilities = torch.empty_like(dlogits) if need_dprobabilities else None
    _whole_rows(
        logits, None, probabilities, weight, dloss, None, None, dlogits, dprobabilities, 0, label_smoothing, z_loss
    )
    return dlogits, dprobabilities


def _whole_rows(
    logits: Tensor,
    target: Tensor | None,
    probabilities: Tensor | None,
    weight: Tensor | None,
    dloss: Tensor | None,
    loss: Tensor | None,
    lse: Tensor | None,
    dlogits: Tensor | None,
    dprobabilities: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    rows, cols = logits.shape
    logits = unit_stride(logits)
    probabilities = None if probabilities is None else unit_stride(probabilities)
    tile = row_tile(FORWARD_TILES, cols, logits.element_size())
    launch(
        _forward, (triton.cdiv(rows, tile.block_rows),), logits.device,
        logits, target, probabilities, weight, dloss, loss, lse, dlogits, dprobabilities, rows, cols, logits.stride(0),
        0 if target is None else target.stride(0), 0 if probabilities is None else probabilities.stride(0),
        0 if dloss is None else dloss.stride(0), 0 if dlogits is None else dlogits.stride(0), ignore_index,
        float(label_smoothing), float(z_loss), BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols,
        SOFT=probabilities is not None or label_smoothing > 0,
        Z_LOSS=z_loss != 0, num_warps=tile.num_warps,
    )  # fmt: skip


# Pointers of the forward kernel by what a build is for.
_BUILDS = {
    "": {"target_ptr": "*i64", "loss_ptr": "*fp32", "lse_ptr": "*fp32"},
    " weight+smoothing": {"target_ptr": "*i64", "weight_ptr": "*fp32", "loss_ptr": "*fp32", "lse_ptr": "*fp32"},
    " gradient": {"target_ptr": "*i64", "dloss_ptr": "*fp32", "loss_ptr": "*fp32", "lse_ptr": "*fp32"},
    " probabilities": {"weight_ptr": "*fp32", "dloss_ptr": "*fp32"},
}


def configurations() -> Iterator[Configuration]:
    """Every line of both tables in each dtype: bare, as language models use it, with the gradient, with everything."""
    for dtype, kind in sorted(TYPES.items(), key=str):
        pointer = f"*{kind}"
        yield Configuration(
            _scale,
            f"cross_entropy scale {kind}",
            {"gradient_ptr": pointer, "factor_ptr": pointer},
            {"BLOCK": SCALE_BLOCK},
            SCALE_WARPS,
            unaligned=frozenset({"count"}),
        )
        for features, pointers in _BUILDS.items():
            data = ["logits_ptr"]
            data += ["dlogits_ptr"] if "dloss_ptr" in pointers else []
            data += ["probabilities_ptr", "dprobabilities_ptr"] if features == " probabilities" else []
            full = "weight_ptr" in pointers
            forward_types = pointers | dict.fromkeys(data, f"*{kind}")
            backward_types = dict.fromkeys(("weight_ptr", "weight_sum_ptr"), "*fp32") if full else {}
            backward_types |= {"dloss_ptr": "*fp32", "lse_ptr": "*fp32", "target_ptr": "*i64"}
            backward_types |= {"logits_ptr": f"*{kind}", "dlogits_ptr": f"*{kind}"}
            for table, kernel, types, soft in (
                (FORWARD_TILES, _forward, forward_types, "SOFT"),
                (BACKWARD_TILES, _backward, backward_types, "SMOOTH"),
            ):
                if kernel is _backward and features in (" gradient", " probabilities"):
                    continue
                every = {name: types.get(name) for name in kernel.arg_names if name.endswith("_ptr")}
                for line in table:
                    cols = min(line.columns, 2**18)
                    tile = row_tile(table, cols, dtype.itemsize)
                    yield Configuration(
                        kernel,
                        f"cross_entropy {kernel.__name__[1:]} {kind} {cols}{features}",
                        every | {"smoothing": "fp32", "z_loss": "fp32"},
                        {"BLOCK_ROWS": tile.block_rows, "BLOCK_COLS": tile.block_cols, soft: full, "Z_LOSS": full},
                        tile.num_warps,
                        unaligned=frozenset({"rows", "ignore_index", "target_stride", "dloss_stride"}),
                    )
