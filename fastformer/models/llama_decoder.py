"""Llama's own decoder for generation on a CPU: prompts through the model, then four matmuls and five small kernels per
layer and token.

Whether layers may be read or have to be called, and where their weights lie, is found out once and not for every token.
The cache is one tensor for all layers: its new column and its filled part are each taken from it once per token. The
query and key heads of a layer lie side by side and are turned together.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch import nn as torch_nn

from .. import functional, nn
from ..backends.cpu import unavailable
from ..backends.registry import overridden
from ..functional._joined import joined
from ..functional.attention import MAX_HEAD_DIM
from ..nn.submodules import is_plain
from .cache import KVCache

if TYPE_CHECKING:
    from .llama import LlamaForCausalLM

PLAIN = (torch_nn.Linear, nn.Linear, nn.Embedding, nn.RMSNorm, nn.GatedFeedForward, torch_nn.ModuleList)


class Layer(NamedTuple):
    """Weights ``(out, in)`` and biases of a layer's matmuls, of those that are one side by side, and of its norms."""

    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    middle_norm: Tensor
    next_norm: Tensor


def fused_decoder(model: LlamaForCausalLM, max_length: int) -> FusedDecoder | None:
    """A :class:`FusedDecoder`, or None where the model's modules have to be called or other kernels are asked for."""
    from . import llama

    if overridden() not in (None, "cpu") or unavailable("cpu") or torch.is_grad_enabled():
        return None
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or model.config.head_dim > MAX_HEAD_DIM:
        return None
    own = (llama.LlamaForCausalLM, llama.LlamaModel, llama.LlamaDecoderLayer, llama.LlamaAttention)
    if not all(is_plain(m, *PLAIN, *own, llama.LlamaRotaryEmbedding) for m in model.modules()):
        return None
    first = model.model.embed_tokens.weight
    if any(p.dtype != first.dtype or p.device.type != "cpu" for p in model.parameters()):
        return None
    layers = _layers(model)
    return None if layers is None else FusedDecoder(model, layers, max_length)


def _layers(model: LlamaForCausalLM) -> list[Layer] | None:
    """None if weights that should lie side by side do not."""
    layers = []
    following = [*(layer.input_layernorm for layer in model.model.layers[1:]), model.model.norm]
    for layer, next_norm in zip(model.model.layers, following, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        parts: list[Tensor | None] = []
        for group in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        ):
            weight = joined(*(part.weight for part in group))
            bias = joined(*(part.bias for part in group))
            if weight is None or (bias is None and any(part.bias is not None for part in group)):
                return None
            parts += (weight, bias)
        layers.append(Layer(*parts, layer.post_attention_layernorm.weight, next_norm.weight))  # type: ignore[arg-type]
    return layers


class FusedDecoder:
    """:class:`fastformer.generation.Decoder` for a Llama none of whose modules has to be called."""

    def __init__(self, model: LlamaForCausalLM, layers: list[Layer], max_length: int) -> None:
        self.model = model
        self.layers = layers
        self.max_length = max_length

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, repeats: int = 1) -> Tensor:
        """Prompts ``(B, S)``, mask ``(B, S)`` 0 at left padding or None -> logits ``(B * repeats, V)``."""
        model = self.model
        self.length = self._prompt_length = input_ids.shape[1]
        self._cache = cache = KVCache(model.config.num_hidden_layers, self.max_length)
        self._padding = self._positions = positions = None
        if attention_mask is not None:
            positions = (attention_mask.cumsum(1) - 1).clamp_(min=0)
            self._positions = (positions[:, -1:] + 1).repeat_interleave(repeats, 0)
            padding = torch.zeros(len(input_ids), self.max_length, dtype=torch.bool)
            padding[:, : self.length] = attention_mask == 0
            self._padding = padding.repeat_interleave(repeats, 0)
        logits = model(input_ids, attention_mask, positions, cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        cache.repeat(repeats)
        self._stack()
        return logits if repeats == 1 else logits.repeat_interleave(repeats, 0)

    def step(self, token_ids: Tensor) -> Tensor:
        """Appends one token to each sequence, ``(B)``; logits ``(B, V)`` for the next."""
        if self.length >= self.max_length:
            raise ValueError(f"token_ids: {self.length + 1} positions do not fit into a cache of {self.max_length}")
        body, config, kernels = self.model.model, self.model.config, _kernels()
        batch, query_heads, key_heads = len(token_ids), config.num_attention_heads, config.num_key_value_heads
        head_dim, inner, width, eps = config.head_dim, config.intermediate_size, (config.hidden_size,), body.norm.eps
        turned, heads = query_heads + key_heads, query_heads + 2 * key_heads
        activation = body.layers[0].mlp.activation
        options = {"scale": body.layers[0].self_attn.scale}
        if self._padding is not None:
            options["key_padding_mask"] = self._padding[:, : self.length + 1]

        x = body.embed_tokens(token_ids)
        cos, sin = (t.flatten(0, 1) for t in body.rotary_emb(x[:, None], self._positions, self.length))
        next_row = 1 if len(cos) > 1 else 0  # of cos and sin, for the next sequence
        columns = self._stacked[:, :, :, :, self.length].unbind(0)
        filled = self._stacked[:, :, :, :, : self.length + 1].unbind(0)
        product = x.new_empty(batch, inner)
        normed = functional.rms_norm(x, width, body.layers[0].input_layernorm.weight, eps)
        for layer, column, seen in zip(self.layers, columns, filled, strict=True):
            qkv = functional.linear(normed, layer.qkv, layer.qkv_bias).view(batch, heads, 1, head_dim)
            kernels.rotary.forward(qkv[:, :turned], None, cos, sin, None, 0, next_row, False, False, True)
            column.copy_(qkv[:, query_heads:].view(batch, 2, key_heads, head_dim).transpose(0, 1))
            out = functional.attention(qkv[:, :query_heads], *seen.unbind(0), **options).reshape(batch, -1)
            delta = functional.linear(out, layer.out, layer.out_bias)
            normed, x = functional.add_rms_norm(delta, x, width, layer.middle_norm, eps)
            gate, up = functional.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, 1)
            kernels.activation.forward(gate, None, up, None, activation, out=product)
            delta = functional.linear(product, layer.down, layer.down_bias)
            normed, x = functional.add_rms_norm(delta, x, width, layer.next_norm, eps)
        self.length += 1
        if self._positions is not None:
            self._positions = self._positions + 1
        return functional.linear(normed, self.model.lm_head.weight)

    def reorder(self, indices: Tensor) -> None:
        """Replaces sequence i by sequence ``indices[i]``, one of the same prompt."""
        cache = self.past_key_values
        cache.reorder(indices, self._prompt_length)
        if len(indices) != self._stacked.shape[2]:
            self._stack()

    @property
    def past_key_values(self) -> KVCache:
        """The cache, without a limit to what may still be added."""
        self._cache.max_length = None
        self._cache.lengths = [self.length] * len(self._cache)
        return self._cache

    def _stack(self) -> None:
        """Moves the cache into one tensor ``(layers, 2, B, H, max_length, D)``, of which its buffers are then views."""
        cache = self._cache
        pairs = list(zip(cache.keys, cache.values, strict=True))
        first = pairs[0][0]
        assert first is not None
        batch, heads, _, head_dim = first.shape
        self._stacked = first.new_empty(len(pairs), 2, batch, heads, self.max_length, head_dim)
        for whole, pair in zip(self._stacked, pairs, strict=True):
            for part, buffer in zip(whole, pair, strict=True):
                part[:, :, : self.length] = buffer[:, :, : self.length]
        cache.keys, cache.values = (list(self._stacked[:, i].unbind(0)) for i in (0, 1))


class _Kernels(NamedTuple):
    rotary: ModuleType
    activation: ModuleType


def _kernels() -> _Kernels:
    # Here, so that a machine without the kernels can import this.
    from ..backends.cpu import activation, rotary

    return _Kernels(rotary, activation)
