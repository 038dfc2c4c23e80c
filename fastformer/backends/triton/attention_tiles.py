"""How much of the score matrix a program of each attention kernel takes at once, by GPU, dtype, head size and features.

The numbers are in attention_tiles_sm80.py and attention_tiles_sm90.py, which tune.py writes: on a GPU the fastest that
it finds, without one large blocks that stay in registers and in shared memory. No block has fewer than 16 queries or 32
keys, the least that tl.dot and dropout take.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton

from . import attention_tiles_sm80, attention_tiles_sm90
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
    """The kernels' tiles of one line of a table. The last two are those for the gradients of biases, which only lines
    for calls with biases have."""

    forward: Tile
    backward_q: Tile
    backward_k: Tile
    backward_bias: Tile | None = None
    backward_distance_bias: Tile | None = None
    """Square, because blocks on one diagonal are added up."""

    def tile(self, kernel: str) -> Tile:
        """The tile of one of the fields that is there."""
        tile: Tile | None = getattr(self, kernel)
        assert tile is not None
        return tile


Key = tuple[int, int, str]
"""(bytes per element, head_dim rounded up to a power of two, one of :data:`CLASSES`)."""

# What else is done to a score takes registers away from the block, so calls with different features have tiles of their
# own: "plain" calls have nothing but causal and a padding mask, "window" calls what is computed from positions and
# scores alone, "bias" calls anything that adds up to at most 4, "all" calls more.
CLASSES = ("plain", "window", "bias", "all")
_WEIGHTS = {"mask": 2, "bias": 2, "relative_bias": 2, "dropout": 1, "softcap": 1, "window": 1, "varlen": 1, "alibi": 1}
_WINDOW = frozenset({"softcap", "window", "varlen", "alibi"})

# sm_ family -> its table. That of the sm_80 family stays within the 99 KiB of shared memory of an sm_86 or sm_89.
TILES: dict[int, dict[Key, Tiles]] = {
    family: {key: Tiles(*(Tile(*tile) for tile in line)) for key, line in table.LINES.items()}
    for family, table in ((80, attention_tiles_sm80), (90, attention_tiles_sm90))
}


def block_dim(head_dim: int) -> int:
    """``head_dim`` as the kernels hold it: a power of two that a matrix instruction can take."""
    return max(16, triton.next_power_of_2(head_dim))


def family(sm: int) -> int:
    """Which table a GPU of compute capability ``sm`` uses: 90 from Hopper's data-centre line on, else 80."""
    return 90 if sm // 10 in (9, 10) else 80


def class_of(features: Iterable[str]) -> str:
    """Which of :data:`CLASSES` a call with ``features``, named as in attention_options.py, belongs to."""
    used = _WEIGHTS.keys() & features
    if used <= _WINDOW:
        return "window" if used else "plain"
    return "bias" if sum(_WEIGHTS[name] for name in used) <= 4 else "all"


def tiles_for(sm_family: int, itemsize: int, dim: int, features: Iterable[str]) -> Tiles:
    """The tiles of a call with ``features``. ``dim``: of :func:`block_dim`."""
    return TILES[sm_family][itemsize, dim, class_of(features)]


@functools.cache
def tiles_on(device: torch.device, itemsize: int, head_dim: int, head_dim_v: int, features: tuple[str, ...]) -> Tiles:
    """The tiles of a call on ``device``."""
    dim = max(block_dim(head_dim), block_dim(head_dim_v))
    return tiles_for(family(capability(device)), itemsize, dim, features)
