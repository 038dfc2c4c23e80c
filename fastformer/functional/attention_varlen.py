"""Attention over packed sequences: (B, S, ...) without the padding, documents laid end to end.

Sequence n owns the positions cu_seqlens[n] ... cu_seqlens[n + 1] - 1 of tensors without a batch dimension, and sees
nothing of its neighbours. The kernels are attention's own, which look up where a sequence begins.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import _checks
from ._attention import Options, run_with_lse
from .attention import (
    MAX_HEAD_DIM,
    RelativeBias,
    check_slopes,
    check_softcap,
    check_window,
    default_scale,
    distance_bias,
)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    relative_bias: RelativeBias | tuple[Tensor, bool, int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` within each of N packed sequences.

    Args:
        q: ``(total_q, Hq, D)``.
        k, v: ``(total_k, Hkv, D)`` and ``(total_k, Hkv, Dv)``.
        cu_seqlens_q, cu_seqlens_k: ``(N + 1)`` int32 on q's device: where each sequence begins, and the end. From 0,
            never decreasing, to total_q and total_k; a sequence may be empty.
        max_seqlen_q, max_seqlen_k: the longest sequence, or more. Left out, it is looked up.
        causal, scale, relative_bias, alibi_slopes, window, softcap, dropout_p, return_lse: as in :func:`attention`,
            positions counted within the sequence, aligned at its end; ``alibi_slopes`` ``(Hq)`` or ``(N, Hq)``.

    Returns:
        ``(total_q, Hq, Dv)``; with ``return_lse`` the log-sum-exp ``(Hq, total_q)`` as well.

    Raises:
        TypeError, ValueError: arguments that do not fit together, naming the argument. The values of cu_seqlens are
            looked at once per tensor; on a GPU that first look waits for it to be computed.
    """
    _check(q, k, v)
    longest_q = check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, "q")
    longest_k = check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k, "k")
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(f"cu_seqlens_k: {len(cu_seqlens_k)} entries, but cu_seqlens_q has {len(cu_seqlens_q)}")
    for name, given, longest in (("q", max_seqlen_q, longest_q), ("k", max_seqlen_k, longest_k)):
        if given is not None and longest is not None and given < longest:
            raise ValueError(f"max_seqlen_{name}: {given} is less than the longest sequence, {longest}")
        if given is None and longest is None:
            raise ValueError(f"max_seqlen_{name}: has to be given where cu_seqlens_{name} cannot be looked at")
    _checks.probability("dropout_p", dropout_p)
    check_softcap(softcap)
    left, right = check_window(window)
    heads, sequences = q.shape[1], len(cu_seqlens_q) - 1
    most_q = max_seqlen_q if longest_q is None else longest_q
    most_k = max_seqlen_k if longest_k is None else longest_k
    assert most_q is not None and most_k is not None
    options = Options(
        default_scale(scale, q),
        causal,
        distance_bias=None
        if relative_bias is None
        else distance_bias(RelativeBias(*relative_bias), heads, max(most_q, most_k), q),
        alibi_slopes=None if alibi_slopes is None else check_slopes(alibi_slopes, sequences, heads, q),
        window_left=left,
        window_right=right,
        softcap=softcap,
        dropout_p=dropout_p,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=most_q,
        max_seqlen_k=most_k,
    )
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out, lse = run_with_lse(q, k, v, options)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(name, t)
        if t.dim() != 3:
            raise ValueError(f"{name}: shape {tuple(t.shape)} is not (total, H, D)")
        if not 1 <= t.shape[2] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: head_dim {t.shape[2]} is not in [1, {MAX_HEAD_DIM}]")
    for name, t in (("k", k), ("v", v)):
        _checks.same_dtype(name, t, "q", q)
        _checks.same_device(name, t, "q", q)
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k: head_dim {k.shape[2]} is not q's {q.shape[2]}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v: positions and heads {tuple(v.shape[:2])} are not k's {tuple(k.shape[:2])}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: {k.shape[1]} heads do not divide q's {q.shape[1]}")


# Tensor -> (its version, its longest sequence): a batch's cu_seqlens go through every layer, and looking at their
# values makes the host wait for a GPU.
_looked_at: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_cu_seqlens(name: str, cu_seqlens: Tensor, t: Tensor, t_name: str) -> int | None:
    """The longest sequence; None while a compiler traces, when there are no values to check."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        given = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise TypeError(f"{name}: expected an int32 tensor, got {given}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"{name}: shape {tuple(cu_seqlens.shape)} is not (N + 1)")
    _checks.same_device(name, cu_seqlens, t_name, t)
    if torch.compiler.is_compiling() or type(cu_seqlens) is not Tensor:
        return None
    key = None if cu_seqlens.is_inference() else (cu_seqlens._version, len(t))
    if key is not None and (known := _looked_at.get(cu_seqlens)) and known[0] == key:
        return known[1]
    values = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(values)]
    if values[0] != 0:
        raise ValueError(f"{name}: begins with {values[0]}, not 0")
    if min(lengths, default=0) < 0:
        at = next(i for i, n in enumerate(lengths) if n < 0)
        raise ValueError(f"{name}: decreases from {values[at]} to {values[at + 1]} at index {at + 1}")
    if values[-1] != len(t):
        raise ValueError(f"{name}: ends with {values[-1]}, not with {t_name}'s {len(t)} positions")
    longest = max(lengths, default=0)
    if key is not None:
        _looked_at[cu_seqlens] = (key, longest)
    return longest
