"""The attention of one layer of a Hugging Face model: transformers' arguments, as those of attention's kernels.

softmax(scaling q k^T, capped, + position_bias, masked) v, as each model's own eager attention computes it. Grouped
key/value heads are read as they are, not repeated; a :class:`StructuredMask` becomes flags of the kernel, padding a row
per sequence, packed documents their bounds; a learned sink (gpt-oss) is one multiplication with what the log-sum-exp
says of its weight.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..backends import registry
from ..functional import attention, attention_varlen, decode_attention
from ..functional._doors import needs_grad
from ..functional.attention import MAX_HEAD_DIM
from .flash_attn import MANY_ROWS
from .transformers_mask import Pattern, StructuredMask

# What only some implementations of transformers can do, and their models then take for granted.
_REFUSED = ("cache", "indices", "block_indices", "sinks", "block_table")
_warned: set[str] = set()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, with the arguments of transformers' attention functions.

    Args:
        module: the layer; ``module.is_causal`` (True if there is none) counts where there is no mask.
        query: ``(B, Hq, Sq, D)``.
        key, value: ``(B, Hkv, Sk, D)`` and ``(B, Hkv, Sk, Dv)``, Hq a multiple of Hkv.
        attention_mask: from transformers_mask.py, or a model's own: bool, True = may look, or numbers to be added.
        dropout: probability of dropping a weight.
        scaling: default 1 / sqrt(D).
        is_causal: in place of the module's.
        position_bias: ``(B|1, Hq|1, Sq, Sk)``, added to the scaled scores; gets a gradient.
        softcap: scaled scores become softcap * tanh(score / softcap).
        s_aux: ``(Hq)``: a score that takes part in the softmax and has no value; gets a gradient.
        kwargs: ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q``, ``max_length_k`` bound packed documents where
            the mask does not; ``sliding_window`` is in the mask already. The others of transformers are ignored.

    Returns:
        ``(B, Sq, Hq, Dv)`` and None: the weights are never computed.

    Raises:
        ValueError: arguments that only other implementations understand, or that do not fit together.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f'{name}: attn_implementation="fastformer" does not know it; use "sdpa" or "eager" instead'
            )
    if kwargs.get("output_attentions"):
        _warn_once(
            'fastformer: output_attentions=True gives None for the weights, which attn_implementation="fastformer" (as'
            ' "sdpa") never computes; use "eager"'
        )
    query, key, value = _of_one_kind(query, key, value)
    unfused = _unfused(query, value)
    if unfused is not None:
        if s_aux is not None or softcap is not None:
            raise ValueError(f"{'softcap' if s_aux is None else 's_aux'}: no implementation of it for {unfused}")
        registry.report_unfused("attention", unfused)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, **kwargs
        )
    pattern, mask = _pattern_or_table(module, attention_mask, is_causal, query.shape[2], key.shape[2])
    bounds = None if mask is not None else _bounds(pattern, kwargs)
    if bounds is not None and position_bias is not None:  # which attention_varlen does not have
        if not isinstance(attention_mask, StructuredMask) or pattern.cu_seqlens is None:
            raise ValueError("position_bias: cannot be given together with cu_seq_lens_q, only with a mask")
        bounds, pattern, mask = None, Pattern(), attention_mask.table()
    options: dict[str, Any] = {
        "causal": pattern.causal,
        "window": pattern.window,
        "scale": scaling,
        "softcap": softcap or 0.0,
        "dropout_p": float(dropout),
        "return_lse": s_aux is not None,
    }
    if bounds is not None:
        out = _packed(query, key, value, bounds, options)
    elif pattern.span is not None and position_bias is None and _is_decoding(query, key, value, dropout):
        del options["dropout_p"]
        begin, end = pattern.span
        out = decode_attention(query, key, value, end, cache_leftpad=begin, **options)
    else:
        if pattern.keys is not None:
            key, value = key[:, :, : pattern.keys], value[:, :, : pattern.keys]
            position_bias = None if position_bias is None else position_bias[..., : pattern.keys]
        visible, bias = _mask_and_bias(mask, position_bias, query)
        out = attention(
            query, key, value, attn_mask=visible, bias=bias, key_padding_mask=pattern.key_padding_mask, **options
        )
    if s_aux is not None:
        out, lse = out
        # exp(s) more in the denominator: sum / (sum + exp(s)), and the log of the sum is lse.
        out = (out * torch.sigmoid(lse - s_aux.to(lse.dtype).view(-1, 1))[..., None]).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _pattern_or_table(
    module: nn.Module, mask: Tensor | None, is_causal: bool | None, queries: int, keys: int
) -> tuple[Pattern, Tensor | None]:
    """What is hidden, as a pattern or, beside an empty one, as a table."""
    if mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if causal and queries != 1 and queries != keys:
            raise ValueError(
                f"attention_mask: None does not say where {queries} causal queries stand among {keys} keys; pass a mask"
            )
        return Pattern(causal=bool(causal)), None
    if not isinstance(mask, StructuredMask):
        return Pattern(), mask
    if mask.shape[-2:] != (queries, keys):
        raise ValueError(f"attention_mask: shape {tuple(mask.shape)} does not end with {(queries, keys)}")
    return (mask.pattern, None) if mask.untouched() else (Pattern(), mask.table())


def _of_one_kind(*tensors: Tensor) -> list[Tensor]:
    """q, k and v in autocast's dtype and of one batch, as torch's own attention takes them."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
    batch = max(t.shape[0] for t in tensors)
    return [t if t.shape[0] == batch else t.expand(batch, -1, -1, -1) for t in tensors]


def _unfused(query: Tensor, value: Tensor) -> str | None:
    """Why this call is left to transformers' "sdpa"."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM:
        return f"head_dim over {MAX_HEAD_DIM}"
    return None


def _bounds(pattern: Pattern, kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """cu_seqlens and longest documents, of queries and of keys, if the documents of this call are packed."""
    if pattern.key_padding_mask is not None:
        return None
    if pattern.cu_seqlens is not None:
        return pattern.cu_seqlens, pattern.cu_seqlens, None, None
    if kwargs.get("cu_seq_lens_q") is None or kwargs.get("cu_seq_lens_k") is None:
        return None
    bounds = (kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"])
    return *(t.to(torch.int32) for t in bounds), kwargs.get("max_length_q"), kwargs.get("max_length_k")


def _is_decoding(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """So few queries that reading the keys as they lie beats matrix products, and nothing that decoding has not."""
    rows = query.shape[2] * query.shape[1] // key.shape[1]
    return rows < MANY_ROWS and not dropout and not needs_grad(query, key, value)


def _packed(query: Tensor, key: Tensor, value: Tensor, bounds: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """attention_varlen of ``(B, H, S, D)``, the rows of the batch laid end to end; a tensor, or with lse a pair."""
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    found = attention_varlen(q, k, v, *bounds, **options)
    out, lse = found if options["return_lse"] else (found, None)
    batch = query.shape[0]
    out = out.unflatten(0, (batch, -1)).transpose(1, 2)
    return out if lse is None else (out, lse.unflatten(1, (batch, -1)).transpose(0, 1))


def _mask_and_bias(mask: Tensor | None, position_bias: Tensor | None, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A mask of either kind and a bias as attention takes them: four dimensions; numbers in q's dtype or float32."""
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    if mask is not None and mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise TypeError(f"attention_mask: dtype {mask.dtype} is neither bool nor floating-point")
        position_bias = mask if position_bias is None else position_bias + mask
        mask = None
    if position_bias is not None and (position_bias.dtype != torch.float32 or q.dtype == torch.float64):
        position_bias = position_bias.to(q.dtype)
    return mask, position_bias


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)
