"""GPT-2 and Llama with a head: labels, or a number such as a reward, for a text, and labels for each of its tokens.

A decoder has read the whole text only at its last token, so that is where ``score`` looks. Padding may lie on either
side: the last token is the rightmost that is not ``config.pad_token_id``, as in ``transformers``. Only those rows of
the body's output meet the head. Of texts packed into one row (``cu_seq_lens_q``) each has its own last token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import nn as torch_nn
from typing_extensions import Unpack

from .. import nn
from ..functional._doors import through_operator
from .cache import KVCache
from .gpt2 import GPT2Config, GPT2Model, GPT2PreTrainedModel
from .inputs import PackedArguments
from .llama import LlamaModel, LlamaPreTrainedModel
from .llama_config import LlamaConfig
from .losses import sequence_loss, token_loss
from .outputs import BaseModelOutputWithPast, SequenceClassifierOutputWithPast, TokenClassifierOutput

# ---- what the families share -----------------------------------------------------------------------------------------


def check_ends(
    pad_token_id: int | None, input_ids: Tensor | None, inputs_embeds: Tensor | None, packed: PackedArguments
) -> None:
    """Raises ValueError where it cannot be told which token of each text is the last one."""
    starts = packed.get("cu_seq_lens_q")
    if starts is not None:
        # A GPU would be waited for, and a tracer has no values.
        if starts.device.type == "cpu" and not through_operator(starts) and bool((starts.diff() < 1).any()):
            raise ValueError("cu_seq_lens_q: a text without tokens has no last one to be scored at")
        return
    given = inputs_embeds if input_ids is None else input_ids
    if pad_token_id is None and given is not None and given.dim() > 1 and given.shape[0] > 1:
        raise ValueError(
            f"pad_token_id: the configuration has none, so where each of {given.shape[0]} texts ends cannot be told; "
            "set config.pad_token_id to the token that they are padded with, or give one text at a time"
        )


def last_hidden(
    hidden: Tensor,
    pad_token_id: int | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    packed: PackedArguments,
) -> Tensor:
    """The outputs at the last token of each text.

    Args:
        hidden: ``(B, S, E)``.
        pad_token_id: None for a single text without padding.
        input_ids: ``(B, S)``; without them ``attention_mask (B, past + S)`` says where the padding is, if it is there.
        packed: texts in one row.

    Returns:
        ``(B, E)``; ``(texts, E)`` for packed texts. A text of nothing but padding has its first position's.
    """
    starts = packed.get("cu_seq_lens_q")
    if starts is not None:
        return hidden[0, starts[1:].long() - 1]
    if pad_token_id is None or (input_ids is None and attention_mask is None):
        return hidden[:, -1]
    length = hidden.shape[1]
    real = attention_mask[:, -length:] != 0 if input_ids is None else input_ids != pad_token_id  # type: ignore[index]
    last = (real * torch.arange(length, device=real.device)).amax(1)
    return hidden[torch.arange(len(last), device=last.device), last]


def sequence_output(
    model: Any,
    output: BaseModelOutputWithPast,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    return_dict: bool | None,
    packed: PackedArguments,
) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
    """``model.score`` of each text's last output, and the loss where there are ``labels``."""
    assert output.last_hidden_state is not None
    pad_token_id = model.config.pad_token_id
    logits = model.score(last_hidden(output.last_hidden_state, pad_token_id, input_ids, attention_mask, packed))
    result = SequenceClassifierOutputWithPast(
        loss=None if labels is None else sequence_loss(logits, labels, model.config.problem_type),
        logits=logits,
        past_key_values=output.past_key_values,
        hidden_states=output.hidden_states,
        attentions=output.attentions,
    )
    return result.to_tuple() if return_dict is False else result


def token_output(
    head: torch_nn.Module,
    dropout: torch_nn.Module,
    output: BaseModelOutputWithPast,
    labels: Tensor | None,
    return_dict: bool | None,
) -> TokenClassifierOutput | tuple[Any, ...]:
    """``head`` of every output, and the loss where there are ``labels``."""
    logits = head(dropout(output.last_hidden_state))
    result = TokenClassifierOutput(
        loss=None if labels is None else token_loss(logits, labels),
        logits=logits,
        hidden_states=output.hidden_states,
        attentions=output.attentions,
    )
    return result.to_tuple() if return_dict is False else result


def caches(use_cache: bool | None, past_key_values: KVCache | None) -> bool:
    """Nothing follows on a text that is classified, so a cache is made only where it is asked for."""
    return past_key_values is not None if use_cache is None else use_cache


# ---- GPT-2 -----------------------------------------------------------------------------------------------------------


class GPT2WithHead(GPT2PreTrainedModel):
    """What GPT-2's classifiers share: :class:`GPT2Model` as ``transformer``."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.transformer = GPT2Model(config)

    def get_input_embeddings(self) -> torch_nn.Embedding:
        return self.transformer.wte


class GPT2ForSequenceClassification(GPT2WithHead):
    """:class:`GPT2Model`, and ``score`` from a text's last output to ``num_labels`` numbers, without a bias."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)
        self.init_weights("score")

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **packed: Unpack[PackedArguments],
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Logits of the text's labels, and the loss if ``labels`` are given.

        Args:
            input_ids: ``(B, S)`` int64; config.pad_token_id is padding, which several texts in a batch need to have.
            attention_mask: ``(B, past + S)``, 0 at padding. With inputs_embeds it also says where each text ends.
            labels: ``(B)`` or ``(B, num_labels)``. What they are, the configuration's ``problem_type`` says; where that
                is None, it follows from num_labels and their dtype, as in :func:`.losses.sequence_loss`.
            use_cache: default False, unless past_key_values are given.
            packed: texts in one row; logits and labels are then one for each of them.
            The rest: as in :meth:`GPT2Model.forward`.

        Returns:
            ``loss`` (float32, float64 for a float64 model), ``logits (B, num_labels)``, ``past_key_values``,
            ``hidden_states``, ``attentions``.

        Raises:
            ValueError, TypeError: an argument that does not fit, or no ``pad_token_id`` for several texts; named.
        """
        check_ends(self.config.pad_token_id, input_ids, inputs_embeds, packed)
        output = self.transformer(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            use_cache=caches(use_cache, past_key_values),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **packed,
        )
        return sequence_output(self, output, input_ids, attention_mask, labels, return_dict, packed)


class GPT2ForTokenClassification(GPT2WithHead):
    """:class:`GPT2Model`, and dropout and ``classifier`` from each output to ``num_labels`` numbers per token."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.dropout = torch_nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.n_embd, self.num_labels)
        self.init_weights("classifier")

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **packed: Unpack[PackedArguments],
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Logits of every token's labels, and the loss if ``labels`` are given.

        A token is seen beside those before it only.

        Args:
            labels: ``(B, S)`` int64 in [0, num_labels); -100 is not counted.
            use_cache: default False, unless past_key_values are given.
            The rest: as in :meth:`GPT2Model.forward`.

        Returns:
            ``loss`` (float32, float64 for a float64 model), ``logits (B, S, num_labels)``, ``hidden_states``,
            ``attentions``.
        """
        output = self.transformer(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            use_cache=caches(use_cache, past_key_values),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **packed,
        )
        return token_output(self.classifier, self.dropout, output, labels, return_dict)


# ---- Llama -----------------------------------------------------------------------------------------------------------


class LlamaWithHead(LlamaPreTrainedModel):
    """What Llama's classifiers share: :class:`LlamaModel` as ``model``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.model = LlamaModel(config)

    def get_input_embeddings(self) -> torch_nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: torch_nn.Module) -> None:
        self.model.embed_tokens = value


class LlamaForSequenceClassification(LlamaWithHead):
    """:class:`LlamaModel`, and ``score`` from a text's last output to ``num_labels`` numbers, without a bias."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.init_weights("score")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **packed: Unpack[PackedArguments],
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Logits of the text's labels, and the loss if ``labels`` are given.

        Arguments, results and errors as in :meth:`GPT2ForSequenceClassification.forward`; the rest as in
        :meth:`LlamaModel.forward`.
        """
        check_ends(self.config.pad_token_id, input_ids, inputs_embeds, packed)
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            caches(use_cache, past_key_values),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **packed,
        )
        return sequence_output(self, output, input_ids, attention_mask, labels, return_dict, packed)


class LlamaForTokenClassification(LlamaWithHead):
    """:class:`LlamaModel`, and dropout and ``score`` from each output to ``num_labels`` numbers per token."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.dropout = torch_nn.Dropout(config.head_dropout)
        bias = config.extra.get("token_classification_bias", True)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=bias)
        self.init_weights("score")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **packed: Unpack[PackedArguments],
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Logits of every token's labels, and the loss if ``labels`` are given.

        Arguments, results and errors as in :meth:`GPT2ForTokenClassification.forward`; the rest as in
        :meth:`LlamaModel.forward`.
        """
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            caches(use_cache, past_key_values),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **packed,
        )
        return token_output(self.score, self.dropout, output, labels, return_dict)
