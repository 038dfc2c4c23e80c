"""The dropout mask all backends share, in plain PyTorch.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) with key = seed and
counter = (c, row_lo, row_hi, 0); column ``col`` of ``row`` reads word (col / 8) % 4 of counter c = (col / 32) * 8 +
col % 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mulhilo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    # 32 x 32 -> 64 bits in signed 64-bit arithmetic: split b so that no product exceeds 2^48. In place, because fresh
    # memory takes longer than the arithmetic.
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    low += (high & 0xFFFF).bitwise_left_shift_(16)
    high = high.bitwise_right_shift_(16).add_(low >> 32).bitwise_and_(_MASK)
    return high, low.bitwise_and_(_MASK)


def random_bits(seed: int, rows: Tensor, cols: int) -> Tensor:
    """32 random bits for each (row, column): an int64 tensor ``(len(rows), cols)`` of values in [0, 2^32)."""
    # A counter's four words serve four columns, 8 apart: 8 counters for every 32 columns.
    blocks = (cols + 31) // 32
    shape = (len(rows), 8 * blocks)
    c0 = torch.arange(8 * blocks, device=rows.device).expand(shape)
    c1 = (rows & _MASK)[:, None].expand(shape)
    c2 = (rows >> 32)[:, None].expand(shape)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        h0, l0 = _mulhilo(c0, 0xD2511F53)
        h1, l1 = _mulhilo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h1.bitwise_xor_(c1).bitwise_xor_(k0), l1, h0.bitwise_xor_(c3).bitwise_xor_(k1), l0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    words = torch.stack([c.reshape(len(rows), blocks, 8) for c in (c0, c1, c2, c3)], 2)
    return words.reshape(len(rows), 32 * blocks)[:, :cols]


def dropout_scales(
    seed: int, rows: int | Tensor, cols: int, p: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """``(rows, cols)`` of 1 / (1 - p) where the element survives, else 0; ``rows``: how many, or which."""
    if not isinstance(rows, Tensor):
        rows = torch.arange(rows, device=device)
    if p >= 1:
        return torch.zeros(len(rows), cols, device=device, dtype=dtype)
    bits = random_bits(seed, rows, cols)
    # Like the kernels: the scale is rounded to float32 first, so all backends multiply by the same number.
    scale = torch.tensor(1 / (1 - p), dtype=torch.float32).item()
    return (bits >= min(int(p * 2**32), _MASK)).to(dtype) * scale
