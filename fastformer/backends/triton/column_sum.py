"""Second stage of a gradient that is summed over rows: out[j] = sum over programs p of partial[p, j].

The first stage leaves one float32 row per program, whose order is fixed; adding those rows in a fixed order as well
makes the result the same in every run, which atomic additions would not. One program of this kernel owns 64 columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DTYPES, TYPES, Configuration, launch

BLOCK_PROGRAMS, BLOCK_COLS, NUM_WARPS = 32, 64, 4


@triton.jit(do_not_specialize=["programs"])
def _column_sum(
    partial_ptr,  # (outputs, programs, cols) float32, contiguous
    first_ptr,  # (cols) sum of partial[0]
    second_ptr,  # (cols) sum of partial[1], or None
    programs,
    cols,
    BLOCK_PROGRAMS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    col = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_col = col < cols
    output = tl.program_id(1)
    partial_ptr += output.to(tl.int64) * programs * cols
    total = tl.zeros([BLOCK_PROGRAMS, BLOCK_COLS], tl.float32)
    for start in tl.range(0, programs, BLOCK_PROGRAMS):
        program = start + tl.arange(0, BLOCK_PROGRAMS)
        offset = program.to(tl.int64)[:, None] * cols + col[None, :]
        total += tl.load(partial_ptr + offset, mask=(program < programs)[:, None] & in_col[None, :], other=0.0)
    value = tl.sum(total, 0)
    if second_ptr is None:
        tl.store(first_ptr + col, value.to(first_ptr.dtype.element_ty), mask=in_col)
    else:
        if output == 0:
            tl.store(first_ptr + col, value.to(first_ptr.dtype.element_ty), mask=in_col)
        else:
            tl.store(second_ptr + col, value.to(second_ptr.dtype.element_ty), mask=in_col)


def column_sum(partial: Tensor, first: Tensor, second: Tensor | None) -> None:
    """Writes the sums over dimension 1 of ``partial`` (1 or 2, programs, cols) into ``first`` and ``second``."""
    outputs, programs, cols = partial.shape
    grid = (triton.cdiv(cols, BLOCK_COLS), outputs)
    blocks = {"BLOCK_PROGRAMS": BLOCK_PROGRAMS, "BLOCK_COLS": BLOCK_COLS}
    launch(_column_sum, grid, partial.device, partial, first, second, programs, cols, num_warps=NUM_WARPS, **blocks)


def configurations() -> Iterator[Configuration]:
    """Every build of the second stage: one or two outputs, in each dtype."""
    for dtype in sorted(DTYPES, key=str):
        for outputs in (1, 2):
            pointer = f"*{TYPES[dtype]}"
            yield Configuration(
                _column_sum,
                f"column_sum {TYPES[dtype]} x{outputs}",
                {"partial_ptr": "*fp32", "first_ptr": pointer, "second_ptr": pointer if outputs == 2 else None},
                {"BLOCK_PROGRAMS": BLOCK_PROGRAMS, "BLOCK_COLS": BLOCK_COLS},
                NUM_WARPS,
                unaligned=frozenset({"programs"}),
            )


def partials(outputs: int, programs: int, cols: int, device: torch.device) -> Tensor:
    """The (outputs, programs, cols) float32 buffer between the two stages."""
    return torch.empty((outputs, programs, cols), dtype=torch.float32, device=device)
