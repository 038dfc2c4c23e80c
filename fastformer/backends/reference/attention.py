"""Scaled dot-product attention (Vaswani et al. 2017, equation 1) in plain PyTorch, with the whole score matrix.

csrc/include/fastformer.h has the formula with everything that can be added to it, backends/attention_options.py the
signatures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention_options import FEATURES as ALL_FEATURES
from ..attention_options import Gradients, Options, acc_dtype, empty_out
from .philox import dropout_scales

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
FEATURES = frozenset(ALL_FEATURES)


class _Probabilities(NamedTuple):
    scores: Tensor
    """(B, Hq, Sq, Sk) with everything added, -inf where hidden."""
    p: Tensor
    """(B, Hq, Sq, Sk) softmax, before dropout."""
    lse: Tensor
    tanh: Tensor | None
    """tanh(score / softcap) where there is a cap."""
    keep: Tensor | float
    """(B, Hq, Sq, Sk) dropout scales, or 1."""
    distance: Tensor
    """(Sq, Sk) j - p(i)."""


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq) acc."""
    out, lse = empty_out(q, v), torch.empty(q.shape[:3], dtype=acc_dtype(q.dtype), device=q.device)
    for part in _parts(q, k, options):
        probabilities = _probabilities(q[:, :, part.q], k[:, :, part.k], part)
        out[:, :, part.q] = ((probabilities.p * probabilities.keep) @ _repeat(v[:, :, part.k], q.shape[1])).to(q.dtype)
        lse[:, :, part.q] = probabilities.lse
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
    """Gradients of q, k and v, written into dq, dk, dv where given, and of the bias and the distance bias if needed."""
    dq = torch.empty_like(q) if dq is None else dq
    dk = torch.empty_like(k) if dk is None else dk
    dv = torch.empty_like(v) if dv is None else dv
    acc, heads, heads_kv = acc_dtype(q.dtype), q.shape[1], k.shape[1]
    dbias = ddistance = None
    if needs[1]:
        assert options.distance_bias is not None
        # float64: a number of it sums up to Sq terms that may cancel, one after the other
        ddistance = torch.zeros_like(options.distance_bias, dtype=torch.float64)
    fold = lambda t: t.unflatten(1, (heads_kv, heads // heads_kv)).sum(2)  # noqa: E731
    for part in _parts(q, k, options):
        one = [t[:, :, part.q] for t in (q, out, dout, lse)] + [t[:, :, part.k] for t in (k, v)]
        qs, outs, do, ls, ks, vs = one[0].to(acc), one[1].to(acc), one[2].to(acc), one[3], one[4], one[5]
        probabilities = _probabilities(one[0], ks, part)
        p = torch.exp(probabilities.scores - torch.where(torch.isneginf(ls), 0.0, ls)[..., None])
        delta = (do * outs).sum(3, keepdim=True)
        if dlse is not None:
            delta = delta - dlse[:, :, part.q].to(acc)[..., None]
        dz = p * (do @ _repeat(vs, heads).transpose(2, 3) * probabilities.keep - delta)
        if needs[0]:
            assert options.bias is not None
            dbias = dz.sum_to_size(options.bias.shape)
        if ddistance is not None:
            index = _clamped(probabilities.distance, ddistance.shape[1] // 2).flatten()
            ddistance.index_add_(1, index, dz.sum(0, dtype=torch.float64).flatten(1))
        if probabilities.tanh is not None:
            dz = dz * (1 - probabilities.tanh**2)
        ds = dz * options.scale
        dq[:, :, part.q] = (ds @ _repeat(ks, heads)).to(dq.dtype)
        dk[:, :, part.k] = fold(ds.transpose(2, 3) @ qs).to(dk.dtype)
        dv[:, :, part.k] = fold((p * probabilities.keep).transpose(2, 3) @ do).to(dv.dtype)
    if ddistance is not None and options.distance_bias is not None:
        ddistance = ddistance.to(options.distance_bias.dtype)
    return Gradients(dq, dk, dv, dbias, ddistance)


class _Part(NamedTuple):
    """One call's worth of dense attention: all of it, or one of the packed sequences."""

    q: slice
    k: slice
    rows: Tensor
    """(B * Hq * Sq) numbers of the rows for dropout."""
    options: Options


def _parts(q: Tensor, k: Tensor, options: Options) -> Iterator[_Part]:
    batch, heads, total, _ = q.shape
    rows = torch.arange(batch * heads * total, device=q.device).view(batch, heads, total)
    if options.cu_seqlens_q is None:
        yield _Part(slice(None), slice(None), rows.flatten(), options)
        return
    assert options.cu_seqlens_k is not None
    ends = zip(*(torch.stack((c[:-1], c[1:]), 1).tolist() for c in (options.cu_seqlens_q, options.cu_seqlens_k)))
    for n, ((q_begin, q_end), (k_begin, k_end)) in enumerate(ends):
        slopes = options.alibi_slopes
        if slopes is not None and len(slopes) > 1:
            slopes = slopes[n : n + 1]
        one = options._replace(alibi_slopes=slopes)
        yield _Part(slice(q_begin, q_end), slice(k_begin, k_end), rows[:, :, q_begin:q_end].flatten(), one)


def _probabilities(q: Tensor, k: Tensor, part: _Part) -> _Probabilities:
    options = part.options
    acc = acc_dtype(q.dtype)
    batch, heads, sq, _ = q.shape
    sk = k.shape[2]
    position = torch.arange(sq, device=q.device) + (0 if options.top_left else sk - sq)
    distance = torch.arange(sk, device=q.device) - position[:, None]
    scores = q.to(acc) @ _repeat(k, heads).transpose(2, 3) * options.scale
    tanh = None
    if options.softcap:
        tanh = torch.tanh(scores / options.softcap)
        scores = options.softcap * tanh
    if options.bias is not None:
        scores = scores + options.bias.to(acc)
    if options.distance_bias is not None:
        scores = scores + options.distance_bias[:, _clamped(distance, options.distance_bias.shape[1] // 2)]
    if options.alibi_slopes is not None:
        scores = scores - options.alibi_slopes.to(acc)[:, :, None, None] * distance.abs()
    scores = scores.masked_fill(~_visible(distance, options), float("-inf"))
    lse = torch.logsumexp(scores, 3)
    p = torch.exp(scores - torch.where(torch.isneginf(lse), 0.0, lse)[..., None])
    keep: Tensor | float = 1.0
    if options.dropout_p > 0:
        keep = dropout_scales(options.seed, part.rows, sk, options.dropout_p, q.device, acc)
        keep = keep.view(batch, heads, sq, sk)
    return _Probabilities(scores, p, lse, tanh, keep, distance)


def _visible(distance: Tensor, options: Options) -> Tensor:
    """Boolean, broadcastable to (B, Hq, Sq, Sk): True where a query may look."""
    visible = torch.ones_like(distance, dtype=torch.bool)
    if options.causal:
        visible &= distance <= 0
    if options.window_left >= 0:
        visible &= distance >= -options.window_left
    if options.window_right >= 0:
        visible &= distance <= options.window_right
    visible = visible[None, None]
    if options.key_padding_mask is not None:
        visible = visible & ~options.key_padding_mask.to(torch.bool)[:, None, None, :]
    return visible if options.mask is None else visible & options.mask


def _clamped(distance: Tensor, most: int) -> Tensor:
    return distance.clamp(-most, most) + most


def _repeat(t: Tensor, heads: int) -> Tensor:
    """(B, Hkv, S, D) in the accumulation dtype, each head as often as query heads read it."""
    return t.to(acc_dtype(t.dtype)).repeat_interleave(heads // t.shape[1], 1)
