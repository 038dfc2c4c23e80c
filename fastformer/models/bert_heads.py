"""BERT with a head: masked words (tied to the word embeddings), one label per text, one label per token, a span."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import nn as torch_nn
from typing_extensions import Unpack

from .. import nn
from .bert import BertConfig, BertModel, BertPreTrainedModel
from .blocks import activate
from .inputs import PackedArguments
from .losses import head_loss, scored_rows, sequence_loss, span_loss, token_loss
from .outputs import MaskedLMOutput, QuestionAnsweringModelOutput, SequenceClassifierOutput, TokenClassifierOutput


class BertPredictionHeadTransform(torch_nn.Module):
    """LayerNorm(activation(dense(x)))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = config.hidden_act
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """x ``(B, S, E)`` -> the same shape."""
        return self.LayerNorm(activate(self.dense(x), self.activation))


class BertLMPredictionHead(torch_nn.Module):
    """decoder(transform(x)); ``bias`` is the decoder's, under its old name."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = torch_nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """x ``(B, S, E)`` -> ``(B, S, vocab_size)``."""
        return self.decoder(self.transform(x))


class BertOnlyMLMHead(torch_nn.Module):
    """What gives the head's parameters the prefix ``predictions``."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`BertLMPredictionHead.forward`."""
        return self.predictions(x)


class BertWithHead(BertPreTrainedModel):
    """What the classes below share: :class:`BertModel` as ``bert``."""

    bert: BertModel

    def get_input_embeddings(self) -> torch_nn.Embedding:
        return self.bert.get_input_embeddings()

    def set_input_embeddings(self, embeddings: torch_nn.Embedding) -> None:
        self.bert.set_input_embeddings(embeddings)


class BertForMaskedLM(BertWithHead):
    """:class:`BertModel` without a pooler, and ``cls`` onto the vocabulary.

    The decoder's weight is the word embedding and its bias ``cls.predictions.bias`` (unless
    ``tie_word_embeddings=False``).
    """

    tied_weights: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        if config.tie_word_embeddings:
            self.tie_weights()
            self.init_weights("cls.predictions.transform")
        else:
            self.init_weights("cls")

    def init_module(self, name: str, module: torch_nn.Module) -> None:
        """The prediction head's own bias is zero, the rest as in :class:`BertModel`."""
        if isinstance(module, BertLMPredictionHead):
            module.bias.zero_()
        else:
            super().init_module(name, module)

    def get_output_embeddings(self) -> torch_nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, embeddings: torch_nn.Linear) -> None:
        self.cls.predictions.decoder = embeddings
        self.cls.predictions.bias = embeddings.bias

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool = False,
        **packed: Unpack[PackedArguments],
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Logits of every position's word, and the loss if ``labels`` are given.

        Args:
            labels: ``(B, S)`` int64: the words to find where input_ids has [MASK]; -100, elsewhere, is not counted.
            skip_logits: with labels, return the loss without the logits, which are then never held as a whole.
            The rest: as in :meth:`BertModel.forward`.

        Returns:
            ``loss`` (float32, float64 for a float64 model), ``logits (B, S, vocab_size)``, ``hidden_states``,
            ``attentions``.
        """
        output = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **packed,
        )
        logits, loss = None, None
        if skip_logits and labels is not None:
            # Few positions are scored: the others need not pass through the head's own layer either.
            rows, target = scored_rows(output.last_hidden_state, labels)
            loss = head_loss(self.cls.predictions.transform(rows), self.cls.predictions.decoder, target)
        else:
            logits = self.cls(output.last_hidden_state)
            loss = None if labels is None else token_loss(logits, labels)
        result = MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result.to_tuple() if return_dict is False else result


class BertClassifier(BertWithHead):
    """What the two classifiers share: dropout and ``classifier`` over the encoder."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer)
        given = config.classifier_dropout
        self.dropout = torch_nn.Dropout(config.hidden_dropout_prob if given is None else given)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights("classifier")


class BertForSequenceClassification(BertClassifier):
    """:class:`BertModel`, and ``classifier`` from the pooled output to ``num_labels`` numbers per text."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Logits of the text's labels, and the loss if ``labels`` are given.

        Args:
            labels: ``(B)`` or ``(B, num_labels)``. What they are, the configuration's ``problem_type`` says; where that
                is None, it follows from num_labels and their dtype, as in :func:`.losses.sequence_loss`.
            The rest: as in :meth:`BertModel.forward`.

        Returns:
            ``loss`` (float32, float64 for a float64 model), ``logits (B, num_labels)``, ``hidden_states``,
            ``attentions``.
        """
        output = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.classifier(self.dropout(output.pooler_output))
        result = SequenceClassifierOutput(
            loss=None if labels is None else sequence_loss(logits, labels, self.config.problem_type),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result.to_tuple() if return_dict is False else result


class BertForTokenClassification(BertClassifier):
    """:class:`BertModel` without a pooler, and ``classifier`` from each output to ``num_labels`` numbers per token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **packed: Unpack[PackedArguments],
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Logits of every token's labels, and the loss if ``labels`` are given.

        Args:
            labels: ``(B, S)`` int64 in [0, num_labels); -100 is not counted.
            The rest: as in :meth:`BertModel.forward`.

        Returns:
            ``loss`` (float32, float64 for a float64 model), ``logits (B, S, num_labels)``, ``hidden_states``,
            ``attentions``.
        """
        output = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **packed,
        )
        logits = self.classifier(self.dropout(output.last_hidden_state))
        result = TokenClassifierOutput(
            loss=None if labels is None else token_loss(logits, labels),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result.to_tuple() if return_dict is False else result


class BertForQuestionAnswering(BertWithHead):
    """:class:`BertModel` without a pooler, and ``qa_outputs`` from each output to two numbers: how much speaks for an
    answer that begins there, and for one that ends there (Devlin et al. 2018, arXiv:1810.04805, §4.2)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(f"num_labels: {config.num_labels}, and an answer has two ends; expected 2")
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.init_weights("qa_outputs")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Logits of where the answer begins and ends, and the loss if both positions are given.

        Args:
            start_positions, end_positions: ``(B)`` int64: the first and the last token of the answer; S or more where
                it is not in the text, which is not counted.
            The rest: as in :meth:`BertModel.forward`.

        Returns:
            ``loss`` (float32, float64 for a float64 model), ``start_logits``, ``end_logits (B, S)``,
            ``hidden_states``, ``attentions``.
        """
        output = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        start_logits, end_logits = self.qa_outputs(output.last_hidden_state).unbind(-1)
        given = start_positions is not None and end_positions is not None
        result = QuestionAnsweringModelOutput(
            loss=span_loss(start_logits, end_logits, start_positions, end_positions) if given else None,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result.to_tuple() if return_dict is False else result
