"""What an attention call asks for beside q, k and v: the one argument list of every backend.

csrc/include/fastformer.h has the formula. Every backend file ``attention.py`` has::

    forward(q, k, v, options) -> (out, lse)
    backward(dout, dlse, q, k, v, out, lse, options, needs=(dbias, ddistance_bias), dq=None, dk=None, dv=None)
        -> Gradients

(the CPU's has ``forward_only(q, k, v, options) -> out`` beside them), and every ``decode_attention.py``::

    forward(q, k_cache, v_cache, cache_seqlens, options) -> (out, lse)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Optional parts of the operation, by the name under which a backend declares them.
FEATURES = (
    "causal",
    "top_left",
    "window",
    "key_padding_mask",
    "mask",
    "bias",
    "relative_bias",
    "alibi",
    "softcap",
    "dropout",
    "grouped_heads",
    "varlen",
    "unaligned",
)


class Options(NamedTuple):
    """The fields follow the operator ``fastformer::attention``, whose arguments after q, k, v they are."""

    scale: float
    """Multiplies q k^T."""
    causal: bool = False
    """Query i sees keys up to its position p(i) = i + Sk - Sq."""
    key_padding_mask: Tensor | None = None
    """``(B, Sk)`` bool, True = ignored; its last dimension is contiguous."""
    mask: Tensor | None = None
    """``(B|1, Hq|1, Sq|1, Sk)`` bool, True = visible; its last dimension is contiguous."""
    bias: Tensor | None = None
    """``(B|1, Hq|1, Sq|1, Sk)`` in q's dtype or the accumulation dtype; its last dimension is contiguous."""
    distance_bias: Tensor | None = None
    """``(Hq, 2 M + 1)`` in the accumulation dtype, contiguous: added at distance clamp(j - p(i), -M, M) + M."""
    alibi_slopes: Tensor | None = None
    """``(B|1, Hq)`` float32, contiguous: -slope * abs(j - p(i)) is added."""
    top_left: bool = False
    """Query i sits at position p(i) = i instead."""
    window_left: int = -1
    """Keys before p(i) - window_left are hidden; -1 = none are."""
    window_right: int = -1
    """Keys after p(i) + window_right are hidden; -1 = none are."""
    softcap: float = 0.0
    """Scores become softcap * tanh(score / softcap) before anything is added; 0 = no cap."""
    dropout_p: float = 0.0
    seed: int = 0
    """Of the dropout mask: row (b * Hq + h) * Sq + i (packed: h * total + position), column j."""
    cu_seqlens_q: Tensor | None = None
    """``(N + 1)`` int32: q is ``(1, Hq, total_q, D)`` and sequence n has the positions between two entries."""
    cu_seqlens_k: Tensor | None = None
    """``(N + 1)`` int32, the same for k and v. With these there is no mask, bias or key_padding_mask."""
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Its tensors, in the order of the fields."""
        return (
            self.key_padding_mask,
            self.mask,
            self.bias,
            self.distance_bias,
            self.alibi_slopes,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
        )

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Options:
        """The same with other tensors, in the order of :meth:`tensors`; () = none."""
        padding, mask, bias, distance, slopes, cu_q, cu_k = tensors or (None,) * 7
        return self._replace(
            key_padding_mask=padding,
            mask=mask,
            bias=bias,
            distance_bias=distance,
            alibi_slopes=slopes,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
        )

    def features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[str, ...]:
        """The optional parts this call uses, in the order of :data:`FEATURES`."""
        used: tuple[str, ...] = ("causal",) if self.causal else ()
        if self.top_left:
            used += ("top_left",)
        if self.window_left >= 0 or self.window_right >= 0:
            used += ("window",)
        if self.key_padding_mask is not None:
            used += ("key_padding_mask",)
        if self.mask is not None:
            used += ("mask",)
        if self.bias is not None:
            used += ("bias",)
        if self.distance_bias is not None:
            used += ("relative_bias",)
        if self.alibi_slopes is not None:
            used += ("alibi",)
        if self.softcap:
            used += ("softcap",)
        if self.dropout_p > 0:
            used += ("dropout",)
        if q.shape[1] != k.shape[1]:
            used += ("grouped_heads",)
        if self.cu_seqlens_q is not None:
            used += ("varlen",)
        if (q.shape[3] | v.shape[3]) % 8:
            used += ("unaligned",)
        return used


class DecodeOptions(NamedTuple):
    """The same of decode_attention. The fields follow its operator, whose arguments after cache_seqlens they are."""

    scale: float
    causal: bool = True
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    """``(B|1, Hq)`` float32, contiguous."""
    page_table: Tensor | None = None
    """``(B, pages of a sequence)`` int32, its last dimension contiguous."""
    cache_batch_idx: Tensor | None = None
    """``(B)`` int32, contiguous: the row of the cache that a sequence has."""
    cache_leftpad: Tensor | None = None
    """``(B)`` int32, contiguous: keys before it are not valid."""


class Gradients(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None
    """In the shape of ``Options.bias``, in its dtype or the accumulation dtype."""
    ddistance_bias: Tensor | None = None
    """``(Hq, 2 M + 1)`` in the accumulation dtype."""


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that data of ``dtype`` is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sequences(options: Options, q: Tensor, k: Tensor) -> tuple[int, int, int]:
    """How many sequences a call has, and the most queries and keys that one of them has."""
    if options.cu_seqlens_q is not None:
        return len(options.cu_seqlens_q) - 1, options.max_seqlen_q, options.max_seqlen_k
    return q.shape[0], q.shape[2], k.shape[2]


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """An uninitialised ``(B, Hq, Sq, Dv)`` that is (B, Sq, Hq, Dv) in memory: merging the heads is then a view."""
    b, h, s, _ = q.shape
    d = v.shape[3]
    return torch.empty_strided((b, h, s, d), (s * h * d, d, h * d, 1), dtype=q.dtype, device=q.device)


def empty_like_input(t: Tensor) -> Tensor:
    """An uninitialised gradient, (B, S, H, D) in memory where ``t`` is a transposed view of that."""
    if t.is_contiguous():
        return torch.empty_like(t)
    if t.stride(1) >= t.stride(2):
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)
    b, h, s, d = t.shape
    return torch.empty_strided((b, h, s, d), (s * h * d, d, h * d, 1), dtype=t.dtype, device=t.device)
