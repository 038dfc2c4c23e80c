"""T5 (Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
arXiv:1910.10683), 1.0 and 1.1 (Flan-T5), as in ``transformers``: parameter names, arguments and outputs are the same.

    encoder output = encoder(embedding(input_ids));   hidden = decoder(embedding(decoder_input_ids), encoder output)
    logits = lm_head(hidden * d_model**-0.5)          1.1: without that factor, and with an embedding of its own

Positions enter only as biases of attention scores (t5_layers.py), so a text may be longer than any seen in training.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import nn as torch_nn

from .. import nn
from .cache import EncoderDecoderCache
from .losses import head_loss, token_loss
from .outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from .t5_stack import T5Config, T5PreTrainedModel, T5Stack

__all__ = ["T5Config", "T5EncoderModel", "T5ForConditionalGeneration", "T5Model", "T5PreTrainedModel", "T5Stack"]


class T5Model(T5PreTrainedModel):
    """Encoder and decoder without a head.

    Parameters: ``shared.weight (vocab_size, d_model)``, which is also the ``embed_tokens.weight`` of ``encoder`` and
    ``decoder``; in each of these ``block.<i>.layer.<j>`` with ``layer_norm`` and one of ``SelfAttention``,
    ``EncDecAttention`` (``q``, ``k``, ``v``, ``o``) and ``DenseReluDense`` (``wi`` or ``wi_0``, ``wi_1``; ``wo``), the
    first block's ``SelfAttention.relative_attention_bias.weight (buckets, heads)``, and ``final_layer_norm``.
    """

    tied_weights: ClassVar[dict[str, str]] = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }
    ignored_keys = (*T5PreTrainedModel.ignored_keys, r"^lm_head\.")

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config, self.shared, is_decoder=False)
        self.decoder = T5Stack(config, self.shared, is_decoder=True)
        self.init_weights()

    def get_input_embeddings(self) -> torch_nn.Module:
        return self.shared

    def set_input_embeddings(self, embeddings: torch_nn.Module) -> None:
        self.shared = embeddings
        self.encoder.set_input_embeddings(embeddings)
        self.decoder.set_input_embeddings(embeddings)

    def get_encoder(self) -> T5Stack:
        return self.encoder

    def get_decoder(self) -> T5Stack:
        return self.decoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqModelOutput | tuple[Any, ...]:
        """Runs the encoder, unless its output is given, and the decoder.

        Args:
            input_ids: ``(B, T)`` int64, in [0, vocab_size).
            attention_mask: ``(B, T)``, 0 where a token of the input is padding (on either side), else 1. Outputs at
                padding are finite and of no meaning.
            decoder_input_ids: ``(B, S)`` int64, in [0, vocab_size).
            decoder_attention_mask: ``(B, past + S)``, the same for the decoder's tokens.
            encoder_outputs: the encoder's output object or tuple, from before; ``input_ids`` are then not read.
            past_key_values: cache of the decoder's tokens before these, and of the encoder's keys and values; the new
                ones are added to it.
            inputs_embeds, decoder_inputs_embeds: ``(B, T, d_model)`` and ``(B, S, d_model)`` instead of ids.
            use_cache: return a cache. Default: the configuration's, while no gradients are recorded.
            output_attentions: also return every block's attention weights, ``decoder_attentions (B, H, S, past + S)``,
                ``cross_attentions (B, H, S, T)``, ``encoder_attentions (B, H, T, T)``, at the price of computing them.
            output_hidden_states: also return the embeddings and every block's output, the last one normalised, as
                ``encoder_hidden_states`` and ``decoder_hidden_states``.
            return_dict: False returns a tuple of the fields that are not None.

        Raises:
            ValueError, TypeError: an argument that does not fit, naming it.
        """
        wanted = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        if encoder_outputs is None:
            encoded = self.encoder(input_ids, attention_mask, inputs_embeds=inputs_embeds, **wanted)
        else:
            encoded = _as_output(encoder_outputs)
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError("decoder_input_ids: give either decoder_input_ids or decoder_inputs_embeds")
        decoded = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            encoded.last_hidden_state,
            attention_mask,
            decoder_inputs_embeds,
            past_key_values,
            use_cache,
            **wanted,
        )
        output = Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )
        return output.to_tuple() if return_dict is False else output


class T5ForConditionalGeneration(T5Model):
    """:class:`T5Model` and ``lm_head`` onto the vocabulary, tied to the token embedding in T5 1.0."""

    tied_weights: ClassVar[dict[str, str]] = {**T5Model.tied_weights, "lm_head.weight": "shared.weight"}
    ignored_keys = T5PreTrainedModel.ignored_keys
    head_keys = (r"^lm_head\.",)

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.tie_weights()
        else:
            self.init_weights("lm_head")

    def get_output_embeddings(self) -> torch_nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool = False,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """Logits at each of the decoder's positions, and the loss if ``labels`` are given.

        Args:
            labels: ``(B, S)`` int64, position by position; -100 is not counted. Without decoder inputs the decoder
                reads them shifted to the right, from ``decoder_start_token_id``.
            logits_to_keep: compute logits for the last so many positions only; 0 = all.
            num_items_in_batch: divide the summed loss by this instead of the number of labels counted, so that the
                gradients accumulated over several batches are those of one large batch.
            skip_logits: with labels, return the loss without the logits, which are then never held as a whole.
            The rest: as in :meth:`T5Model.forward`.

        Returns:
            ``loss`` (float32, float64 for a float64 model), ``logits (B, S, vocab_size)`` and the other fields of
            :class:`T5Model`'s output.
        """
        if labels is not None:
            if logits_to_keep:
                raise ValueError("logits_to_keep: the loss needs all logits; do not give labels as well")
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self._shift_right(labels)
            if use_cache is None and past_key_values is None:
                use_cache = False
        output = super().forward(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
            use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        assert isinstance(output, Seq2SeqModelOutput)
        hidden = output.last_hidden_state
        assert hidden is not None
        if logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        if self.config.scale_decoder_outputs:
            hidden = hidden * self.config.d_model**-0.5
        logits, loss = None, None
        if skip_logits and labels is not None:
            loss = head_loss(hidden, self.lm_head, labels, num_items_in_batch)
        else:
            logits = self.lm_head(hidden)
            loss = None if labels is None else token_loss(logits, labels, num_items_in_batch)
        result = Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            decoder_hidden_states=output.decoder_hidden_states,
            decoder_attentions=output.decoder_attentions,
            cross_attentions=output.cross_attentions,
            encoder_last_hidden_state=output.encoder_last_hidden_state,
            encoder_hidden_states=output.encoder_hidden_states,
            encoder_attentions=output.encoder_attentions,
        )
        return result.to_tuple() if return_dict is False else result

    def _shift_right(self, labels: Tensor) -> Tensor:
        """The decoder's input for ``labels``: the start token, then all but the last; padding for -100."""
        for name in ("decoder_start_token_id", "pad_token_id"):
            if getattr(self.config, name) is None:
                raise ValueError(f"{name}: the configuration needs one to make decoder_input_ids of labels")
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            raise ValueError(f"labels: shape {tuple(getattr(labels, 'shape', ()))} is not (B, S)")
        shifted = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=self.config.decoder_start_token_id)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """``(B, S)`` labels -> the decoder's input, as ``forward`` makes it."""
        return self._shift_right(labels)


class T5EncoderModel(T5PreTrainedModel):
    """The encoder alone."""

    tied_weights: ClassVar[dict[str, str]] = {"encoder.embed_tokens.weight": "shared.weight"}
    ignored_keys = (r"^decoder\.", r"^lm_head\.")

    def __init__(self, config: T5Config) -> None:
        super().__init__(replace(config, is_encoder_decoder=False, use_cache=False))
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(self.config, self.shared, is_decoder=False)
        self.init_weights()

    def get_input_embeddings(self) -> torch_nn.Module:
        return self.shared

    def set_input_embeddings(self, embeddings: torch_nn.Module) -> None:
        self.shared = embeddings
        self.encoder.set_input_embeddings(embeddings)

    def get_encoder(self) -> T5Stack:
        return self.encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """input_ids ``(B, T)`` -> ``last_hidden_state (B, T, d_model)``; arguments as in :meth:`T5Model.forward`."""
        return self.encoder(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


def _as_output(encoder_outputs: Any) -> Any:
    """An encoder's output, given as an object with its fields or as a tuple."""
    if isinstance(encoder_outputs, tuple | list) and encoder_outputs:
        encoder_outputs = BaseModelOutput(*encoder_outputs[:3])
    if not isinstance(getattr(encoder_outputs, "last_hidden_state", None), Tensor):
        raise TypeError(f"encoder_outputs: expected an encoder's output or tuple, got {type(encoder_outputs).__name__}")
    return encoder_outputs
