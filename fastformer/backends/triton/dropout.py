"""The dropout mask of csrc/include/fastformer.h inside a kernel.

Philox4x32-10 (Salmon et al., SC 2011) with key = seed and counter = (c, row_lo, row_hi, 0) gives four words; word w of
counter c decides column (c / 8) * 32 + w * 8 + c % 8. So each counter is computed once and its four words are spread
over their columns by a reshape, instead of computing a counter for every column and throwing three words away.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import triton
import triton.language as tl


class Dropout(NamedTuple):
    """Kernel arguments of one dropout: element kept iff its 32 random bits >= threshold, then multiplied by scale."""

    seed: int
    threshold: int
    scale: float


def dropout(dropout_p: float, seed: int) -> Dropout:
    """The arguments for probability ``dropout_p`` in [0, 1]; the scale is rounded to float32, as in every backend."""
    scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    return Dropout(
        seed & (2**64 - 1), min(int(dropout_p * 2**32), 2**32 - 1), struct.unpack("f", struct.pack("f", scale))[0]
    )


@triton.jit
def keep_mask(
    seed,  # uint64
    threshold,  # uint32
    row,  # (BLOCK_ROWS) int64
    start,  # first column, a multiple of 32
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """(BLOCK_ROWS, BLOCK_COLS) of booleans, True where the element survives."""
    counter = start // 4 + tl.arange(0, BLOCK_COLS // 4)
    row_lo = (row & 0xFFFFFFFF).to(tl.uint32)
    row_hi = (row >> 32).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        seed, counter.to(tl.uint32)[None, :], row_lo[:, None], row_hi[:, None], tl.full((1, 1), 0, tl.uint32)
    )
    # Compared before they are moved, so that the exchange between threads carries bytes.
    keep0 = (word0 >= threshold).to(tl.int8)
    keep1 = (word1 >= threshold).to(tl.int8)
    keep2 = (word2 >= threshold).to(tl.int8)
    keep3 = (word3 >= threshold).to(tl.int8)
    keep = tl.join(tl.join(keep0, keep2), tl.join(keep1, keep3))  # the last two dimensions count the word
    keep = tl.reshape(keep, (BLOCK_ROWS, BLOCK_COLS // 32, 8, 4))
    keep = tl.reshape(tl.permute(keep, (0, 1, 3, 2)), (BLOCK_ROWS, BLOCK_COLS))
    return keep != 0
