"""What models return: dataclasses with the field names of ``transformers``, readable by name, key, index or slice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cache import EncoderDecoderCache, KVCache


class ModelOutput:
    """``output.logits``, ``output["logits"]`` or ``output[0]``: fields that are None have no key and no index."""

    def keys(self) -> tuple[str, ...]:
        """Names of the fields that are not None, in order."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)  # type: ignore[arg-type]

    def values(self) -> tuple[Any, ...]:
        """Values of the fields that are not None, in order."""
        return tuple(getattr(self, name) for name in self.keys())

    def items(self) -> tuple[tuple[str, Any], ...]:
        """(name, value) of the fields that are not None, in order."""
        return tuple(zip(self.keys(), self.values(), strict=True))

    to_tuple = values

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.values()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


# What every field holds:
#   loss                scalar, where labels were given
#   logits              (B, S, V), (B, S, num_labels) or (B, num_labels)
#   last_hidden_state   (B, S, E)
#   pooler_output       (B, E)
#   past_key_values     the cache, for a decoder
#   hidden_states       the input of every block and the last output, (B, S, E) each, where they were asked for
#   attentions          every block's weights, (B, H, Sq, Sk) each, where they were asked for


@dataclass
class BaseModelOutput(ModelOutput):
    """What an encoder returns."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """What BERT's body returns."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BaseModelOutputWithPast(ModelOutput):
    """What a decoder returns."""

    last_hidden_state: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BaseModelOutputWithPastAndCrossAttentions(BaseModelOutputWithPast):
    """What a decoder that also attends to an encoder returns."""

    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutputWithPast(ModelOutput):
    """What a decoder with a language-model head returns."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class MaskedLMOutput(ModelOutput):
    """What an encoder with a language-model head returns."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutput(MaskedLMOutput):
    """Logits per text, ``(B, num_labels)``."""


@dataclass
class SequenceClassifierOutputWithPast(CausalLMOutputWithPast):
    """The same from a decoder."""


@dataclass
class TokenClassifierOutput(MaskedLMOutput):
    """Logits per token, ``(B, S, num_labels)``."""


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """Logits of where an answer begins and ends, ``(B, S)`` each."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class Seq2SeqModelOutput(ModelOutput):
    """What an encoder and a decoder return together."""

    last_hidden_state: Tensor | None = None
    past_key_values: EncoderDecoderCache | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None


@dataclass
class Seq2SeqLMOutput(ModelOutput):
    """The same with a language-model head."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: EncoderDecoderCache | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None


def _exportable(base: type) -> None:
    for cls in base.__subclasses__():
        torch.export.register_dataclass(cls, serialized_type_name=f"{cls.__module__}.{cls.__name__}")
        _exportable(cls)


_exportable(ModelOutput)  # torch.export has to know what a model returns
