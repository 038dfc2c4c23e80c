"""Llama (Touvron et al. 2023, arXiv:2302.13971 and 2307.09288; Llama 3, arXiv:2407.21783), as in ``transformers``.

Per layer, pre-norm:  x += o(attention(rotate(q, k), v));  x += down(silu(gate(norm(x))) * up(norm(x))), with norms that
divide by the root mean square alone, fewer key and value heads than query heads, and positions that turn queries and
keys. Parameter names, shapes, arguments and outputs are those of ``transformers``, so checkpoints pass both ways.

Blocks hand on (residual stream, not yet added output) instead of their sum: addition and the next norm are then one
kernel, across block boundaries too. Cosines and sines are looked up once for all layers; attention reads each key and
value head for its whole group of query heads, never repeated in memory.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import nn as torch_nn
from typing_extensions import Unpack

from .. import functional, nn
from ..nn._joined import JoinedLayers
from ..nn.norm import add_norm, add_residual
from .activations import FUSED_ACTIVATIONS
from .blocks import attend, attend_packed
from .cache import KVCache
from .inputs import (
    PackedArguments,
    PackedTexts,
    check_embeds,
    check_indices,
    one_of,
    packed_mask,
    packed_texts,
    padding_mask,
)
from .llama_config import LlamaConfig
from .llama_decoder import FusedDecoder, fused_decoder
from .losses import causal_lm_loss, head_loss, next_tokens
from .outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from .pretrained import PreTrainedModel

HEADS = (r"^lm_head\.", r"^score\.")
"""What the classes with a head have beside ``model``."""
MAX_POSITION = 1 << 24
"""From here on float32, in which angles are computed, skips whole numbers."""


class LlamaRotaryEmbedding(nn.RotaryEmbedding):
    """The cosines and sines of a batch of tokens, for all layers.

    Angles are float32's whatever the model's dtype, as in ``transformers``: a checkpoint was trained with them.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(
            config.head_dim,
            config.rope_parameters["rope_theta"],
            max_position_embeddings=config.max_position_embeddings,
            scaling=config.rotary_scaling,
        )

    def forward(self, x: Tensor, position_ids: Tensor | None = None, past: int = 0) -> tuple[Tensor, Tensor]:
        """x ``(B, S, E)``, position_ids ``(B | 1, S)``, else from ``past`` on -> cos, sin ``(B | 1, S, D / 2)``
        in float32, float64 for a float64 x."""
        length = x.shape[1]
        if position_ids is None:
            cos, sin = (t[None, past : past + length] for t in self.tables(past + length, x.device, torch.float32))
        else:
            cos, sin = self.rows(position_ids, torch.float32)
        return (cos.double(), sin.double()) if x.dtype == torch.float64 else (cos, sin)


class LlamaAttention(JoinedLayers):
    """Causal self-attention with rotary positions and grouped heads."""

    joined_layers = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.dropout_p = config.attention_dropout or 0.0
        self.scale = 1 / math.sqrt(self.head_dim)
        width, bias = config.hidden_size, config.attention_bias
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        queries, keys, _ = (n * self.head_dim for n in self.heads)
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, width, bias=bias)
        self.join()

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        need_weights: bool = False,
        texts: PackedTexts | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x ``(B, S, E)``, cos, sin ``(B | 1, S, D / 2)``, key_padding_mask ``(B, cached + S)`` bool, True = ignored,
        attn_mask ``(B | 1, 1, S, S)`` bool, True = may look -> ``(B, S, E)``, and with ``need_weights`` the attention
        weights ``(B, H, S, cached + S)``. ``texts`` are those of a packed row."""
        shape = (*x.shape[:2], -1, self.head_dim)
        whole = self.joined_output(x)
        if whole is not None:
            q, k, v = (t.transpose(1, 2) for t in whole.view(shape).split(self.heads, 2))
        else:
            q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        # A layer's own output may have been kept by a hook.
        q, k = functional.rotary_embedding(q, k, cos, sin, inplace=whole is not None and not whole.requires_grad)
        dropout_p = self.dropout_p if self.training else 0.0
        if texts is not None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = attend_packed(q, k, v, texts, causal=True, scale=self.scale, dropout_p=dropout_p)
            return self.o_proj(out.flatten(2)), None
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        out, weights = attend(
            q,
            k,
            v,
            causal=True,
            scale=self.scale,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            need_weights=need_weights,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), weights


class LlamaDecoderLayer(torch_nn.Module):
    """One layer. Takes and returns the residual stream and a sublayer's output that is still to be added to it."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = nn.GatedFeedForward(
            config.hidden_size,
            config.intermediate_size,
            FUSED_ACTIVATIONS[config.hidden_act],
            bias=config.mlp_bias,
        )
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        residual: Tensor,
        delta: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        need_weights: bool = False,
        texts: PackedTexts | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """residual, delta ``(B, S, E)`` (delta None in the first layer) -> the same pair for the next layer, and the
        attention weights if they are wanted."""
        normed, residual = add_norm(self.input_layernorm, delta, residual, 0.0)
        delta, weights = self.self_attn(normed, cos, sin, cache, key_padding_mask, attn_mask, need_weights, texts)
        normed, residual = add_norm(self.post_attention_layernorm, delta, residual, 0.0)
        return residual, self.mlp(normed), weights


class LlamaPreTrainedModel(PreTrainedModel):
    """Initialisation and checkpoint conventions of all Llama classes."""

    config_class = LlamaConfig
    base_model_prefix = "model"
    # Old checkpoints carry every layer's frequencies; a head that the class has is loaded all the same.
    ignored_keys = (r"(^|\.)rotary_emb\.inv_freq$", *HEADS)
    head_keys = HEADS

    def init_module(self, name: str, module: torch_nn.Module) -> None:
        """Normal(0, initializer_range); zero biases, and zero for the padding token."""
        if isinstance(module, torch_nn.Embedding | torch_nn.Linear):
            module.weight.normal_(0.0, self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
            if getattr(module, "padding_idx", None) is not None:
                module.weight[module.padding_idx].zero_()
        else:
            super().init_module(name, module)


class LlamaModel(LlamaPreTrainedModel):
    """The decoder without a head.

    Parameters: ``embed_tokens.weight (vocab_size, hidden_size)``, ``layers.<i>.self_attn.{q,k,v,o}_proj``,
    ``.mlp.{gate,up,down}_proj``, ``.input_layernorm``, ``.post_attention_layernorm``, and ``norm``.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = torch_nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.init_weights()

    def get_input_embeddings(self) -> torch_nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: torch_nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **packed: Unpack[PackedArguments],
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Runs the decoder.

        Args:
            input_ids: ``(B, S)`` int64, in [0, vocab_size).
            attention_mask: ``(B, past + S)``, 0 where a token is padding (on either side), else 1. Outputs at padding
                are finite and of no meaning.
            position_ids: ``(B, S)`` or ``(1, S)``; default past .. past + S - 1, for padded batches too. Where they do
                not go up by one, a new text begins, which does not see those before it: if there is no attention_mask,
                and no cache by ``use_cache=False`` or the configuration, as in ``transformers``.
            past_key_values: cache of the tokens before these; the new ones are added to it.
            inputs_embeds: ``(B, S, hidden_size)`` instead of input_ids.
            use_cache: return a cache. Default: the configuration's, while no gradients are recorded.
            output_attentions: also return every layer's attention weights, ``(B, H, S, past + S)``, at the price of
                computing them.
            output_hidden_states: also return the embeddings and every layer's output, the last one normalised.
            return_dict: False returns a tuple of the fields that are not None.
            packed: the texts of one row that do not see each other, :class:`.inputs.PackedArguments`; position_ids
                that begin anew with each are the caller's to give.

        Raises:
            ValueError, TypeError: an argument that does not fit, naming it.
        """
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        hidden = self._embed(input_ids, inputs_embeds)
        batch, length = hidden.shape[:2]
        key_padding_mask = padding_mask(attention_mask, batch, past + length, hidden.device)
        position_ids = _positions(position_ids, batch, length)
        cache = past_key_values
        texts = packed_texts(
            packed,
            batch,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )
        caches = texts is None and (self.config.use_cache if use_cache is None else use_cache)
        packs = texts is None and position_ids is not None and attention_mask is None and cache is None and not caches
        masks = (key_padding_mask, packed_mask(position_ids) if packs else None)
        if use_cache is None:
            use_cache = caches and (cache is not None or not torch.is_grad_enabled())
        if cache is None and use_cache:
            cache = KVCache(self.config.num_hidden_layers)

        cos, sin = self.rotary_emb(hidden, position_ids, past)
        delta: Tensor | None = None
        states: list[Tensor] = []
        attentions: list[Tensor | None] = []
        for layer in self.layers:
            if output_hidden_states:  # wants the sum that the next norm would form
                hidden, delta = add_residual(delta, hidden, 0.0), None
                states.append(hidden)
            hidden, delta, weights = layer(hidden, delta, cos, sin, cache, *masks, bool(output_attentions), texts)
            attentions.append(weights)
        hidden = add_norm(self.norm, delta, hidden, 0.0)[0]
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache if use_cache else None,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        one_of(input_ids=input_ids, inputs_embeds=inputs_embeds)
        if input_ids is not None:
            check_indices("input_ids", input_ids, self.config.vocab_size)
            return self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        check_embeds("inputs_embeds", inputs_embeds, self.config.hidden_size)
        return inputs_embeds


def _positions(position_ids: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Checked, ``(B, S)`` or ``(1, S)``."""
    if position_ids is None:
        return None
    if position_ids.dim() == 1:
        position_ids = position_ids[None]
    check_indices("position_ids", position_ids, MAX_POSITION)
    if position_ids.shape not in ((batch, length), (1, length)):
        raise ValueError(f"position_ids: shape {tuple(position_ids.shape)} is not {(batch, length)}")
    return position_ids


class LlamaForCausalLM(LlamaPreTrainedModel):
    """:class:`LlamaModel` as ``model``, and ``lm_head`` onto the vocabulary."""

    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.tie_weights()
        else:
            self.init_weights("lm_head")

    def get_input_embeddings(self) -> torch_nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: torch_nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> torch_nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: torch_nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        skip_logits: bool = False,
        **packed: Unpack[PackedArguments],
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits for the token after each position, and the loss if ``labels`` are given.

        Args:
            labels: ``(B, S)`` int64, usually the input_ids: shifted inside, so position i is scored on label i + 1.
                -100 is not counted.
            shift_labels: ``(B, S)`` int64 instead of labels: position i is scored on entry i.
            logits_to_keep: compute logits for the last so many positions only, or for the positions in a tensor;
                0 = all.
            num_items_in_batch: divide the summed loss by this instead of the number of labels counted, so that the
                gradients accumulated over several batches are those of one large batch.
            skip_logits: with labels, return the loss without the logits, which are then never held as a whole.
            The rest: as in :meth:`LlamaModel.forward`.

        Returns:
            ``loss`` (float32, float64 for a float64 model), ``logits (B, S, vocab_size)``, ``past_key_values``,
            ``hidden_states``, ``attentions``.
        """
        chosen = isinstance(logits_to_keep, Tensor)
        scored = labels is not None or shift_labels is not None
        if scored and (chosen or logits_to_keep):
            raise ValueError("logits_to_keep: the loss needs all logits; do not give labels as well")
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **packed,
        )
        hidden = output.last_hidden_state
        if chosen or logits_to_keep:
            hidden = hidden[:, logits_to_keep if chosen else slice(-logits_to_keep, None)]
        logits, loss = None, None
        if skip_logits and scored:
            loss = head_loss(hidden, self.lm_head, next_tokens(labels, shift_labels), num_items_in_batch)
        else:
            logits = self.lm_head(hidden)
            loss = causal_lm_loss(logits, labels, shift_labels, num_items_in_batch)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result.to_tuple() if return_dict is False else result

    def decoder(self, batch_size: int, max_length: int) -> FusedDecoder | None:
        """The fused decoder that ``generate`` uses, or None where only the layers themselves will do."""
        return fused_decoder(self, max_length)
