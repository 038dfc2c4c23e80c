"""What generation asks of a model: logits for the token after a prompt, then after each further token.

A model with a kernel of its own for this offers ``model.decoder(batch_size, max_length)``, which returns a
:class:`Decoder` or None; every other model is driven through its ``forward``. A prompt that is to be continued several
times is computed once: its keys and values are then repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ..models.cache import EncoderDecoderCache, KVCache
from ..models.outputs import BaseModelOutput


class Decoder(Protocol):
    """One generation in progress, for a fixed batch."""

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, repeats: int = 1) -> Tensor:
        """Starts over with prompts ``(B, S)``, mask ``(B, S)`` 0 at left padding or None, each to be continued
        ``repeats`` times; logits ``(B * repeats, V)``."""
        ...

    def step(self, token_ids: Tensor) -> Tensor:
        """Appends one token to each sequence, ``(B * repeats)``; logits ``(B * repeats, V)`` for the next."""
        ...

    def reorder(self, indices: Tensor) -> None:
        """Replaces sequence i by sequence ``indices[i]``, one of the same prompt. For beam search."""
        ...


@dataclass
class Encoded:
    """The encoder's side: its last hidden state ``(B, S, E)``, and the mask ``(B, S)`` of its input or None."""

    hidden: Tensor
    attention_mask: Tensor | None

    def repeated(self, repeats: int) -> Encoded:
        return Encoded(_repeated(self.hidden, repeats), _repeated(self.attention_mask, repeats))


def decoder_for(
    model: Any,
    batch_size: int,
    max_length: int,
    use_cache: bool = True,
    cache: Any = None,
    encoded: Encoded | None = None,
) -> Decoder:
    """The fastest decoder for ``model``: its own, else one with a cache; without ``use_cache`` the recomputing one.

    Args:
        batch_size: sequences in the end, repeats included.
        max_length: tokens of each at most.
        cache: keys and values of the first tokens of the prompts, to go on from.
        encoded: what the decoder of an encoder-decoder model attends to.
    """
    if not use_cache:
        return RecomputingDecoder(model, max_length, encoded)
    if cache is None and encoded is None:
        own = getattr(model, "decoder", None)
        decoder = own(batch_size, max_length) if own is not None and not isinstance(own, nn.Module) else None
        if decoder is not None:
            return decoder
    return CachedDecoder(model, max_length, cache, encoded)


def encode(model: Any, input_ids: Tensor | None, attention_mask: Tensor | None, outputs: Any = None) -> Encoded:
    """Runs the encoder of an encoder-decoder model, once for the whole generation, unless its ``outputs`` are given."""
    if outputs is None:
        outputs = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
    return Encoded(outputs[0], attention_mask)


def _forward(
    model: Any, encoded: Encoded | None, input_ids: Tensor, mask: Tensor | None, positions: Tensor | None, **rest: Any
) -> Tensor:
    """Logits ``(B, V)`` for the token after ``input_ids (B, S)``, which are the decoder's if there is an encoder."""
    if encoded is None:
        output = model(input_ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, **rest)
    else:
        output = model(
            attention_mask=encoded.attention_mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden),
            decoder_input_ids=input_ids,
            decoder_attention_mask=mask,
            **rest,
        )
    return output.logits[:, -1]


def _new_cache(model: Any, max_length: int, with_encoder: bool) -> KVCache | EncoderDecoderCache:
    layers = getattr(model.config, "num_decoder_layers", None) or model.config.num_hidden_layers
    return EncoderDecoderCache.with_layers(layers, max_length) if with_encoder else KVCache(layers, max_length)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Each token's position in its own text: ``(B, S)`` mask of 0 and 1 -> ``(B, S)``, 0 at padding."""
    return (attention_mask.cumsum(1) - 1).clamp_(min=0)


def _extended(mask: Tensor | None, length: int) -> Tensor | None:
    """``mask`` with ones up to ``length`` columns, written once for all steps."""
    if mask is None:
        return None
    whole = mask.new_ones(len(mask), length)
    whole[:, : mask.shape[1]] = mask
    return whole


def _repeated(tensor: Tensor | None, repeats: int) -> Tensor | None:
    return tensor if tensor is None or repeats == 1 else tensor.repeat_interleave(repeats, 0)


class CachedDecoder:
    """Runs ``model.forward`` on the new token only, with a cache of ``max_length`` positions allocated once."""

    def __init__(self, model: Any, max_length: int, cache: Any = None, encoded: Encoded | None = None) -> None:
        self.model = model
        self.max_length = max_length
        self.encoded = encoded
        self.given = cache
        self.mask: Tensor | None = None  # (B, max_length), ones beyond the prompt
        self.next_position: Tensor | None = None  # (B, 1)

    @property
    def past_key_values(self) -> Any:
        """The cache, without a limit to what may still be added."""
        getattr(self.cache, "self_attention_cache", self.cache).max_length = None
        return self.cache

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, repeats: int = 1) -> Tensor:
        self.cache = self.given
        if self.cache is None:
            self.cache = _new_cache(self.model, self.max_length, self.encoded is not None)
        past = self.cache.get_seq_length()
        self.prompt_length = input_ids.shape[1]
        self.mask = _extended(attention_mask, self.max_length)
        self.next_position = positions = None
        if attention_mask is not None:
            positions = position_ids(attention_mask)
            self.next_position = _repeated(positions[:, -1:] + 1, repeats)
            positions = positions[:, past:]
        logits = self._run(input_ids[:, past:], positions)
        self.mask = _repeated(self.mask, repeats)
        self.cache.repeat(repeats)
        if self.encoded is not None:
            self.encoded = self.encoded.repeated(repeats)
        return _repeated(logits, repeats)

    def step(self, token_ids: Tensor) -> Tensor:
        positions = self.next_position
        if positions is not None:
            self.next_position = positions + 1
        return self._run(token_ids[:, None], positions)

    def reorder(self, indices: Tensor) -> None:
        self.cache.reorder(indices, self.prompt_length)

    def _run(self, input_ids: Tensor, positions: Tensor | None) -> Tensor:
        seen = self.cache.get_seq_length() + input_ids.shape[1]
        mask = None if self.mask is None else self.mask[:, :seen]
        return _forward(
            self.model, self.encoded, input_ids, mask, positions, past_key_values=self.cache, use_cache=True
        )


class RecomputingDecoder:
    """Runs the whole text again for every token: the yardstick for the cache, and for models without one."""

    def __init__(self, model: Any, max_length: int, encoded: Encoded | None = None) -> None:
        self.model = model
        self.max_length = max_length
        self.encoded = encoded
        self.length = 0

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, repeats: int = 1) -> Tensor:
        batch, self.length = input_ids.shape
        self.tokens = input_ids.new_zeros(batch * repeats, self.max_length)  # the first `length` of a row are filled
        self.tokens[:, : self.length] = _repeated(input_ids, repeats)
        self.mask = _repeated(_extended(attention_mask, self.max_length), repeats)
        if self.encoded is not None:
            self.encoded = self.encoded.repeated(repeats)
        return self._run()

    def step(self, token_ids: Tensor) -> Tensor:
        self.tokens[:, self.length] = token_ids
        self.length += 1
        return self._run()

    def reorder(self, indices: Tensor) -> None:
        self.tokens = self.tokens[indices]

    def _run(self) -> Tensor:
        mask = None if self.mask is None else self.mask[:, : self.length]
        positions = None if mask is None else position_ids(mask)
        return _forward(self.model, self.encoded, self.tokens[:, : self.length], mask, positions, use_cache=False)
