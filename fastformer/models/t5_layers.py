"""The layers of T5's encoder and decoder (Raffel et al. 2020, arXiv:1910.10683), as in ``transformers``.

Pre-norm, with RMS norms, and nothing has a bias:

    x += o(attention(norm(x)));   decoder: x += o(attention(norm(x), encoder output));   x += wo(act(wi(norm(x))))

The scores are q k^T, unscaled; in self-attention a learned number per head and range of distances is added to them,
inside the kernel, so it needs no memory. T5 1.1 has wo(act(wi_0(y)) * wi_1(y)) (Shazeer 2020, arXiv:2002.05202).

Layers hand on the residual stream and what is still to be added to it: addition, dropout and the next norm are then one
kernel, across layer and block boundaries too. In a float16 model the stream, and what is added to it, is float32:
trained T5s have sums beyond the largest float16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch import nn as torch_nn
from torch.nn import functional as F

from .. import functional, nn
from ..functional.attention import MAX_HEAD_DIM, RelativeBias
from ..nn._joined import LINEAR, JoinedLayers
from ..nn.norm import add_norm
from ..nn.submodules import is_plain, pending_dropout
from .blocks import activate, attend, feed_forward, gated, gated_feed_forward
from .cache import EncoderDecoderCache

if TYPE_CHECKING:
    from .t5_stack import T5Config

# ---- float16 ---------------------------------------------------------------------------------------------------------


def _saturated(x: Tensor) -> Tensor:
    """In float16 its largest number instead of an infinity, which would become NaN further on."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(torch.float16).max
    return x.clamp(-largest, largest)


def _onto_stream(layer: torch_nn.Module, x: Tensor) -> Tensor:
    """layer(x), in float32 for float16. A layer that has to be called takes and returns its own dtype."""
    if is_plain(layer, *LINEAR):
        if torch.float16 not in (x.dtype, layer.weight.dtype):
            return layer(x)
        return F.linear(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), x.dtype)
    if not torch.is_autocast_enabled(x.device.type):
        x = _saturated(x.to(dtype))
    return _saturated(layer(x))


class T5LayerNorm(nn.RMSNorm):
    """RMS norm whose result has the dtype of its weight: half precision for a float32 stream."""

    def forward(self, x: Tensor) -> Tensor:
        """x ``(*, d_model)`` -> the same shape."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        weight = self.weight.to(x.dtype)
        return functional.rms_norm(x, self.normalized_shape, weight, self.eps).to(self.weight.dtype)


class Stream(NamedTuple):
    """The residual stream between two layers: ``residual + dropout(delta)``, not yet added up."""

    residual: Tensor
    delta: Tensor | None = None
    dropout_p: float = 0.0

    def normed(self, norm: torch_nn.Module) -> tuple[Tensor, Tensor]:
        """The sum normalised, and the sum."""
        residual, delta, dropout_p = self
        if delta is None or not is_plain(norm, T5LayerNorm):
            return add_norm(norm, delta, residual, dropout_p)
        dtype, shape, weight = residual.dtype, norm.normalized_shape, norm.weight.to(residual.dtype)
        out, summed = functional.add_rms_norm(delta.to(dtype), residual, shape, weight, norm.eps, dropout_p=dropout_p)
        return out.to(norm.weight.dtype), summed


# ---- the layers ------------------------------------------------------------------------------------------------------


class T5Attention(JoinedLayers):
    """Attention between the projections q, k, v and o, over the input itself or over the encoder's output.

    What reads the same input is one matmul: q, k and v, or k and v of the encoder's output.
    """

    def __init__(
        self, config: T5Config, is_cross: bool, has_relative_attention_bias: bool = False, layer_idx: int = 0
    ) -> None:
        super().__init__()
        self.joined_layers = ("k", "v") if is_cross else ("q", "k", "v")
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = config.num_heads, config.d_kv
        self.dropout = config.dropout_rate
        self.causal = config.is_decoder and not is_cross
        inner = self.num_heads * self.head_dim
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.RelativePositionBias(
                config.relative_attention_num_buckets,
                config.relative_attention_max_distance,
                config.num_heads,
                bidirectional=not config.is_decoder,
            )
        self.join()

    def forward(
        self,
        x: Tensor,
        states: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        key_padding_mask: Tensor | None = None,
        position: RelativeBias | Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from x to itself, or to ``states``.

        Args:
            x: ``(B, S, E)``.
            states: the encoder's output ``(B, T, E)``.
            cache: keys and values of both kinds of attention.
            key_padding_mask: ``(B, keys)`` bool, True = ignored.
            position: what is added to the scores: the stack's table, or a tensor ``(1, H, S, keys)``.
            need_weights: return the weights ``(B, H, S, keys)``.
        """
        options: dict[str, Any] = {"causal": self.causal, "scale": 1.0, "key_padding_mask": key_padding_mask}
        options["dropout_p"] = self.dropout if self.training else 0.0
        tabled = position is None or isinstance(position, RelativeBias)
        options["relative_bias"] = position if tabled else None
        packed = tabled and states is None and cache is None and not need_weights and self.head_dim <= MAX_HEAD_DIM
        qkv = self._joined_heads(x) if packed else None
        if qkv is not None:
            return _onto_stream(self.o, functional.attention_qkvpacked(qkv, **options).flatten(2)), None
        q, k, v = self._queries_keys_values(x, states, cache)
        bias = None if tabled else position
        out, weights = attend(q, k, v, bias=bias, need_weights=need_weights, **options)
        return _onto_stream(self.o, out.transpose(1, 2).flatten(2)), weights

    def _queries_keys_values(
        self, x: Tensor, states: Tensor | None, cache: EncoderDecoderCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q ``(B, H, S, D)``, k and v ``(B, H, keys, D)``; the encoder's are computed once per cache."""
        if states is None:
            q, k, v = self._projected(x)
            return q, *((k, v) if cache is None else cache.self_attention_cache.update(k, v, self.layer_idx))
        q = self._heads(self.q(x))
        if cache is not None and cache.is_updated(self.layer_idx):
            return q, *cache.cross_attention_cache.stored(self.layer_idx)
        k, v = self._projected(states)
        return q, *((k, v) if cache is None else cache.cross_attention_cache.update(k, v, self.layer_idx))

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the layers that read the same input, ``(B, H, S, D)`` each."""
        joined = self._joined_heads(x)
        if joined is not None:
            return tuple(t.transpose(1, 2) for t in joined.unbind(2))
        return tuple(self._heads(getattr(self, name)(x)) for name in self.joined_layers)

    def _joined_heads(self, x: Tensor) -> Tensor | None:
        """The same as one ``(B, S, 2 or 3, H, D)``, where that is one matmul."""
        joined = self.joined_output(x)
        return None if joined is None else _saturated(joined).unflatten(2, (-1, self.num_heads, self.head_dim))

    def _heads(self, x: Tensor) -> Tensor:
        return _saturated(x).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)


class _T5Sublayer(torch_nn.Module):
    """A norm before ``layer`` and dropout behind it."""

    def __init__(self, config: T5Config, name: str, layer: torch_nn.Module) -> None:
        super().__init__()
        self.add_module(name, layer)
        self.layer_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = torch_nn.Dropout(config.dropout_rate)


class T5LayerSelfAttention(_T5Sublayer):
    """Norm, self-attention, dropout."""

    def __init__(self, config: T5Config, has_relative_attention_bias: bool, layer_idx: int) -> None:
        super().__init__(config, "SelfAttention", T5Attention(config, False, has_relative_attention_bias, layer_idx))

    def forward(
        self,
        stream: Stream,
        cache: EncoderDecoderCache | None,
        key_padding_mask: Tensor | None,
        position: RelativeBias | Tensor,
        need_weights: bool,
    ) -> tuple[Stream, Tensor | None]:
        """The stream ``(B, S, E)`` for the next layer, and the attention weights if they are wanted."""
        normed, residual = stream.normed(self.layer_norm)
        out, weights = self.SelfAttention(normed, None, cache, key_padding_mask, position, need_weights)
        return Stream(residual, *pending_dropout(self.dropout, out)), weights


class T5LayerCrossAttention(_T5Sublayer):
    """Norm, attention to the encoder's output, dropout."""

    def __init__(self, config: T5Config, layer_idx: int) -> None:
        super().__init__(config, "EncDecAttention", T5Attention(config, True, layer_idx=layer_idx))

    def forward(
        self,
        stream: Stream,
        states: Tensor,
        cache: EncoderDecoderCache | None,
        key_padding_mask: Tensor | None,
        need_weights: bool,
    ) -> tuple[Stream, Tensor | None]:
        """The same for states ``(B, T, E)``."""
        normed, residual = stream.normed(self.layer_norm)
        out, weights = self.EncDecAttention(normed, states, cache, key_padding_mask, None, need_weights)
        return Stream(residual, *pending_dropout(self.dropout, out)), weights


class T5DenseReluDense(JoinedLayers):
    """The feed-forward block, wo(act(wi(x))) or wo(act(wi_0(x)) * wi_1(x)), there with one matmul for wi_0 and wi_1."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        assert config.dense_act_fn is not None  # filled in
        self.activation, self.gated = config.dense_act_fn, bool(config.is_gated_act)
        self.joined_layers = ("wi_0", "wi_1") if self.gated else ("wi",)
        for name in self.joined_layers:
            self.add_module(name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = torch_nn.Dropout(config.dropout_rate)
        self.join()

    def forward(self, x: Tensor) -> Tensor:
        """x ``(B, S, E)`` -> ``(B, S, E)``, float32 for float16."""
        if x.dtype == torch.float16 or not is_plain(self.dropout, torch_nn.Dropout):
            return self._in_parts(x)
        p = self.dropout.p if self.dropout.training else 0.0
        if self.gated:
            return gated_feed_forward(x, self.wi_0, self.wi_1, self.wo, self.activation, p)
        return feed_forward(x, self.wi, self.wo, self.activation, p)

    def _in_parts(self, x: Tensor) -> Tensor:
        hidden = [_saturated(getattr(self, name)(x)) for name in self.joined_layers]
        # What is computed from normalised rows fits into float16, products of it and sums of those do not.
        hidden = [h.float() if h.dtype == torch.float16 else h for h in hidden]
        activated = gated(*hidden, self.activation) if self.gated else activate(*hidden, self.activation)
        return _onto_stream(self.wo, self.dropout(activated))


class T5LayerFF(_T5Sublayer):
    """Norm, feed-forward, dropout."""

    def __init__(self, config: T5Config) -> None:
        super().__init__(config, "DenseReluDense", T5DenseReluDense(config))

    def forward(self, stream: Stream) -> Stream:
        """The stream ``(B, S, E)`` for the next layer."""
        normed, residual = stream.normed(self.layer_norm)
        return Stream(residual, *pending_dropout(self.dropout, self.DenseReluDense(normed)))


class T5Block(torch_nn.Module):
    """One layer: self-attention, in a decoder attention to the encoder's output, feed-forward."""

    def __init__(self, config: T5Config, has_relative_attention_bias: bool, layer_idx: int) -> None:
        super().__init__()
        self.layer = torch_nn.ModuleList([T5LayerSelfAttention(config, has_relative_attention_bias, layer_idx)])
        if config.is_decoder:
            self.layer.append(T5LayerCrossAttention(config, layer_idx))
        self.layer.append(T5LayerFF(config))

    def forward(
        self,
        stream: Stream,
        position: RelativeBias | Tensor,
        key_padding_mask: Tensor | None = None,
        states: Tensor | None = None,
        states_padding_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        need_weights: bool = False,
    ) -> tuple[Stream, Tensor | None, Tensor | None]:
        """The stream ``(B, S, E)`` for the next block, the weights of self-attention and those of cross-attention, None
        where not wanted."""
        self_attention, *cross_attention, ff = self.layer
        stream, weights = self_attention(stream, cache, key_padding_mask, position, need_weights)
        cross = None
        if cross_attention and states is not None:
            stream, cross = cross_attention[0](stream, states, cache, states_padding_mask, need_weights)
        return ff(stream), weights, cross
