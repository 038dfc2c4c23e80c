"""Attention without the score matrix: out = softmax(scale q k^T + mask) v and its gradients.

Blocks of keys stream past a block of queries while a running maximum and sum rescale the partial result (Dao et al.
2022, arXiv:2205.14135; forward is algorithm 1 of arXiv:2307.08691). With p the probabilities, recomputed from the saved
log-sum-exp, and delta = sum(dout * out) - dlse per query:

    dv = p^T dout,   ds = p * (dout v^T - delta),   dq = scale ds k,   dk = scale ds^T q

Two choices make it fast and repeatable. Key blocks that no mask touches run in a loop of their own, without a single
comparison. And backward is two kernels, one that owns queries and sums over keys (dq, and delta on the way), one that
owns keys and sums over queries and over the query heads that share them (dk, dv): no sum crosses programs, so none
needs atomic additions, and the result is the same in every run. The second kernel has one loop only: a second one costs
more registers than the comparison it saves. The kernels are in attention_kernels.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import attention_kernels
from .launch import DTYPES as DTYPES
from .launch import TYPES, Configuration, capability, launch, unit_stride

FEATURES = frozenset({"causal", "key_padding_mask", "grouped_heads"})


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
    """The three kernels' tiles for one head size."""

    forward: Tile
    backward_q: Tile
    backward_k: Tile


# (sm_ family, bytes per element, head_dim rounded up to a power of two) -> tiles. The largest that stay in registers
# (aot.py checks every line) and, in the sm_80 family, within the 99 KiB of shared memory of an sm_86 or sm_89.
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


def block_dim(head_dim: int) -> int:
    """``head_dim`` as the kernels hold it: a power of two that a matrix instruction can take."""
    return max(16, triton.next_power_of_2(head_dim))


@functools.cache
def _tiles(device: torch.device, itemsize: int, head_dim: int, head_dim_v: int) -> Tiles:
    return TILES[family(capability(device)), itemsize, max(block_dim(head_dim), block_dim(head_dim_v))]


def family(sm: int) -> int:
    """Which lines of TILES a GPU of compute capability ``sm`` uses: 90 from Hopper's data-centre line on, else 80."""
    return 90 if sm // 10 in (9, 10) else 80


def _blocks(tile: Tile, q: Tensor, v: Tensor, causal: bool, *strided: Tensor) -> dict[str, int | bool]:
    """Everything a launch is specialised for. ``strided``: the remaining tensors that are read or written in blocks."""
    widest = max(abs(x.stride(2)) for x in (q, v, *strided))
    return {
        "HEAD_DIM": q.shape[3],
        "HEAD_DIM_V": v.shape[3],
        "BLOCK_D": block_dim(q.shape[3]),
        "BLOCK_DV": block_dim(v.shape[3]),
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "CAUSAL": causal,
        "WIDE": widest * max(tile.block_q, tile.block_k) >= 2**31,  # else offsets within a block fit in 32 bits
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _mask(key_padding_mask: Tensor | None) -> tuple[Tensor | None, int]:
    if key_padding_mask is None:
        return None, 0
    mask = unit_stride(key_padding_mask).view(torch.uint8)
    return mask, mask.stride(0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq) float32.

    key_padding_mask (B, Sk) bool, True = ignored. A query that sees no key gives zeros and lse = -inf. ``out`` lies in
    memory as (B, Sq, Hq, Dv), so that merging the heads afterwards is a view.
    """
    batch, heads, seqlen_q, head_dim = q.shape
    heads_kv, seqlen_k, head_dim_v = v.shape[1:]
    out = torch.empty((batch, seqlen_q, heads, head_dim_v), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, heads, seqlen_q), dtype=torch.float32, device=q.device)
    tile = _tiles(q.device, q.element_size(), head_dim, head_dim_v).forward
    mask, mask_stride = _mask(key_padding_mask)
    launch(
        attention_kernels.forward, (batch * heads * triton.cdiv(seqlen_q, tile.block_q),), q.device,
        q, k, v, mask, out, lse, heads, heads // max(heads_kv, 1), seqlen_q, seqlen_k, scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], mask_stride,
        **_blocks(tile, q, v, causal, k, out),
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    key_padding_mask: Tensor | None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, written into dq, dk, dv where given (any strides with a contiguous last dimension)."""
    batch, heads, seqlen_q, head_dim = q.shape
    heads_kv, seqlen_k, head_dim_v = v.shape[1:]
    dq = torch.empty_like(q) if dq is None else dq
    dk = torch.empty_like(k) if dk is None else dk
    dv = torch.empty_like(v) if dv is None else dv
    dout = unit_stride(dout)
    dlse = None if dlse is None else dlse.contiguous()
    tiles = _tiles(q.device, q.element_size(), head_dim, head_dim_v)
    # Both kernels read and write whole blocks of the two statistics, without comparing.
    block = max(tiles.backward_q.block_q, tiles.backward_k.block_q)
    padded = triton.cdiv(seqlen_q, block) * block
    lse_log2, delta = torch.empty((2, batch, heads, padded), dtype=torch.float32, device=q.device)
    mask, mask_stride = _mask(key_padding_mask)
    groups = heads // max(heads_kv, 1)
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    launch(
        attention_kernels.backward_q, (batch * heads * (padded // tiles.backward_q.block_q),), q.device,
        q, k, v, mask, out, dout, lse, dlse, lse_log2, delta, dq, heads, groups, seqlen_q, seqlen_k, padded, scale,
        *inputs, *out.stride()[:3], *dout.stride()[:3], *dq.stride()[:3], mask_stride,
        **_blocks(tiles.backward_q, q, v, causal, k, out, dout, dq),
    )  # fmt: skip
    launch(
        attention_kernels.backward_k, (batch * heads_kv * triton.cdiv(seqlen_k, tiles.backward_k.block_k),), q.device,
        q, k, v, mask, dout, lse_log2, delta, dk, dv, heads_kv, groups, seqlen_q, seqlen_k, padded, scale,
        *inputs, *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], mask_stride,
        **_blocks(tiles.backward_k, q, v, causal, k, dout, dk, dv),
    )  # fmt: skip
    return dq, dk, dv


# Head sizes that are built off-line: each line of TILES, and sizes between two powers of two.
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)


def configuration(
    direction: str, sm_family: int, kind: str, head_dim: int, causal: bool, padding: bool, tile: Tile
) -> Configuration:
    """One build of the kernel ``direction`` ("forward", "backward_q" or "backward_k") with ``tile``."""
    kernel = getattr(attention_kernels, direction)
    data = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "dout_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    types: dict[str, str | None] = {name: f"*{kind}" for name in kernel.arg_names if name in data}
    types |= {
        name: "*fp32" for name in ("lse_ptr", "lse_log2_ptr", "delta_ptr", "dlse_ptr") if name in kernel.arg_names
    }
    constants = {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim,
        "BLOCK_D": block_dim(head_dim),
        "BLOCK_DV": block_dim(head_dim),
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "CAUSAL": causal,
        "WIDE": False,
    }
    features = ("causal" if causal else "full") + ("+padding" if padding else "")
    return Configuration(
        kernel,
        f"attention {direction} {kind} D={head_dim} {features}",
        types | {"mask_ptr": "*u8" if padding else None, "scale": "fp32"},
        constants,
        tile.num_warps,
        tile.num_stages,
        capabilities=(sm_family,),
        tensor_cores=kind != "fp32",  # float32 is multiplied exactly, which no matrix instruction does
        unaligned=frozenset({"heads", "heads_kv", "groups", "seqlen_q", "seqlen_k"}),
    )


def configurations() -> Iterator[Configuration]:
    """Every line of TILES in each dtype, causal and not; with a padding mask where it adds most, under causal."""
    for dtype, kind in sorted(TYPES.items(), key=str):
        for head_dim in HEAD_DIMS:
            for sm_family in (80, 90):
                tiles = TILES[sm_family, dtype.itemsize, block_dim(head_dim)]
                for direction, tile in zip(Tiles._fields, tiles):
                    for causal, padding in ((False, False), (True, False), (True, True)):
                        yield configuration(direction, sm_family, kind, head_dim, causal, padding, tile)
