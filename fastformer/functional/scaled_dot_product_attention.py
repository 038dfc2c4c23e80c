"""``torch.nn.functional.scaled_dot_product_attention`` on attention's kernels, with its conventions: any number of
leading dimensions that broadcast, masks that may be boolean or added, causal aligned at the top left."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import registry
from . import _checks
from ._attention import Options, run, run_plain
from .attention import MAX_HEAD_DIM, default_scale


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Same arguments and result as ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: ``(..., Hq, L, E)``, or fewer dimensions; float32, bfloat16, float16 or (CPU) float64.
        key, value: ``(..., H, S, E)`` and ``(..., H, S, Ev)``; leading dimensions broadcast against query's.
        attn_mask: broadcasts to ``(..., Hq, L, S)``; bool, True = may look, or numbers that are added to the scores, of
            query's dtype or float32. Numbers get a gradient.
        dropout_p: probability of dropping a weight. As in torch there is no ``training``: pass 0 in evaluation.
        is_causal: query i sees keys j <= i. Not together with ``attn_mask``.
        scale: default 1 / sqrt(E).
        enable_gqa: Hq may be a multiple of H.

    Returns:
        ``(..., Hq, L, Ev)``. A query that sees no key gives zeros. Head sizes over 256 run torch's own function, with a
        warning once (an error under :func:`fastformer.strict`).

    Raises:
        TypeError, ValueError: arguments that do not fit together, naming the argument.
    """
    if (
        attn_mask is None
        and not dropout_p
        and getattr(query, "ndim", 0) == getattr(key, "ndim", 0) == 4
        and (enable_gqa or query.shape[1] == key.shape[1])
        and not (is_causal and query.shape[2] != key.shape[2])
        and (plain := run_plain(query, key, value, is_causal, scale)) is not None
    ):
        return plain
    for name, t in (("query", query), ("key", key), ("value", value)):
        _checks.tensor(name, t)
        if t.dim() < 2:
            raise ValueError(f"{name}: shape {tuple(t.shape)} is not (..., H, S, E)")
        if t is not query:
            _checks.same_dtype(name, t, "query", query)
            _checks.same_device(name, t, "query", query)
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key: last dimension {key.shape[-1]} is not query's {query.shape[-1]}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"value: length {value.shape[-2]} is not key's {key.shape[-2]}")
    _checks.probability("dropout_p", dropout_p)
    if attn_mask is not None:
        if is_causal:
            raise ValueError("is_causal: cannot be set together with attn_mask; put it into the mask")
        if not isinstance(attn_mask, Tensor):
            raise TypeError(f"attn_mask: expected a torch.Tensor or None, got {type(attn_mask).__name__}")
        if attn_mask.dtype not in (torch.bool, query.dtype, torch.float32):
            raise TypeError(f"attn_mask: dtype {attn_mask.dtype} is not bool, float32 or query's {query.dtype}")
        _checks.same_device("attn_mask", attn_mask, "query", query)
    if not (1 <= query.shape[-1] <= MAX_HEAD_DIM and 1 <= value.shape[-1] <= MAX_HEAD_DIM):
        registry.report_unfused("attention", f"head_dim outside [1, {MAX_HEAD_DIM}]")
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    lead = _leading(query, key, value, enable_gqa)
    if query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]:
        q, k, v = query, key, value
    else:
        q, k, v = (_as_4d(t, lead, enable_gqa) for t in (query, key, value))
    if v.shape[1] != k.shape[1]:
        heads = max(k.shape[1], v.shape[1])
        k, v = (t.expand(-1, heads, -1, -1) for t in (k, v))
    mask = None
    if attn_mask is not None:
        mask = _mask_4d(attn_mask, lead, q.shape[2], k.shape[2])
    options = Options(
        default_scale(scale, q),
        is_causal,
        mask=mask if mask is not None and mask.dtype == torch.bool else None,
        bias=mask if mask is not None and mask.dtype != torch.bool else None,
        top_left=is_causal and q.shape[2] != k.shape[2],
        dropout_p=dropout_p,
    )
    out = run(q, k, v, options)
    return (
        out
        if query.dim() == 4 and len(lead) == 2
        else out.reshape(*lead[len(lead) - _extra(query, key, value) :], *out.shape[2:])
    )


def _extra(*tensors: Tensor) -> int:
    return max(t.dim() for t in tensors) - 2


def _leading(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """The result's dimensions before (L, E), at least two."""
    shapes = [query.shape[:-2], key.shape[:-2], value.shape[:-2]]
    if enable_gqa and query.dim() > 2:
        heads = query.shape[-3]
        for name, t in (("key", key), ("value", value)):
            if t.dim() < 3 or t.shape[-3] == 0 or heads % t.shape[-3]:
                raise ValueError(f"{name}: its heads, shape {tuple(t.shape)}, do not divide query's {heads}")
        shapes = [torch.Size((*s[:-1], heads)) for s in shapes]
    try:
        lead = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(
            f"key, value: leading dimensions {tuple(key.shape[:-2])} and {tuple(value.shape[:-2])} do not broadcast"
            f" with query's {tuple(query.shape[:-2])}"
        ) from None
    return (1,) * (2 - len(lead)) + tuple(lead)


def _as_4d(t: Tensor, lead: tuple[int, ...], enable_gqa: bool) -> Tensor:
    heads = t.shape[-3] if enable_gqa and t.dim() > 2 else lead[-1]
    return t.expand(*lead[:-1], heads, *t.shape[-2:]).reshape(math.prod(lead[:-1]), heads, *t.shape[-2:])


def _mask_4d(mask: Tensor, lead: tuple[int, ...], queries: int, keys: int) -> Tensor:
    """(B|1, Hq|1, Sq|1, Sk)."""
    full = (*lead, queries, keys)
    shape = (1,) * (len(full) - mask.dim()) + tuple(mask.shape)
    if len(shape) != len(full) or any(n not in (1, m) for n, m in zip(shape, full)):
        raise ValueError(f"attn_mask: shape {tuple(mask.shape)} does not broadcast to {full}")
    mask = mask.view(shape) if mask.is_contiguous() else mask.reshape(shape)
    mask = mask.expand(*shape[:-1], keys)
    if len(lead) > 2:
        mask = mask.expand(*lead[:-1], *shape[-3:-1], keys).flatten(0, len(lead) - 2)
    return mask
