"""Attention of a few new queries against a key/value cache, contiguous or in pages:

    s_j = cap(scale q . k_j) - slope |distance|,   out = sum_j softmax(s)_j v_j

The work is reading the cache once. The query heads that share a key/value head and the new positions are the rows of
one matrix instruction's tile, so a key that was read serves them all; and a sequence's keys are cut into as many parts
as keep every multiprocessor busy, whose results a second kernel merges in a fixed order. How many parts is decided
from the cache's capacity, and where they lie from the lengths on the device: the host never waits. The kernels are in
decode_attention_kernels.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..attention_options import DecodeOptions, empty_out
from . import decode_attention_kernels
from .launch import DTYPES as DTYPES
from .launch import TYPES, Configuration, launch, program_limit

FEATURES: frozenset[str] = frozenset()


class Tile(NamedTuple):
    """How one program works through its part of a sequence."""

    max_rows: int
    """Rows at once, at most: query heads that share a key/value head times new positions."""
    block_k: int
    """Keys at once."""
    num_warps: int
    num_stages: int
    """Blocks of keys and values that are in flight at once."""


# (bytes per element, head_dim rounded up to a power of two) -> tile, for sm_80 and newer: some 32 KiB of keys and
# values in flight per program, which four or so programs a multiprocessor make enough to hide the memory's latency.
TILES: dict[tuple[int, int], Tile] = {
    (2, 16): Tile(64, 32, 4, 2),
    (2, 32): Tile(64, 64, 4, 3),
    (2, 64): Tile(64, 64, 4, 3),
    (2, 128): Tile(64, 64, 8, 2),
    (2, 256): Tile(16, 32, 4, 2),
    (4, 16): Tile(32, 32, 4, 2),
    (4, 32): Tile(32, 32, 4, 2),
    (4, 64): Tile(16, 32, 4, 2),
    (4, 128): Tile(16, 32, 8, 2),
    (4, 256): Tile(16, 16, 16, 2),
}
MAX_SPLITS = 64  # the second kernel holds one row's parts at once
KEYS_PER_SPLIT = 256  # at least: shorter parts cost more in the second kernel than they gain


def block_dim(size: int) -> int:
    """``size`` as the kernels hold it: a power of two that a matrix instruction can take."""
    return max(16, triton.next_power_of_2(size))


@functools.cache
def splits_for(programs: int, capacity: int, device: torch.device) -> int:
    """Into how many parts each sequence is cut: some four programs for each multiprocessor, a power of two."""
    wanted = 2 * program_limit(device) // max(programs, 1)
    most = min(MAX_SPLITS, max(1, capacity // KEYS_PER_SPLIT))
    splits = 1
    while splits < wanted and 2 * splits <= most:
        splits *= 2
    return splits


def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, options: DecodeOptions
) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Sq, D) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq) float32; see backends/reference/decode_attention.py."""
    scale, causal, window_left, window_right, softcap, alibi_slopes, page_table, cache_batch_idx, cache_leftpad = (
        options
    )
    batch, heads, queries, head_dim = q.shape
    cache_rows, heads_kv, capacity, head_dim_v = v_cache.shape
    page_size = 1
    if page_table is not None:
        page_size, capacity = capacity, capacity * page_table.shape[1]
    out = empty_out(q, v_cache)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    rows = heads // heads_kv * queries
    if batch * rows == 0:
        return out, lse
    # An offset of the kernels has 32 bits; a window wider than every distance is no window.
    window_left, window_right = min(window_left, capacity + queries), min(window_right, capacity + queries)
    tile = TILES[q.element_size(), max(block_dim(head_dim), block_dim(head_dim_v))]
    height = min(tile.max_rows, block_dim(rows))
    programs = batch * heads_kv * triton.cdiv(rows, height)
    splits = splits_for(programs, capacity, q.device)
    parts, part_lse = out[None], lse
    if splits > 1:
        parts = torch.empty((splits, batch, heads, queries, head_dim_v), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((splits, batch, heads, queries), dtype=torch.float32, device=q.device)
    launch(
        decode_attention_kernels.decode, (programs * splits,), q.device,
        q, k_cache, v_cache, parts, part_lse, cache_seqlens, cache_leftpad, cache_batch_idx, page_table, alibi_slopes,
        heads_kv, heads // heads_kv, queries, cache_rows, capacity, page_size, splits, scale, softcap, window_left,
        window_right, *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], *parts.stride()[:4],
        0 if page_table is None else page_table.stride(0),
        0 if alibi_slopes is None or len(alibi_slopes) == 1 else alibi_slopes.stride(0),
        HEAD_DIM=head_dim, HEAD_DIM_V=head_dim_v, BLOCK_D=block_dim(head_dim), BLOCK_DV=block_dim(head_dim_v),
        BLOCK_M=height, BLOCK_K=tile.block_k, CAUSAL=causal, LEFT=window_left >= 0, RIGHT=window_right >= 0,
        SOFTCAP=softcap > 0, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        launch(
            decode_attention_kernels.merge, (batch * heads * queries,), q.device,
            parts, part_lse, out, lse, heads, queries, splits, *out.stride()[:3],
            HEAD_DIM_V=head_dim_v, BLOCK_DV=block_dim(head_dim_v), BLOCK_SPLITS=splits, num_warps=4,
        )  # fmt: skip
    return out, lse


# Head sizes that are built off-line: each line of TILES, and a size between two powers of two.
HEAD_DIMS = (16, 32, 64, 80, 128, 256)
# Optional parts of a call, each built once: (label, which pointers are there, causal, window, softcap).
VARIANTS = (
    ("", (), True, False, False),
    ("+pages", ("pages_ptr",), True, False, False),
    ("+everything", ("pages_ptr", "leftpad_ptr", "slopes_ptr"), True, True, True),
    ("+rows", ("rows_ptr", "leftpad_ptr"), False, False, False),
)


def configurations() -> Iterator[Configuration]:
    """Every line of TILES in each dtype, for the fewest and the most rows, and the merge of 2 and of the most parts."""
    types = {"seqlens_ptr": "*i32", "lse_ptr": "*fp32", "scale": "fp32", "softcap": "fp32"}
    optional = {"leftpad_ptr": "*i32", "rows_ptr": "*i32", "pages_ptr": "*i32", "slopes_ptr": "*fp32"}
    small = {"heads_kv", "groups", "seqlen_q", "cache_rows", "capacity", "splits", "window_left", "window_right"}
    for dtype, kind in sorted(TYPES.items(), key=str):
        for head_dim in HEAD_DIMS:
            block = block_dim(head_dim)
            tile = TILES[dtype.itemsize, block]
            for height in sorted({16, tile.max_rows}):
                for label, present, causal, window, softcap in VARIANTS:
                    constants = {
                        "HEAD_DIM": head_dim,
                        "HEAD_DIM_V": head_dim,
                        "BLOCK_D": block,
                        "BLOCK_DV": block,
                        "BLOCK_M": height,
                        "BLOCK_K": tile.block_k,
                        "CAUSAL": causal,
                        "LEFT": window,
                        "RIGHT": window,
                        "SOFTCAP": softcap,
                    }
                    yield Configuration(
                        decode_attention_kernels.decode,
                        f"decode_attention {kind} D={head_dim} rows={height}{label}",
                        dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{kind}")
                        | types
                        | {name: t if name in present else None for name, t in optional.items()},
                        constants,
                        tile.num_warps,
                        tile.num_stages,
                        tensor_cores=kind != "fp32",
                        unaligned=frozenset(small),
                    )
            for splits in (2, MAX_SPLITS):
                yield Configuration(
                    decode_attention_kernels.merge,
                    f"decode_attention merge {kind} D={head_dim} of {splits}",
                    {"part_ptr": "*fp32", "part_lse_ptr": "*fp32", "out_ptr": f"*{kind}", "lse_ptr": "*fp32"},
                    {"HEAD_DIM_V": head_dim, "BLOCK_DV": block, "BLOCK_SPLITS": splits},
                    4,
                    unaligned=frozenset({"heads", "seqlen_q", "splits"}),
                )
