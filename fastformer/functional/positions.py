"""The sinusoids of the original transformer (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoidal_positions(
    length: int,
    dim: int,
    *,
    offset: int = 0,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """``out[s, 2 i] = sin(p / base^(2 i / dim))`` and ``out[s, 2 i + 1] = cos(...)`` of the same, with p = offset + s.

    Args:
        length: rows. dim: columns; of an odd number the last has a sine and no cosine.
        offset: position of the first row.
        base: the longest wavelength is ``2 pi base``.
        dtype, device: of the result; the angles are computed in float64.

    Returns:
        ``(length, dim)``.
    """
    if length < 0 or dim < 1 or offset < 0:
        raise ValueError(f"length, dim, offset: {length}, {dim}, {offset}; expected at least 0, 1 and 0")
    if not base > 0:
        raise ValueError(f"base: {base} is not positive")
    position = torch.arange(offset, offset + length, dtype=torch.float64, device=device)
    wavelength = base ** (torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angle = position[:, None] / wavelength
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)[:, :dim].to(dtype)
