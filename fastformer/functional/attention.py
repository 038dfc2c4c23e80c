"""Exact attention without the score matrix: softmax(scale q k^T + bias + mask) v (Vaswani et al. 2017, equation 1).

Blocks of keys stream past a block of queries while a running maximum and sum rescale the partial result (Dao et al.
2022, arXiv:2205.14135, algorithm 1), so memory is linear in the sequence. Forward saves one log-sum-exp per query;
backward recomputes the probabilities from it. Biases that depend on the distance alone (T5's, ALiBi's) are computed
where they are added, so that they cost no memory either.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._attention import Options, acc_dtype, run, run_packed, run_plain, run_with_lse
from ._doors import needs_grad, through_operator

MAX_HEAD_DIM = 256


class RelativeBias(NamedTuple):
    """T5's relative position bias (Raffel et al. 2020, section 2.1): a number per head and range of distances."""

    table: Tensor
    """``(num_buckets, Hq)``, as ``relative_attention_bias.weight`` of a T5 checkpoint; gets a gradient."""
    bidirectional: bool = True
    """Keys after the query have buckets of their own (an encoder's); otherwise they share bucket 0."""
    num_buckets: int = 32
    max_distance: int = 128
    """From this distance on all keys share the last bucket."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    relative_bias: RelativeBias | tuple[Tensor, bool, int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention: scale, then softcap, then biases, then masks, then softmax, then dropout.

    Positions are aligned at the bottom right: query i sits at i + Sk - Sq, for ``causal``, ``window``,
    ``alibi_slopes`` and ``relative_bias`` alike.

    Args:
        q: ``(B, Hq, Sq, D)``, D from 1 to 256; float32, bfloat16, float16 or (CPU) float64.
        k: ``(B, Hkv, Sk, D)``, Hq a multiple of Hkv: query head h reads key/value head h // (Hq / Hkv).
        v: ``(B, Hkv, Sk, Dv)``.
        causal: query i sees keys j <= i + Sk - Sq.
        scale: multiplies the scores; default 1 / sqrt(D).
        bias: ``(B|1, Hq|1, Sq|1, Sk)``, added to the scores; q's dtype or float32. Gets a gradient, summed over the
            dimensions it is broadcast along.
        relative_bias: T5's bucketed bias, computed inside the kernel from its table; see :class:`RelativeBias`.
        alibi_slopes: ``(Hq)`` or ``(B, Hq)``: -slope * |distance| is added (Press et al. 2022, arXiv:2108.12409).
        key_padding_mask: ``(B, Sk)`` bool, True = ignored, as in ``torch.nn.MultiheadAttention``.
        attn_mask: ``(B|1, Hq|1, Sq|1, Sk)`` bool, True = may look, as in ``scaled_dot_product_attention``.
        window: (left, right): query at position p sees keys p - left ... p + right; -1 = unbounded.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2, arXiv:2408.00118, section 2); 0 = no cap.
        dropout_p: probability of dropping a weight, from torch's seed; the backward pass repeats the mask.
        return_lse: also return the log-sum-exp of the scores, ``(B, Hq, Sq)`` in float32 (float64 for float64).

    Returns:
        ``(B, Hq, Sq, Dv)`` in q's dtype. A query that sees no key gives zeros (and lse = -inf). The memory layout is
        (B, Sq, Hq, Dv), so merging the heads afterwards costs nothing.

    Raises:
        TypeError, ValueError: arguments that do not fit together, naming the argument.
    """
    if (
        bias is None
        and relative_bias is None
        and alibi_slopes is None
        and key_padding_mask is None
        and attn_mask is None
        and window == (-1, -1)
        and not (softcap or dropout_p or return_lse)
        and (plain := run_plain(q, k, v, causal, scale)) is not None
    ):
        return plain
    _check(q, k, v)
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    _check_padding(key_padding_mask, batch, keys, "q", q)
    _checks.probability("dropout_p", dropout_p)
    check_softcap(softcap)
    left, right = check_window(window)
    if bias is not None:
        _check_broadcast("bias", bias, (batch, heads, queries, keys), q)
        _checks.parameter("bias", bias, bias.shape, "q", q)
    if attn_mask is not None:
        _check_broadcast("attn_mask", attn_mask, (batch, heads, queries, keys), q)
        if attn_mask.dtype != torch.bool:
            raise TypeError(f"attn_mask: dtype {attn_mask.dtype} is not bool; numbers to be added are a bias")
    options = Options(
        default_scale(scale, q),
        causal,
        key_padding_mask,
        attn_mask,
        bias,
        None if relative_bias is None else distance_bias(RelativeBias(*relative_bias), heads, max(queries, keys), q),
        None if alibi_slopes is None else check_slopes(alibi_slopes, batch, heads, q),
        window_left=left,
        window_right=right,
        softcap=softcap,
        dropout_p=dropout_p,
    )
    return run_with_lse(q, k, v, options) if return_lse else run(q, k, v, options)


def attention_qkvpacked(
    qkv: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    relative_bias: RelativeBias | tuple[Tensor, bool, int, int] | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """:func:`attention` on the output of one fused projection, with one fused gradient.

    Args:
        qkv: ``(B, S, 3, H, D)``.
        causal, scale, relative_bias, key_padding_mask, dropout_p: as in :func:`attention`.

    Returns:
        ``(B, S, H, D)``, contiguous.
    """
    _checks.tensor("qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv: shape {tuple(qkv.shape)} is not (B, S, 3, H, D)")
    batch, length, _, heads, head_dim = qkv.shape
    if heads == 0:
        raise ValueError("qkv: has no heads")
    _check_head_dim("qkv", head_dim)
    _check_padding(key_padding_mask, batch, length, "qkv", qkv)
    _checks.probability("dropout_p", dropout_p)
    table = None if relative_bias is None else distance_bias(RelativeBias(*relative_bias), heads, length, qkv)
    options = Options(default_scale(scale, qkv), causal, key_padding_mask, distance_bias=table, dropout_p=dropout_p)
    return run_packed(qkv, options)


# ---- what the other attention functions share ------------------------------------------------------------------------


def default_scale(scale: float | None, q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


def check_window(window: tuple[int, int]) -> tuple[int, int]:
    try:
        left, right = (int(w) for w in window)
    except (TypeError, ValueError):
        raise ValueError(f"window: {window!r} is not (left, right)") from None
    if left < -1 or right < -1:
        raise ValueError(f"window: ({left}, {right}) is below -1, which means unbounded")
    return left, right


def check_softcap(softcap: float) -> None:
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: {softcap} is not a finite number from 0 on")


def check_slopes(slopes: Tensor, batch: int, heads: int, q: Tensor) -> Tensor:
    """(1, Hq) or (B, Hq) float32."""
    if not isinstance(slopes, Tensor) or not slopes.is_floating_point():
        raise TypeError(f"alibi_slopes: expected a floating-point tensor, got {getattr(slopes, 'dtype', type(slopes))}")
    if slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(f"alibi_slopes: shape {tuple(slopes.shape)} is neither {(heads,)} nor {(batch, heads)}")
    _checks.same_device("alibi_slopes", slopes, "q", q)
    return slopes.detach().to(torch.float32).view(-1, heads).contiguous()


def distance_bias(relative: RelativeBias, heads: int, longest: int, q: Tensor) -> Tensor:
    """T5's table per distance instead of per bucket, ``(Hq, 2 M + 1)`` in the accumulation dtype, M = max_distance.

    All that grows with the number of positions is computed in the kernels; this is a few hundred numbers.
    """
    table, bidirectional, num_buckets, max_distance = relative
    _checks.tensor("relative_bias", table)
    if table.shape != (num_buckets, heads):
        raise ValueError(
            f"relative_bias: the table's shape {tuple(table.shape)} is not (num_buckets, Hq) = {(num_buckets, heads)}"
        )
    check_buckets("relative_bias: num_buckets", bidirectional, num_buckets, max_distance)
    _checks.same_device("relative_bias", table, "q", q)
    most = max(1, min(max_distance, longest))
    dtype = acc_dtype(q.dtype)
    if not (through_operator(table) or needs_grad(table)):
        # In steps of powers of two: a text that grows token by token would otherwise ask for other buckets at each.
        most = min(max_distance, 1 << (most - 1).bit_length())
        bucket = _buckets(bool(bidirectional), num_buckets, max_distance, most, table.device)
        return table.to(dtype).t().index_select(1, bucket)
    # What is cached must be a real tensor, not one of a tracer's.
    selector = _bucket_selector.__wrapped__ if through_operator() else _bucket_selector
    select = selector(bool(bidirectional), num_buckets, max_distance, most, table.device)
    table = table.to(dtype)
    # A product with zeros and ones, not an index: its gradient is then a sum in a fixed order on every device.
    return (table.t()[:, :, None] * select.to(table.dtype)).sum(1)


def check_buckets(name: str, bidirectional: bool, num_buckets: int, max_distance: int) -> None:
    """Raises a ValueError, which begins with ``name``, for buckets that no distance or every distance falls into."""
    least = 4 if bidirectional else 2
    exact = num_buckets // least
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"{name} {num_buckets} and max_distance {max_distance} do not go together; expected at least {least}"
            f" buckets and a max_distance over {exact}"
        )


def relative_position_bucket(distance: Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """T5's bucket of each distance j - p(i) (Raffel et al. 2020): half the buckets for one distance each, the others
    for ranges that grow logarithmically up to ``max_distance``. Integers, any shape."""
    offset: Tensor | int = 0
    if bidirectional:
        num_buckets //= 2
        offset = (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    # In float32 and in this order: at distances where the logarithm is a whole number the rounding decides the bucket,
    # and checkpoints were trained with this one.
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    large = (exact + (ratio * (num_buckets - exact)).to(torch.long)).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, large)


@functools.lru_cache(maxsize=64)
def _bucket_selector(
    bidirectional: bool, num_buckets: int, max_distance: int, most: int, device: torch.device
) -> Tensor:
    """(num_buckets, 2 most + 1) bool: which bucket each distance from -most to most falls into."""
    bucket = _buckets.__wrapped__(bidirectional, num_buckets, max_distance, most, torch.device("cpu"))
    return (torch.arange(num_buckets, device="cpu")[:, None] == bucket).to(device)


@functools.lru_cache(maxsize=64)
def _buckets(bidirectional: bool, num_buckets: int, max_distance: int, most: int, device: torch.device) -> Tensor:
    """(2 most + 1) int64: the bucket of each distance from -most to most."""
    distance = torch.arange(-most, most + 1, device="cpu")
    return relative_position_bucket(distance, bidirectional, num_buckets, max_distance).to(device)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(name, t)
        if t.dim() != 4:
            raise ValueError(f"{name}: shape {tuple(t.shape)} is not (B, H, S, D)")
        _check_head_dim(name, t.shape[3])
    for name, t in (("k", k), ("v", v)):
        _checks.same_dtype(name, t, "q", q)
        _checks.same_device(name, t, "q", q)
        if t.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: batch {t.shape[0]} is not q's {q.shape[0]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: head_dim {k.shape[3]} is not q's {q.shape[3]}")
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(f"v: heads and length {tuple(v.shape[1:3])} are not k's {tuple(k.shape[1:3])}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: {k.shape[1]} heads do not divide q's {q.shape[1]}")


def _check_head_dim(name: str, head_dim: int) -> None:
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: head_dim {head_dim} is not in [1, {MAX_HEAD_DIM}]")


def _check_padding(mask: Tensor | None, batch: int, keys: int, name: str, like: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask: expected a bool tensor, got {getattr(mask, 'dtype', None)}")
    if mask.shape != (batch, keys):
        raise ValueError(f"key_padding_mask: shape {tuple(mask.shape)} is not (B, Sk) = {(batch, keys)}")
    _checks.same_device("key_padding_mask", mask, name, like)


def _check_broadcast(name: str, t: Tensor, shape: tuple[int, int, int, int], q: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(t).__name__}")
    if t.dim() != 4 or any(n not in (1, full) for n, full in zip(t.shape[:3], shape)) or t.shape[3] != shape[3]:
        raise ValueError(f"{name}: shape {tuple(t.shape)} does not broadcast from (B|1, Hq|1, Sq|1, Sk) to {shape}")
    _checks.same_device(name, t, "q", q)
