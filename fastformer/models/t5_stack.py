"""T5's configuration and its two stacks, encoder and decoder; the layers are in t5_layers.py, the models in t5.py.

A stack has one table of relative position biases, in its first block; every block's attention kernel reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import nn as torch_nn

from .. import nn
from ..functional.attention import RelativeBias, check_buckets
from ..nn.norm import add_residual
from ..nn.submodules import is_plain
from .activations import check_activation
from .cache import EncoderDecoderCache
from .inputs import check_embeds, check_indices, one_of, padding_mask
from .outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from .pretrained import PreTrainedConfig, PreTrainedModel
from .t5_layers import Stream, T5Block, T5LayerNorm


@dataclass
class T5Config(PreTrainedConfig):
    """The fields, defaults and config.json of ``transformers.T5Config``; other entries are kept in ``extra``.

    ``feed_forward_proj`` is an activation's name, "gated-" before it for the gated form; ``dense_act_fn`` and
    ``is_gated_act`` are read from it unless given ("gated-gelu" is the tanh approximation). ``scale_decoder_outputs``
    multiplies the logits by d_model**-0.5; None does so where the output embedding is tied (T5 1.0).
    """

    model_type: ClassVar[str] = "t5"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    dense_act_fn: str | None = None
    is_gated_act: bool | None = None
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None
    is_encoder_decoder: bool = True
    is_decoder: bool = False
    use_cache: bool = True
    classifier_dropout: float = 0.0
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {value!r} is not a positive integer")
        for both_ways in (True, False):  # the encoder's and the decoder's
            buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
            check_buckets("relative_attention_num_buckets:", both_ways, buckets, distance)
        if not 0 <= self.dropout_rate <= 1:
            raise ValueError(f"dropout_rate: {self.dropout_rate} is not in [0, 1]")
        gate, _, activation = self.feed_forward_proj.rpartition("-")
        if gate not in ("", "gated"):
            raise ValueError(f"feed_forward_proj: {self.feed_forward_proj!r} is not an activation or 'gated-' and one")
        if self.is_gated_act is None:
            self.is_gated_act = gate == "gated"
        if self.dense_act_fn is None:
            self.dense_act_fn = "gelu_new" if self.feed_forward_proj == "gated-gelu" else activation
        check_activation("feed_forward_proj", self.dense_act_fn)
        if self.scale_decoder_outputs is None:
            self.scale_decoder_outputs = self.tie_word_embeddings

    @property
    def hidden_size(self) -> int:
        return self.d_model

    @property
    def num_attention_heads(self) -> int:
        return self.num_heads

    @property
    def num_hidden_layers(self) -> int:
        return self.num_layers

    @property
    def head_dim(self) -> int:
        return self.d_kv


class T5PreTrainedModel(PreTrainedModel):
    """Initialisation and checkpoint conventions of all T5 classes."""

    config_class = T5Config
    base_model_prefix = "transformer"
    # Old checkpoints carry a table that cross-attention never read.
    ignored_keys = (r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",)
    float32_keys = (r"\.wo\.weight$",)

    def ties(self) -> dict[str, str]:
        """The stacks' token embeddings are always the shared one; the configuration says whether lm_head is."""
        tied = self.config.tie_word_embeddings
        return {key: partner for key, partner in self.tied_weights.items() if tied or key != "lm_head.weight"}

    def init_module(self, name: str, module: torch_nn.Module) -> None:
        """Normal around 0. The deviations keep activations near 1, q's unscaled scores too (as in Mesh TensorFlow)."""
        c = self.config
        last = name.rpartition(".")[2]
        deviation = {
            "shared": 1.0,
            "embed_tokens": 1.0,
            "lm_head": 1.0,
            "q": (c.d_model * c.d_kv) ** -0.5,
            "o": (c.num_heads * c.d_kv) ** -0.5,
            "wo": c.d_ff**-0.5,
        }.get(last, c.d_model**-0.5)
        if isinstance(module, T5LayerNorm):
            module.weight.fill_(c.initializer_factor)
        elif module._parameters:
            module.weight.normal_(0.0, c.initializer_factor * deviation)


class T5Stack(T5PreTrainedModel):
    """The encoder or the decoder: token embedding, blocks, final norm.

    Args:
        config: of the whole model.
        shared: the token embedding, whose weight this one is.
        is_decoder: causal, with attention to an encoder's output.
    """

    def __init__(self, config: T5Config, shared: nn.Embedding, is_decoder: bool) -> None:
        layers = config.num_decoder_layers if is_decoder else config.num_layers
        super().__init__(
            replace(config, is_decoder=is_decoder, num_layers=layers, use_cache=config.use_cache and is_decoder)
        )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model, _weight=shared.weight)
        self.embed_tokens.weight = shared.weight
        self.block = torch_nn.ModuleList(T5Block(self.config, i == 0, i) for i in range(self.config.num_layers))
        self.final_layer_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = torch_nn.Dropout(config.dropout_rate)

    def get_input_embeddings(self) -> torch_nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, embeddings: torch_nn.Module) -> None:
        self.embed_tokens = embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | BaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]:
        """Runs the stack.

        Args:
            input_ids: ``(B, S)`` int64, in [0, vocab_size).
            attention_mask: ``(B, past + S)``, 0 where a token is padding (on either side), else 1.
            encoder_hidden_states: ``(B, T, d_model)``, for a decoder; without it there is no cross-attention.
            encoder_attention_mask: ``(B, T)``, as ``attention_mask``.
            inputs_embeds: ``(B, S, d_model)`` instead of input_ids.
            past_key_values: of a decoder, the cache of the tokens before these; the new ones are added to it.
            use_cache: of a decoder: return a cache. Default: the configuration's, while no gradients are recorded.
            output_attentions: also return every block's attention weights, at the price of computing them.
            output_hidden_states: also return the embeddings and every block's output, the last one normalised.
            return_dict: False returns a tuple of the fields that are not None.

        Raises:
            ValueError, TypeError: an argument that does not fit, naming it.
        """
        cache = self._cache(past_key_values, use_cache)
        past = 0 if cache is None else cache.get_seq_length()
        hidden = self._embed(input_ids, inputs_embeds)
        batch, length, device = hidden.shape[0], hidden.shape[1], hidden.device
        key_padding_mask = padding_mask(attention_mask, batch, past + length, device)
        states, states_padding_mask = encoder_hidden_states, None
        if states is not None:
            check_embeds("encoder_hidden_states", states, self.config.d_model)
            if states.shape[0] != batch:
                raise ValueError(f"encoder_hidden_states: batch {states.shape[0]} is not the decoder's {batch}")
            states_padding_mask = padding_mask(
                encoder_attention_mask, batch, states.shape[1], device, "encoder_attention_mask"
            )
        position = self._position(length, past)

        stream = Stream(self.dropout(hidden))
        all_states: list[Tensor] = []
        attentions: list[Tensor | None] = []
        cross_attentions: list[Tensor | None] = []
        for block in self.block:
            if output_hidden_states:  # wants the sum that the next norm would form
                stream = Stream(add_residual(stream.delta, stream.residual, stream.dropout_p))
                all_states.append(stream.residual)
            stream, weights, cross = block(
                stream,
                position,
                key_padding_mask,
                states,
                states_padding_mask,
                cache,
                bool(output_attentions),
            )
            attentions.append(weights)
            cross_attentions.append(cross)
        hidden = self.dropout(stream.normed(self.final_layer_norm)[0])
        fields: dict[str, Any] = {
            "last_hidden_state": hidden,
            "hidden_states": (*all_states, hidden) if output_hidden_states else None,
            "attentions": tuple(attentions) if output_attentions else None,
        }
        output: BaseModelOutput | BaseModelOutputWithPastAndCrossAttentions
        if self.config.is_decoder:
            crossed = tuple(cross_attentions) if output_attentions and states is not None else None
            output = BaseModelOutputWithPastAndCrossAttentions(
                **fields, past_key_values=cache, cross_attentions=crossed
            )
        else:
            output = BaseModelOutput(**fields)
        return output.to_tuple() if return_dict is False else output

    def _cache(self, cache: EncoderDecoderCache | None, use_cache: bool | None) -> EncoderDecoderCache | None:
        if not self.config.is_decoder:
            if use_cache or cache is not None:
                raise ValueError("use_cache: an encoder has no cache")
            return None
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise TypeError(f"past_key_values: expected an EncoderDecoderCache, got {type(cache).__name__}")
        if cache is None and (
            self.config.use_cache and not torch.is_grad_enabled() if use_cache is None else use_cache
        ):
            return EncoderDecoderCache.with_layers(self.config.num_layers)
        return cache

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        one_of(input_ids=input_ids, inputs_embeds=inputs_embeds)
        if input_ids is not None:
            check_indices("input_ids", input_ids, self.config.vocab_size)
            hidden: Tensor = self.embed_tokens(input_ids)
        else:
            assert inputs_embeds is not None
            check_embeds("inputs_embeds", inputs_embeds, self.config.d_model)
            hidden = inputs_embeds
        return hidden.float() if hidden.dtype == torch.float16 else hidden

    def _position(self, length: int, past: int) -> RelativeBias | Tensor:
        """What self-attention adds to the scores: the table of the first block, for the kernel to read."""
        table = self.block[0].layer[0].SelfAttention.relative_attention_bias
        if is_plain(table, nn.RelativePositionBias):
            return table.relative_bias
        return table(length, past + length, past)
