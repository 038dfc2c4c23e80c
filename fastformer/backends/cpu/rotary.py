"""Rotary position embedding by csrc/cpu/rotary.cpp; see backends/reference/rotary.py."""

from __future__ import annotations

from torch import Tensor

from ... import _C
from ..layout import dense_like
from ._call import DTYPES, on_huge_pages

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
    """q, k (B, H, S, D) or None, cos, sin (positions, rotary_dim / 2), position_ids (B, S) int64 or None: the rotated.

    Raises ValueError for a position outside the tables.
    """
    q_out = q if inplace else on_huge_pages(dense_like(q))
    k_out = k if inplace or k is None else on_huge_pages(dense_like(k))
    _C.rotary(q, q_out, k, k_out, cos, sin, position_ids, offset, batch_offset, interleaved, inverse)
    return q_out, k_out
