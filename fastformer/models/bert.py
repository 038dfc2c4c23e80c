"""BERT (Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers"), as in ``transformers``.

Per layer, post-norm:  x = norm(x + dense(attention(x)));  x = norm(x + fc2(gelu(fc1(x)))). Module and parameter names,
arguments and outputs are those of ``transformers``, so checkpoints pass both ways.

The embeddings (words, positions and segments, summed, normalised, dropped out) are one pass. Query, key and value are
three layers that lie next to each other in memory: one matmul, whose output attention reads in place and whose gradient
it writes in one piece. A sublayer's dropout, residual and norm are one kernel, the feed-forward's bias and GELU one
pass. The classes with a head are in bert_heads.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import nn as torch_nn
from typing_extensions import Unpack

from .. import functional, nn
from ..functional.attention import MAX_HEAD_DIM
from ..nn._joined import JoinedLayers
from ..nn.norm import add_norm
from ..nn.submodules import is_plain, pending_dropout
from .activations import check_activation
from .blocks import activate, attend, attend_packed, feed_forward
from .inputs import (
    PackedArguments,
    PackedTexts,
    check_embeds,
    check_indices,
    one_of,
    packed_texts,
    padding_mask,
)
from .labels import LabelledConfig
from .outputs import BaseModelOutput, BaseModelOutputWithPooling
from .pretrained import PreTrainedModel


@dataclass
class BertConfig(LabelledConfig):
    """The fields, defaults and config.json of ``transformers.BertConfig``; other entries are kept in ``extra``.

    ``classifier_dropout=None`` is hidden_dropout_prob.
    """

    model_type: ClassVar[str] = "bert"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    use_cache: bool = True
    classifier_dropout: float | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
            *("max_position_embeddings", "type_vocab_size"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {value!r} is not a positive integer")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} does not divide hidden_size {self.hidden_size}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if not (value is None and name == "classifier_dropout") and not 0 <= value <= 1:
                raise ValueError(f"{name}: {value} is not in [0, 1]")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id: {self.pad_token_id} is not in [0, {self.vocab_size})")
        check_activation("hidden_act", self.hidden_act)
        for name in ("is_decoder", "add_cross_attention"):
            if getattr(self, name):
                raise ValueError(f"{name}: this BERT is an encoder")
        kind = self.extra.get("position_embedding_type", "absolute")
        if kind != "absolute":
            raise ValueError(f"position_embedding_type: {kind!r} is not available, only 'absolute'")
        self._name_labels()


class BertEmbeddings(torch_nn.Module):
    """dropout(LayerNorm(word + position + segment))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.width = width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = torch_nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Arguments as in :meth:`BertModel.forward` -> ``(B, S, E)``."""
        words, positions, types = self.word_embeddings, self.position_embeddings, self.token_type_embeddings
        self._check(input_ids, token_type_ids, position_ids, inputs_embeds)
        dropout_in_kernel = is_plain(self.dropout, torch_nn.Dropout)
        if (
            input_ids is not None
            and all(_is_lookup(table) for table in (words, positions, types))
            and positions.padding_idx is types.padding_idx is None
            and is_plain(self.LayerNorm, nn.LayerNorm)
        ):
            hidden = functional.transformer_embedding(
                input_ids,
                words.weight,
                positions.weight,
                types.weight,
                position_ids=position_ids,
                token_type_ids=token_type_ids,
                padding_idx=words.padding_idx,
                norm_weight=self.LayerNorm.weight,
                norm_bias=self.LayerNorm.bias,
                norm_eps=self.LayerNorm.eps,
                dropout_p=self.dropout.p if dropout_in_kernel else 0.0,
                training=self.dropout.training,
            )
            return hidden if dropout_in_kernel else self.dropout(hidden)
        hidden = words(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids)
        return self.dropout(self.LayerNorm(hidden + types(token_type_ids) + positions(position_ids)))

    def _check(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> None:
        one_of(input_ids=input_ids, inputs_embeds=inputs_embeds)
        if input_ids is not None:
            check_indices("input_ids", input_ids, _rows(self.word_embeddings))
            batch, length = input_ids.shape
        else:
            assert inputs_embeds is not None
            check_embeds("inputs_embeds", inputs_embeds, self.width)
            batch, length, _ = inputs_embeds.shape
        available = _rows(self.position_embeddings)
        if position_ids is None and length > available:
            given = "inputs_embeds" if input_ids is None else "input_ids"
            raise ValueError(f"{given}: {length} positions, the model has {available} (max_position_embeddings)")
        for name, ids, table in (
            ("position_ids", position_ids, self.position_embeddings),
            ("token_type_ids", token_type_ids, self.token_type_embeddings),
        ):
            if ids is not None:
                check_indices(name, ids, _rows(table))
                if ids.shape not in ((batch, length), (1, length)):
                    raise ValueError(f"{name}: shape {tuple(ids.shape)} is not {(batch, length)}")


def _is_lookup(table: torch_nn.Module) -> bool:
    """Whether ``table`` does nothing but look rows up."""
    if not is_plain(table, nn.Embedding, torch_nn.Embedding):
        return False
    assert isinstance(table, torch_nn.Embedding)
    return table.max_norm is None and not table.scale_grad_by_freq and not table.sparse


def _rows(table: torch_nn.Module) -> int:
    """Rows of an embedding; what replaces one checks for itself."""
    return table.num_embeddings if isinstance(table, torch_nn.Embedding) else sys.maxsize


class BertSelfAttention(JoinedLayers):
    """Self-attention of the projections query, key and value."""

    joined_layers = ("query", "key", "value")

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = width // self.num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dropout = torch_nn.Dropout(config.attention_probs_dropout_prob)
        self.join()

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        texts: PackedTexts | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x ``(B, S, E)``, key_padding_mask ``(B, S)`` bool, True = ignored -> ``(B, S, E)``, and with
        ``need_weights`` the attention weights ``(B, H, S, S)``. ``texts`` are those of a packed row."""
        heads = (self.num_heads, self.head_dim)
        dropout_p = self.dropout.p if self.training else 0.0
        options: dict[str, Any] = {"key_padding_mask": key_padding_mask, "dropout_p": dropout_p}
        qkv = self.joined_output(x) if not need_weights and self.head_dim <= MAX_HEAD_DIM else None
        if qkv is not None and texts is None:
            return functional.attention_qkvpacked(qkv.unflatten(2, (3, *heads)), **options).flatten(2), None
        parts = (self.query, self.key, self.value)
        q, k, v = (p(x).unflatten(2, heads) for p in parts) if qkv is None else qkv.unflatten(2, (3, *heads)).unbind(2)
        if texts is not None:
            return attend_packed(q, k, v, texts, scale=self.head_dim**-0.5, dropout_p=dropout_p).flatten(2), None
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, weights = attend(q, k, v, scale=self.head_dim**-0.5, need_weights=need_weights, **options)
        return out.transpose(1, 2).flatten(2), weights


class BertOutput(torch_nn.Module):
    """The end of both sublayers: LayerNorm(residual + dropout(dense(x)))."""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = torch_nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x ``(B, S, in_features)``, residual ``(B, S, E)`` -> ``(B, S, E)``."""
        return self.add_norm(self.dense(x), residual)

    def add_norm(self, delta: Tensor, residual: Tensor) -> Tensor:
        """The same of what ``dense`` gave."""
        delta, dropout_p = pending_dropout(self.dropout, delta)
        return add_norm(self.LayerNorm, delta, residual, dropout_p)[0]


class BertAttention(torch_nn.Module):
    """The first sublayer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config.hidden_size, config)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        texts: PackedTexts | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`BertSelfAttention.forward`."""
        attended, weights = self.self(x, key_padding_mask, need_weights, texts)
        return self.output(attended, x), weights


class BertIntermediate(torch_nn.Module):
    """The first half of the feed-forward, activation(dense(x))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = config.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        """x ``(B, S, E)`` -> ``(B, S, intermediate_size)``."""
        return activate(self.dense(x), self.activation)


class BertLayer(torch_nn.Module):
    """One layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config.intermediate_size, config)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        attentions: list[Tensor] | None = None,
        texts: PackedTexts | None = None,
    ) -> Tensor:
        """x ``(B, S, E)`` -> ``(B, S, E)``; the attention weights are appended to ``attentions``, if it is given."""
        x, weights = self.attention(x, key_padding_mask, attentions is not None, texts)
        if attentions is not None:
            attentions.append(weights)
        first, last = self.intermediate, self.output
        if is_plain(first, BertIntermediate) and is_plain(last, BertOutput):
            return last.add_norm(self.feed_forward(x), x)
        return last(first(x), x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """x ``(B, S, E)`` -> what is added to it before the norm."""
        return feed_forward(x, self.intermediate.dense, self.output.dense, self.intermediate.activation)


class BertEncoder(torch_nn.Module):
    """The layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = torch_nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        texts: PackedTexts | None = None,
    ) -> BaseModelOutput:
        """x ``(B, S, E)``, key_padding_mask ``(B, S)`` bool, True = ignored; ``texts`` are those of a packed row."""
        states, attentions = [x], [] if output_attentions else None
        for layer in self.layer:
            x = layer(x, key_padding_mask, attentions, texts)
            states.append(x)
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=None if attentions is None else tuple(attentions),
        )


class BertPooler(torch_nn.Module):
    """tanh(dense(the first token's output))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = torch_nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        """x ``(B, S, E)`` -> ``(B, E)``."""
        return self.activation(self.dense(x[:, 0]))


HEADS = (r"^classifier\.", r"^qa_outputs\.")  # of the classes in bert_heads.py


class BertPreTrainedModel(PreTrainedModel):
    """Initialisation and checkpoint conventions of all BERT classes."""

    config_class = BertConfig
    base_model_prefix = "bert"
    # TensorFlow's names, in checkpoints converted from it.
    renamed_keys = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
    # Old checkpoints carry these constants; a pooler or head that the class has is loaded all the same.
    ignored_keys = (r"(^|\.)embeddings\.(position|token_type)_ids$", r"(^|\.)pooler\.", r"^cls\.", *HEADS)
    head_keys = (r"(^|\.)pooler\.", r"^cls\.", *HEADS)

    def init_module(self, name: str, module: torch_nn.Module) -> None:
        """Normal(0, initializer_range), zero biases, a zero row for padding."""
        if isinstance(module, torch_nn.Embedding | torch_nn.Linear):
            module.weight.normal_(0.0, self.config.initializer_range)
            if isinstance(module, torch_nn.Linear):
                module.bias.zero_()
            elif module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        else:
            super().init_module(name, module)


class BertModel(BertPreTrainedModel):
    """The encoder without a head.

    Parameters: ``embeddings.{word,position,token_type}_embeddings.weight``, ``embeddings.LayerNorm``,
    ``encoder.layer.<i>.attention.self.{query,key,value}``, ``.attention.output.{dense,LayerNorm}``,
    ``.intermediate.dense``, ``.output.{dense,LayerNorm}``, and ``pooler.dense``.

    Args:
        config: the configuration.
        add_pooling_layer: False leaves the pooler out; ``pooler_output`` is then None.
    """

    init_arguments = ("add_pooling_layer",)

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.init_weights()

    def get_input_embeddings(self) -> torch_nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, embeddings: torch_nn.Embedding) -> None:
        self.embeddings.word_embeddings = embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **packed: Unpack[PackedArguments],
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Runs the encoder.

        Args:
            input_ids: ``(B, S)`` int64, in [0, vocab_size).
            attention_mask: ``(B, S)``, 0 where a token is padding (on either side), else 1. Outputs at padding attend
                to the real tokens, as in ``transformers``.
            token_type_ids: ``(B, S)`` or ``(1, S)``, the segment of each token; default 0.
            position_ids: ``(B, S)`` or ``(1, S)``; default 0 .. S - 1, for padded batches too.
            inputs_embeds: ``(B, S, hidden_size)`` instead of input_ids.
            output_attentions: also return every layer's attention weights, ``(B, H, S, S)``, at the price of computing
                them.
            output_hidden_states: also return the embeddings and every layer's output.
            return_dict: False returns a tuple of the fields that are not None.
            packed: the texts of one row that do not see each other, :class:`.inputs.PackedArguments`; position_ids
                that begin anew with each are the caller's to give.

        Raises:
            ValueError, TypeError: an argument that does not fit, naming it.
        """
        hidden = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        key_padding_mask = padding_mask(attention_mask, hidden.shape[0], hidden.shape[1], hidden.device)
        texts = packed_texts(
            packed, hidden.shape[0], attention_mask=attention_mask, output_attentions=output_attentions
        )
        encoded = self.encoder(hidden, key_padding_mask, bool(output_attentions), bool(output_hidden_states), texts)
        output = BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=None if self.pooler is None else self.pooler(encoded.last_hidden_state),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return output.to_tuple() if return_dict is False else output
