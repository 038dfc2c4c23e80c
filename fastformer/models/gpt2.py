"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), as in ``transformers``.

Per layer, pre-norm:  x += proj(attention(ln_1(x)));  x += fc2(gelu(fc1(ln_2(x)))). Parameter names, shapes (the
"Conv1D" layout (in, out)), arguments and outputs are those of ``transformers``, so checkpoints pass both ways.

Blocks hand on (residual stream, not yet added output) instead of their sum: addition, dropout and the next layer norm
are then one kernel, across block boundaries too. Attention reads the packed c_attn output in place and its backward
writes one packed gradient; bias and GELU of the feed-forward are one pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import nn as torch_nn
from typing_extensions import Unpack

from .. import functional, nn
from ..functional.attention import MAX_HEAD_DIM
from ..nn.norm import add_norm, add_residual
from ..nn.submodules import is_plain
from .activations import check_activation
from .blocks import attend, attend_packed, feed_forward
from .cache import KVCache
from .conv1d import Conv1D
from .gpt2_decoder import FusedDecoder, fused_decoder
from .inputs import (
    PackedArguments,
    PackedTexts,
    check_embeds,
    check_indices,
    one_of,
    packed_texts,
    padding_mask,
)
from .labels import LabelledDecoderConfig
from .losses import causal_lm_loss, head_loss, next_tokens
from .outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from .pretrained import PreTrainedModel

HEADS = (r"^lm_head\.", r"^score\.", r"^classifier\.")
"""What the classes with a head have beside ``transformer``."""


@dataclass
class GPT2Config(LabelledDecoderConfig):
    """The fields, defaults and config.json of ``transformers.GPT2Config``; other entries are kept in ``extra``.

    ``n_inner=None`` is 4 * n_embd. ``reorder_and_upcast_attn`` needs no code: attention always accumulates in float32.
    """

    model_type: ClassVar[str] = "gpt2"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {value!r} is not a positive integer")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head: {self.n_head} does not divide n_embd {self.n_embd}")
        if self.n_inner is not None and self.n_inner < 1:
            raise ValueError(f"n_inner: {self.n_inner} is not positive")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not in [0, 1]")
        check_activation("activation_function", self.activation_function)
        if self.add_cross_attention:
            raise ValueError("add_cross_attention: cross-attention is not available in this GPT-2")
        self._name_labels()

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions

    @property
    def num_attention_heads(self) -> int:
        return self.n_head

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layer

    @property
    def intermediate_size(self) -> int:
        """Width of the feed-forward's hidden layer."""
        return self.n_inner or 4 * self.n_embd


class GPT2Attention(torch_nn.Module):
    """Causal self-attention between the projections c_attn and c_proj."""

    def __init__(self, config: GPT2Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.dropout_p = config.attn_pdrop
        self.scale = 1 / math.sqrt(self.head_dim) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_idx + 1
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(
        self,
        x: Tensor,
        cache: KVCache | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        texts: PackedTexts | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x ``(B, S, E)``, key_padding_mask ``(B, cached + S)`` bool, True = ignored -> ``(B, S, E)``, and with
        ``need_weights`` the attention weights ``(B, H, S, cached + S)``. ``texts`` are those of a packed row."""
        qkv = self.c_attn(x).view(x.shape[0], x.shape[1], 3, self.num_heads, self.head_dim)
        options: dict[str, Any] = {"scale": self.scale, "key_padding_mask": key_padding_mask}
        options["dropout_p"] = self.dropout_p if self.training else 0.0
        if texts is not None:
            out = attend_packed(*qkv.unbind(2), texts, causal=True, scale=self.scale, dropout_p=options["dropout_p"])
            return self.c_proj(out.flatten(2)), None
        if cache is None and not need_weights and self.head_dim <= MAX_HEAD_DIM:
            out = functional.attention_qkvpacked(qkv, causal=True, **options)
            return self.c_proj(out.flatten(2)), None
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        out, weights = attend(q, k, v, causal=True, need_weights=need_weights, **options)
        return self.c_proj(out.transpose(1, 2).flatten(2)), weights


class GPT2MLP(torch_nn.Module):
    """The feed-forward block, c_proj(activation(c_fc(x)))."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.intermediate_size, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.intermediate_size)
        self.activation = config.activation_function

    def forward(self, x: Tensor) -> Tensor:
        """x ``(B, S, E)`` -> ``(B, S, E)``."""
        return feed_forward(x, self.c_fc, self.c_proj, self.activation)


class GPT2Block(torch_nn.Module):
    """One layer. Takes and returns the residual stream and a sublayer's output that is still to be added to it."""

    def __init__(self, config: GPT2Config, layer_idx: int) -> None:
        super().__init__()
        self.dropout_p = config.resid_pdrop
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(
        self,
        residual: Tensor,
        delta: Tensor | None,
        cache: KVCache | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        texts: PackedTexts | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """residual, delta ``(B, S, E)`` (delta None in the first layer) -> the same pair for the next layer, and the
        attention weights if they are wanted."""
        dropout_p = self.dropout_p if self.training else 0.0
        normed, residual = add_norm(self.ln_1, delta, residual, dropout_p)
        delta, weights = self.attn(normed, cache, key_padding_mask, need_weights, texts)
        normed, residual = add_norm(self.ln_2, delta, residual, dropout_p)
        return residual, self.mlp(normed), weights


class GPT2PreTrainedModel(PreTrainedModel):
    """Initialisation and checkpoint conventions of all GPT-2 classes."""

    config_class = GPT2Config
    base_model_prefix = "transformer"
    # Old checkpoints carry the causal mask of every layer; a head that the class has is loaded all the same.
    ignored_keys = (r"(^|\.)attn\.(bias|masked_bias)$", *HEADS)
    head_keys = HEADS

    def init_module(self, name: str, module: torch_nn.Module) -> None:
        """Normal(0, initializer_range), zero biases; projections onto the residual stream by 1 / sqrt(2 n_layer) less.

        GPT-2 paper, section 2.3: it keeps the variance of the residual stream independent of the depth.
        """
        std = self.config.initializer_range
        if isinstance(module, torch_nn.Embedding | torch_nn.Linear):
            module.weight.normal_(0.0, std)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
        elif isinstance(module, Conv1D):
            onto_residual = name.endswith("c_proj")
            module.weight.normal_(0.0, std / math.sqrt(2 * self.config.n_layer) if onto_residual else std)
            module.bias.zero_()
        else:
            super().init_module(name, module)


class GPT2Model(GPT2PreTrainedModel):
    """The decoder without a head.

    Parameters: ``wte.weight (vocab_size, n_embd)``, ``wpe.weight (n_positions, n_embd)``, ``h.<i>.ln_1``,
    ``.attn.c_attn``, ``.attn.c_proj``, ``.ln_2``, ``.mlp.c_fc``, ``.mlp.c_proj``, and ``ln_f``.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.wte = torch_nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = torch_nn.Embedding(config.n_positions, config.n_embd)
        self.drop = torch_nn.Dropout(config.embd_pdrop)
        self.h = torch_nn.ModuleList(GPT2Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.init_weights()

    def get_input_embeddings(self) -> torch_nn.Embedding:
        return self.wte

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **packed: Unpack[PackedArguments],
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Runs the decoder.

        Args:
            input_ids: ``(B, S)`` int64, in [0, vocab_size).
            past_key_values: cache of the tokens before these; the new ones are added to it.
            attention_mask: ``(B, past + S)``, 0 where a token is padding (on either side), else 1. Outputs at padding
                are finite and of no meaning.
            token_type_ids: ``(B, S)``, their token embeddings are added.
            position_ids: ``(B, S)`` or ``(1, S)``; default past .. past + S - 1, for padded batches too.
            inputs_embeds: ``(B, S, n_embd)`` instead of input_ids.
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
        hidden = self._embed(input_ids, inputs_embeds, token_type_ids, position_ids, past)
        batch, length = hidden.shape[:2]
        key_padding_mask = padding_mask(attention_mask, batch, past + length, hidden.device)
        cache = past_key_values
        texts = packed_texts(
            packed,
            batch,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )
        if use_cache is None and texts is None:
            use_cache = self.config.use_cache and (cache is not None or not torch.is_grad_enabled())
        if cache is None and use_cache:
            cache = KVCache(self.config.n_layer)

        delta: Tensor | None = None
        dropout_p = self.config.resid_pdrop if self.training else 0.0
        states: list[Tensor] = []
        attentions: list[Tensor | None] = []
        for block in self.h:
            if output_hidden_states:  # wants the sum that the next norm would form
                hidden, delta = add_residual(delta, hidden, dropout_p), None
                states.append(hidden)
            hidden, delta, weights = block(hidden, delta, cache, key_padding_mask, bool(output_attentions), texts)
            attentions.append(weights)
        hidden = add_norm(self.ln_f, delta, hidden, dropout_p)[0]
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache if use_cache else None,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        past: int,
    ) -> Tensor:
        one_of(input_ids=input_ids, inputs_embeds=inputs_embeds)
        if input_ids is not None:
            check_indices("input_ids", input_ids, self.config.vocab_size)
            hidden = self.wte(input_ids)
        else:
            assert inputs_embeds is not None
            check_embeds("inputs_embeds", inputs_embeds, self.config.n_embd)
            hidden = inputs_embeds
        batch, length, _ = hidden.shape
        if position_ids is None:
            if past + length > self.config.n_positions:
                raise ValueError(
                    f"input_ids: {past + length} positions, the model has {self.config.n_positions} (n_positions)"
                )
            if is_plain(self.wpe, torch_nn.Embedding):
                hidden = hidden + self.wpe.weight[past : past + length]
            else:
                hidden = hidden + self.wpe(torch.arange(past, past + length, device=hidden.device))
        else:
            if position_ids.dim() == 1:
                position_ids = position_ids[None]
            check_indices("position_ids", position_ids, self.config.n_positions)
            if position_ids.shape not in ((batch, length), (1, length)):
                raise ValueError(f"position_ids: shape {tuple(position_ids.shape)} is not {(batch, length)}")
            hidden = hidden + self.wpe(position_ids)
        if token_type_ids is not None:
            check_indices("token_type_ids", token_type_ids, self.config.vocab_size)
            if token_type_ids.shape != (batch, length):
                raise ValueError(f"token_type_ids: shape {tuple(token_type_ids.shape)} is not {(batch, length)}")
            hidden = hidden + self.wte(token_type_ids)
        return self.drop(hidden)


class GPT2LMHeadModel(GPT2PreTrainedModel):
    """:class:`GPT2Model` as ``transformer``, and ``lm_head`` onto the vocabulary, tied to the token embedding."""

    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.tie_weights()
        else:
            self.init_weights("lm_head")

    def get_input_embeddings(self) -> torch_nn.Embedding:
        return self.transformer.wte

    def get_output_embeddings(self) -> torch_nn.Linear:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
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
            logits_to_keep: compute logits for the last so many positions only; 0 = all.
            num_items_in_batch: divide the summed loss by this instead of the number of labels counted, so that the
                gradients accumulated over several batches are those of one large batch.
            skip_logits: with labels, return the loss without the logits, which are then never held as a whole.
            The rest: as in :meth:`GPT2Model.forward`.

        Returns:
            ``loss`` (float32, float64 for a float64 model), ``logits (B, S, vocab_size)``, ``past_key_values``,
            ``hidden_states``, ``attentions``.
        """
        scored = labels is not None or shift_labels is not None
        if scored and logits_to_keep:
            raise ValueError("logits_to_keep: the loss needs all logits; do not give labels as well")
        if use_cache is None and scored and past_key_values is None:
            use_cache = False
        output = self.transformer(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **packed,
        )
        hidden = output.last_hidden_state
        logits, loss = None, None
        if skip_logits and scored:
            loss = head_loss(hidden, self.lm_head, next_tokens(labels, shift_labels), num_items_in_batch)
        else:
            logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
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
        return fused_decoder(self, batch_size, max_length)
