"""How much of the score matrix a program of each attention kernel takes at once, by GPU, dtype, head size and features.

Every number here was found by compiling (aot.py): large blocks that stay in registers and in shared memory. Float32
with head_dim over 64 and further features fits into shared memory, but not all of it into registers: a block has no
fewer than 16 queries and 32 keys, the least that tl.dot and dropout take.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton

from .launch import capability


class Tile(NamedTuple):
    """How one program of one kernel works through its part of the score matrix."""

    block_q: int
    """Queries at once."""
    block_k: int
    """Keys at once."""
    num_warps: int
    num_stages: int
    """Blocks of the loop that are in flight at once."""


class Tiles(NamedTuple):
    """The kernels' tiles for one head size."""

    forward: Tile
    backward_q: Tile
    backward_k: Tile


class BiasTiles(NamedTuple):
    """Those of the kernels for the gradients of the biases."""

    backward_bias: Tile
    backward_distance_bias: Tile
    """Square, because blocks on one diagonal are added up."""


# (sm_ family, bytes per element, head_dim rounded up to a power of two) -> tiles, in the sm_80 family within the 99 KiB
# of shared memory of an sm_86 or sm_89. These are for calls with nothing but causal, a padding mask, ALiBi.
TILES: dict[tuple[int, int, int], Tiles] = {
    (80, 2, 16): Tiles(Tile(128, 128, 4, 3), Tile(128, 64, 4, 3), Tile(128, 128, 8, 2)),
    (80, 2, 32): Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    (80, 2, 64): Tiles(Tile(128, 64, 4, 3), Tile(128, 32, 8, 3), Tile(32, 128, 8, 2)),
    (80, 2, 128): Tiles(Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), Tile(64, 64, 8, 1)),
    (80, 2, 256): Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(16, 64, 8, 1)),
    (80, 4, 16): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (80, 4, 32): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (80, 4, 64): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (80, 4, 128): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (80, 4, 256): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (90, 2, 16): Tiles(Tile(128, 128, 4, 3), Tile(128, 64, 4, 3), Tile(128, 128, 8, 2)),
    (90, 2, 32): Tiles(Tile(128, 128, 4, 3), Tile(128, 64, 4, 3), Tile(64, 128, 8, 3)),
    (90, 2, 64): Tiles(Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(64, 128, 8, 3)),
    (90, 2, 128): Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    (90, 2, 256): Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 32, 8, 2)),
    (90, 4, 16): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (90, 4, 32): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (90, 4, 64): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (90, 4, 128): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (90, 4, 256): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
}


# What else is done to a score takes registers away from the block. Where these add up to at most 4, FEATURE_TILES have
# room for it; beyond that, SMALL has.
WEIGHTS = {"mask": 2, "bias": 2, "relative_bias": 2, "dropout": 1, "softcap": 1, "window": 1, "varlen": 1}
FORWARD_FREE = frozenset({"softcap", "window", "varlen"})  # the forward kernel has room for these, from head_dim 64 on
FEATURE_TILES: dict[tuple[int, int, int], Tiles] = {
    (80, 2, 16): Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 1)),
    (80, 2, 32): Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 1)),
    (80, 2, 64): Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 1)),
    (80, 2, 128): Tiles(Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(32, 32, 8, 1)),
    (80, 2, 256): Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    (80, 4, 16): Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 3)),
    (80, 4, 32): Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 3)),
    (80, 4, 64): Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 3)),
    (80, 4, 128): Tiles(Tile(32, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
    (80, 4, 256): Tiles(Tile(16, 32, 8, 2), Tile(16, 32, 16, 1), Tile(16, 32, 16, 1)),
    (90, 2, 16): Tiles(Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
    (90, 2, 32): Tiles(Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
    (90, 2, 64): Tiles(Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
    (90, 2, 128): Tiles(Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(32, 32, 8, 2)),
    (90, 2, 256): Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    (90, 4, 16): Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 3)),
    (90, 4, 32): Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 3)),
    (90, 4, 64): Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 3)),
    (90, 4, 128): Tiles(Tile(32, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
    (90, 4, 256): Tiles(Tile(16, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
}
# (bytes per element, whether head_dim is over 128) -> tiles
SMALL: dict[tuple[int, bool], Tiles] = {
    (2, False): Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 32, 8, 1)),
    (2, True): Tiles(Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    (4, False): Tiles(Tile(16, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
    (4, True): Tiles(Tile(16, 32, 8, 2), Tile(16, 32, 16, 1), Tile(16, 32, 16, 1)),
}
BIAS_TILES: dict[tuple[int, int, int], BiasTiles] = {
    (80, 2, 16): BiasTiles(Tile(32, 64, 8, 1), Tile(32, 32, 4, 1)),
    (80, 2, 32): BiasTiles(Tile(32, 64, 8, 1), Tile(32, 32, 4, 1)),
    (80, 2, 64): BiasTiles(Tile(32, 64, 8, 1), Tile(32, 32, 4, 1)),
    (80, 2, 128): BiasTiles(Tile(32, 64, 8, 1), Tile(32, 32, 4, 1)),
    (80, 2, 256): BiasTiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 2)),
    (80, 4, 16): BiasTiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (80, 4, 32): BiasTiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (80, 4, 64): BiasTiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (80, 4, 128): BiasTiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (80, 4, 256): BiasTiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (90, 2, 16): BiasTiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (90, 2, 32): BiasTiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (90, 2, 64): BiasTiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (90, 2, 128): BiasTiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (90, 2, 256): BiasTiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 2)),
    (90, 4, 16): BiasTiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (90, 4, 32): BiasTiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (90, 4, 64): BiasTiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (90, 4, 128): BiasTiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (90, 4, 256): BiasTiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
}


def block_dim(head_dim: int) -> int:
    """``head_dim`` as the kernels hold it: a power of two that a matrix instruction can take."""
    return max(16, triton.next_power_of_2(head_dim))


def family(sm: int) -> int:
    """Which lines of TILES a GPU of compute capability ``sm`` uses: 90 from Hopper's data-centre line on, else 80."""
    return 90 if sm // 10 in (9, 10) else 80


def tiles_for(sm_family: int, itemsize: int, dim: int, features: Iterable[str]) -> Tiles:
    """The tiles of a call with ``features``, named as in attention_options.py. ``dim``: of :func:`block_dim`."""
    key = (sm_family, itemsize, dim)
    weight = sum(WEIGHTS.get(name, 0) for name in features)
    if weight == 0:
        return TILES[key]
    if weight > 4:
        return SMALL[itemsize, dim > 128]
    tiles = FEATURE_TILES[key]
    if dim >= 64 and FORWARD_FREE.issuperset(WEIGHTS.keys() & features):
        tiles = tiles._replace(forward=TILES[key].forward)
    return tiles


@functools.cache
def tiles_on(
    device: torch.device, itemsize: int, head_dim: int, head_dim_v: int, features: tuple[str, ...]
) -> tuple[Tiles, BiasTiles]:
    """The tiles of a call on ``device``, and those of the gradients of its biases."""
    sm_family, dim = family(capability(device)), max(block_dim(head_dim), block_dim(head_dim_v))
    return tiles_for(sm_family, itemsize, dim, features), BIAS_TILES[sm_family, itemsize, dim]
