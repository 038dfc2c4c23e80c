"""Rotary position embedding by csrc/cuda/rotary.cu; see backends/reference/rotary.py.

A position outside the tables makes its heads NaN: finding it earlier would mean waiting for the device.
"""

from __future__ import annotations

from torch import Tensor

from ..layout import dense_like
from ._call import DTYPES, library, on_device, stream

FEATURES: frozenset[str] = frozenset()
__all__ = ["DTYPES", "FEATURES", "forward"]


def forward(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offset: int,
    batch_offset: int,
    interleaved: bool,
    inverse: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    """q, k (B, H, S, D) or None, cos, sin (positions, R / 2), position_ids (B, S) int64 or None: the rotated."""
    q_out = q if inplace else dense_like(q)
    k_out = k if inplace or k is None else dense_like(k)
    with on_device(q):
        library().rotary(
            q, q_out, k, k_out, cos, sin, position_ids, offset, batch_offset, interleaved, inverse, stream(q)
        )
    return q_out, k_out
