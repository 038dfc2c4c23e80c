"""Attention without the score matrix: out = dropout(softmax(cap(scale q k^T) + bias + mask)) v and its gradients.

Blocks of keys stream past a block of queries while a running maximum and sum rescale the partial result (Dao et al.
2022, arXiv:2205.14135; forward is algorithm 1 of arXiv:2307.08691). With p the probabilities, recomputed from the saved
log-sum-exp, keep the dropout scales, recomputed from the seed, and delta = sum(dout * out) - dlse per query:

    dz = p * (keep * (dout v^T) - delta),   dbias = dz summed over what the bias is broadcast along,
    ds = dz * cap',   dq = scale ds k,   dk = scale ds^T q,   dv = (keep * p)^T dout

Two choices make it fast and repeatable. Key blocks that neither diagonal nor window touches run in a loop of their own,
without a single comparison, and those beyond are never visited. And backward is two kernels, one that owns queries and
sums over keys (dq, and delta on the way), one that owns keys and sums over queries and over the query heads that share
them (dk, dv): no sum crosses programs, so none needs atomic additions, and the result is the same in every run. The
second kernel has one loop only: a second one costs more registers than the comparison it saves. A third kernel, where a
bias needs a gradient, owns elements of the bias, or diagonals of the score matrix.

The kernels are in attention_kernels.py (forward), attention_backward_kernels.py and attention_bias_kernels.py; what is
added to and hidden from the scores is in attention_scores.py, block sizes are in attention_tiles.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..attention_options import FEATURES as ALL_FEATURES
from ..attention_options import Gradients, Options, empty_out, sequences
from . import attention_backward_kernels, attention_bias_kernels, attention_kernels
from .attention_builds import configurations as configurations
from .attention_tiles import Tile, Tiles, block_dim, tiles_on
from .dropout import dropout
from .launch import DTYPES as DTYPES
from .launch import launch, program_limit, unit_stride

FEATURES = frozenset(ALL_FEATURES)


class _Call(NamedTuple):
    """What every launch of one call has in common."""

    batch: int
    """Sequences."""
    heads: int
    groups: int
    """Query heads that share one of k and v."""
    seqlen_q: int
    seqlen_k: int
    """The longest sequence's."""
    packed: tuple[Tensor | int | None, ...]
    """The kernels' arguments cu_seqlens_q_ptr ... total_q."""
    scores: tuple[Tensor | float | None, ...]
    """The kernels' arguments padding_ptr ... keep_scale."""
    flags: dict[str, bool]


def _call(q: Tensor, k: Tensor, options: Options) -> _Call:
    batch, seqlen_q, seqlen_k = sequences(options, q, k)
    heads = q.shape[1]
    packed = options.cu_seqlens_q is not None
    padding = mask = None
    if options.key_padding_mask is not None:
        padding = unit_stride(options.key_padding_mask).view(torch.uint8)
    if options.mask is not None:
        mask = options.mask.view(torch.uint8)
    bias, distance_bias, slopes = options.bias, options.distance_bias, options.alibi_slopes
    # A window that is wider than the scores hides nothing, and might not fit into 32 bits.
    left, right = (w if 0 <= w < seqlen_q + seqlen_k else None for w in (options.window_left, options.window_right))
    drop = dropout(options.dropout_p, options.seed) if options.dropout_p > 0 else (0, 0, 1.0)
    scores = (
        padding, None if padding is None else padding.stride(0),
        mask, *_strides(mask),
        bias, *_strides(bias),
        distance_bias, None if distance_bias is None else distance_bias.shape[1] // 2,
        slopes, None if slopes is None else slopes.stride(0) if len(slopes) > 1 else 0,
        left, 0 if options.causal else right, options.softcap or None,
        *drop,
    )  # fmt: skip
    flags = {"TOP_LEFT": options.top_left, "DROPOUT": options.dropout_p > 0}
    cu_seqlens = (options.cu_seqlens_q, options.cu_seqlens_k, q.shape[2] if packed else None)
    return _Call(batch, heads, heads // max(k.shape[1], 1), seqlen_q, seqlen_k, cu_seqlens, scores, flags)


def _tiles(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tiles:
    return tiles_on(q.device, q.element_size(), q.shape[3], v.shape[3], options.features(q, k, v))


def _layout(call: _Call, *tensors: Tensor) -> tuple[int, ...]:
    """(batch, head, position) strides of each; packed sequences are no distance apart but that of their positions."""
    packed = call.packed[2] is not None
    return tuple(stride for t in tensors for stride in ((0 if packed else t.stride(0)), t.stride(1), t.stride(2)))


def _strides(t: Tensor | None) -> tuple[int | None, ...]:
    """(batch, head, query) of a mask or bias; None where all queries have the same."""
    if t is None:
        return None, None, None
    batch, head, query = (stride if n > 1 else 0 for n, stride in zip(t.shape[:3], t.stride()))
    return batch, head, query or None


def _blocks(q: Tensor, v: Tensor, call: _Call, tile: Tile, *strided: Tensor) -> dict[str, int | bool]:
    """Everything a launch is specialised for. ``strided``: the remaining tensors that are read or written in blocks."""
    widest = max(abs(x.stride(2)) for x in (q, v, *strided))
    return {
        "HEAD_DIM": q.shape[3],
        "HEAD_DIM_V": v.shape[3],
        "BLOCK_D": block_dim(q.shape[3]),
        "BLOCK_DV": block_dim(v.shape[3]),
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        **call.flags,
        "WIDE": widest * max(tile.block_q, tile.block_k) >= 2**31,  # else offsets within a block fit in 32 bits
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq) float32.

    A query that sees no key gives zeros and lse = -inf. ``out`` lies in memory as (B, Sq, Hq, Dv), so that merging the
    heads afterwards is a view.
    """
    call = _call(q, k, options)
    out = empty_out(q, v)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tile = _tiles(q, k, v, options).forward
    launch(
        attention_kernels.forward, (call.batch * call.heads * triton.cdiv(call.seqlen_q, tile.block_q),), q.device,
        q, k, v, out, lse, call.heads, call.groups, call.seqlen_q, call.seqlen_k, options.scale,
        *_layout(call, q, k, v, out), *call.packed, *call.scores,
        **_blocks(q, v, call, tile, k, out),
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
    options: Options,
    needs: tuple[bool, bool] = (False, False),
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> Gradients:
    """Gradients of q, k and v, written into dq, dk, dv where given (any strides with a contiguous last dimension), and
    of the bias and the distance bias if needed."""
    call = _call(q, k, options)
    dq = torch.empty_like(q) if dq is None else dq
    dk = torch.empty_like(k) if dk is None else dk
    dv = torch.empty_like(v) if dv is None else dv
    dout = unit_stride(dout)
    dlse = None if dlse is None else dlse.contiguous()
    tiles = _tiles(q, k, v, options)
    # Both kernels read and write whole blocks of the two statistics, without comparing, unless sequences are packed.
    block = max(tiles.backward_q.block_q, tiles.backward_k.block_q)
    padded = triton.cdiv(call.seqlen_q, block) * block
    rows = (q.shape[0], call.heads, padded) if call.packed[2] is None else lse.shape
    lse_log2, delta = torch.empty((2, *rows), dtype=torch.float32, device=q.device)
    launch(
        attention_backward_kernels.backward_q,
        (call.batch * call.heads * (padded // tiles.backward_q.block_q),), q.device,
        q, k, v, out, dout, lse, dlse, lse_log2, delta, dq,
        call.heads, call.groups, call.seqlen_q, call.seqlen_k, padded, options.scale,
        *_layout(call, q, k, v, out, dout, dq), *call.packed, *call.scores,
        **_blocks(q, v, call, tiles.backward_q, k, out, dout, dq),
    )  # fmt: skip
    launch(
        attention_backward_kernels.backward_k,
        (call.batch * k.shape[1] * triton.cdiv(call.seqlen_k, tiles.backward_k.block_k),), q.device,
        q, k, v, dout, lse_log2, delta, dk, dv,
        k.shape[1], call.groups, call.seqlen_q, call.seqlen_k, padded, options.scale,
        *_layout(call, q, k, v, dout, dk, dv), *call.packed, *call.scores,
        **_blocks(q, v, call, tiles.backward_k, k, dout, dk, dv),
    )  # fmt: skip
    shared = call, (q, k, v, dout, lse_log2, delta), padded, tiles, options
    return Gradients(
        dq, dk, dv,
        _bias_gradient(*shared) if needs[0] else None,
        _distance_bias_gradient(*shared) if needs[1] else None,
    )  # fmt: skip


def _bias_gradient(call: _Call, tensors: tuple[Tensor, ...], padded: int, tiles: Tiles, options: Options) -> Tensor:
    """dbias. Where few blocks share long sums, these are split among programs, ``splits`` times the bias in float32."""
    tile = tiles.backward_bias
    assert options.bias is not None and tile is not None
    q, k, v, dout = tensors[:4]
    shape = options.bias.shape
    rows = shape[2] != 1
    blocks = triton.cdiv(call.seqlen_k, tile.block_k) * (triton.cdiv(call.seqlen_q, tile.block_q) if rows else 1)
    blocks *= shape[0] * shape[1]
    loops_heads = call.heads // shape[1]
    loops = call.batch // max(shape[0], 1) * loops_heads
    splits = _splits(q.device, blocks, loops)
    dtype = options.bias.dtype if splits == 1 else torch.float32
    dbias = torch.empty((splits, *shape), dtype=dtype, device=q.device)
    launch(
        attention_bias_kernels.backward_bias, (splits * blocks,), q.device,
        *tensors, dbias, call.heads, call.groups, call.seqlen_q, call.seqlen_k, padded, options.scale,
        shape[0], shape[1], loops, loops_heads, triton.cdiv(loops, splits),
        *_layout(call, q, k, v, dout), *call.scores,
        **_blocks(q, v, call, tile, k, dout), ROWS=rows,
    )  # fmt: skip
    return dbias[0] if splits == 1 else dbias.sum(0)


def _distance_bias_gradient(
    call: _Call, tensors: tuple[Tensor, ...], padded: int, tiles: Tiles, options: Options
) -> Tensor:
    """ddistance_bias. A number for each head and distance, and for each of a few groups of sequences, lies between the
    kernel and the table."""
    tile = tiles.backward_distance_bias
    assert options.distance_bias is not None and tile is not None
    q, k, v, dout = tensors[:4]
    most = options.distance_bias.shape[1] // 2
    block = tile.block_k
    # Distances there are: in rows that are aligned at the end, and in those that are aligned at the beginning.
    lowest, highest = (call.seqlen_q, call.seqlen_k) if options.top_left else (call.seqlen_k, call.seqlen_q)
    lowest, highest = -max(lowest - 1, 0), max(highest - 1, 0)
    if options.causal:
        highest = 0
    elif options.window_right >= 0:
        highest = min(highest, options.window_right)
    if options.window_left >= 0:
        lowest = max(lowest, -options.window_left)
    first = -((block - 1 - lowest) // block)
    diagonals = (highest + block - 1) // block - first + 1
    splits = _splits(q.device, call.heads * diagonals, call.batch)
    lines = torch.zeros((2, splits, call.heads, (diagonals + 1) * block), dtype=torch.float32, device=q.device)
    blocks = _blocks(q, v, call, tile, k, dout)
    del blocks["BLOCK_Q"], blocks["BLOCK_K"]
    launch(
        attention_bias_kernels.backward_distance_bias, (splits * call.heads * diagonals,), q.device,
        *tensors, lines, call.batch, call.heads, call.groups, call.seqlen_q, call.seqlen_k, padded, options.scale,
        first, diagonals, triton.cdiv(call.batch, splits), lines.stride(0),
        *_layout(call, q, k, v, dout), *call.packed, *call.scores,
        BLOCK=block, **blocks,
    )  # fmt: skip
    line = lines.sum((0, 1))
    begin = (first - 1) * block  # the distance of the first element
    before, beyond = begin + most, most + 1 - begin - line.shape[1]  # places of the table that the line does not reach
    line = torch.nn.functional.pad(line, (max(before, 0), max(beyond, 0)))
    below, above = line[:, : max(-before, 0)], line[:, max(-before, 0) + 2 * most + 1 :]
    gradient = line[:, below.shape[1] : below.shape[1] + 2 * most + 1].contiguous()
    gradient[:, 0] += below.sum(1)  # the ends of the table stand for everything beyond, too
    gradient[:, -1] += above.sum(1)
    return gradient


def _splits(device: torch.device, blocks: int, loops: int) -> int:
    """Among how many programs to split each of ``blocks`` sums of ``loops`` summands, to fill the device."""
    return max(1, min(loops, program_limit(device) // max(blocks, 1)))
