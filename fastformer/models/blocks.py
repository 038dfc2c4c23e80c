"""The steps that the models' layers are made of, fused where the layers are plain ones.

    feed_forward     second(activation(first(x))), or down(activation(gate(x)) * up(x))
    attend           softmax(scale q k^T + biases + masks) v, each row of the batch one text
    attend_packed    the same of texts that lie end to end in one row

The first is its matmuls with one pass between them, the others one kernel. A layer that was replaced or has a hook
is called instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import nn as torch_nn
from torch.nn import functional as F

from .. import functional
from ..backends.registry import report_unfused
from ..functional.attention import MAX_HEAD_DIM, RelativeBias
from ..nn._joined import LINEAR as JOINABLE
from ..nn.attention import added_mask, explicit_attention
from ..nn.positions import bias_by_position
from ..nn.submodules import is_plain
from .activations import FUSED_ACTIVATIONS, OTHER_ACTIVATIONS
from .conv1d import Conv1D
from .inputs import PackedTexts

LINEAR = (*JOINABLE, Conv1D)


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of that name in config.json, element by element."""
    fused = FUSED_ACTIVATIONS.get(activation)
    return OTHER_ACTIVATIONS[activation](x) if fused is None else functional.bias_activation(x, None, fused)


def feed_forward(
    x: Tensor, first: torch_nn.Module, second: torch_nn.Module, activation: str, dropout_p: float = 0.0
) -> Tensor:
    """second(dropout(activation(first(x)))).

    Args:
        x: ``(*, E)``.
        first, second: linear layers, E -> F and F -> E.
        activation: its name in config.json.
        dropout_p: probability of dropping a hidden element; 0 outside of training.
    """
    fused = FUSED_ACTIVATIONS.get(activation)
    if fused is None or not (is_plain(first, *LINEAR) and is_plain(second, *LINEAR)):
        return second(F.dropout(activate(first(x), activation), dropout_p))
    return functional.feed_forward(
        x, _weight(first), first.bias, _weight(second), second.bias, fused, dropout_p=dropout_p
    )


def gated_feed_forward(
    x: Tensor,
    gate: torch_nn.Module,
    up: torch_nn.Module,
    down: torch_nn.Module,
    activation: str,
    dropout_p: float = 0.0,
) -> Tensor:
    """down(dropout(activation(gate(x)) * up(x))).

    Args:
        x: ``(*, E)``.
        gate, up, down: linear layers, E -> F twice and F -> E.
        activation, dropout_p: as in :func:`feed_forward`.
    """
    fused = FUSED_ACTIVATIONS.get(activation)
    if fused is None or not all(is_plain(layer, *LINEAR) for layer in (gate, up, down)):
        return down(F.dropout(gated(gate(x), up(x), activation), dropout_p))
    return functional.gated_feed_forward(
        x,
        _weight(gate),
        _weight(up),
        _weight(down),
        fused,
        b_gate=gate.bias,
        b_up=up.bias,
        b_down=down.bias,
        dropout_p=dropout_p,
    )


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, element by element."""
    fused = FUSED_ACTIVATIONS.get(activation)
    if fused is None:
        return OTHER_ACTIVATIONS[activation](gate) * up
    return functional.gated_activation(gate, up, fused)


def _weight(layer: torch_nn.Module) -> Tensor:
    """``(out_features, in_features)``."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.t() if isinstance(layer, Conv1D) else weight


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, texts: PackedTexts, *, causal: bool = False, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """Attention within each of the texts that lie end to end in one row.

    Args:
        q, k, v: ``(1, S, Hq | Hkv, D)``.
        texts: where they begin.
        causal, scale, dropout_p: as in :func:`fastformer.functional.attention_varlen`.

    Returns:
        ``(1, S, Hq, D)``.
    """
    starts, longest = texts
    q, k, v = (t[0] for t in (q, k, v))
    out = functional.attention_varlen(
        q, k, v, starts, starts, longest, longest, causal=causal, scale=scale, dropout_p=dropout_p
    )
    assert isinstance(out, Tensor)  # not a pair: return_lse is off
    return out[None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    dropout_p: float = 0.0,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention in one kernel; with ``need_weights``, or a head_dim it does not cover, step by step.

    Shapes and arguments as in :func:`fastformer.functional.attention`.

    Returns:
        ``(B, Hq, Sq, Dv)``, and with ``need_weights`` the weights ``(B, Hq, Sq, Sk)``, after dropout as in
        ``transformers``.
    """
    if not need_weights and max(q.shape[-1], v.shape[-1]) <= MAX_HEAD_DIM:
        options: dict[str, Any] = {"scale": scale, "bias": bias, "relative_bias": relative_bias, "attn_mask": attn_mask}
        causal = causal and q.shape[2] > 1  # one query sits at the end and sees everything
        out = functional.attention(
            q, k, v, causal=causal, key_padding_mask=key_padding_mask, dropout_p=dropout_p, **options
        )
        assert isinstance(out, Tensor)  # not a pair: return_lse is off
        return out, None
    if not need_weights:
        report_unfused("attention", f"head_dim over {MAX_HEAD_DIM}")
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (k, v))
    queries, keys = q.shape[2], k.shape[2]
    added = [] if bias is None else [bias]
    if relative_bias is not None:
        added.append(bias_by_position(relative_bias, queries, keys, keys - queries))
    if key_padding_mask is not None:
        added.append(added_mask(key_padding_mask[:, None, None, :], q.dtype))
    if attn_mask is not None:
        added.append(added_mask(~attn_mask, q.dtype))
    if causal:
        sees = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        added.append(added_mask(~sees, q.dtype))
    mask = sum(added[1:], added[0]).to(q.dtype) if added else None
    out, weights = explicit_attention(q, k, v, mask, scale, dropout_p)
    return out, weights if need_weights else None
