"""What generation asks of a model: logits for the token after a prompt, then after each further token.

A model with a kernel of its own for this offers ``model.decoder(batch_size, max_length)``, which returns a
:class:`Decoder` or None; every other causal language model is driven through its ``forward``.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ..models.cache import KVCache


class Decoder(Protocol):
    """One generation in progress, for a fixed batch."""

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Starts over with prompts ``(B, S)``, mask ``(B, S)`` 0 at left padding or None; logits ``(B, V)``."""
        ...

    def step(self, token_ids: Tensor) -> Tensor:
        """Appends one token to each sequence, ``(B)``; logits ``(B, V)`` for the next."""
        ...


def decoder_for(model: Any, batch_size: int, max_length: int, use_cache: bool = True) -> Decoder:
    """The fastest decoder for ``model``: its own, else one with a cache; without ``use_cache`` the recomputing one."""
    if not use_cache:
        return RecomputingDecoder(model, max_length)
    own = getattr(model, "decoder", None)
    decoder = own(batch_size, max_length) if own is not None else None
    return decoder if decoder is not None else CachedDecoder(model, max_length)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Each token's position in its own text: ``(B, S)`` mask of 0 and 1 -> ``(B, S)``, 0 at padding."""
    return (attention_mask.cumsum(1) - 1).clamp_(min=0)


class CachedDecoder:
    """Runs ``model.forward`` on the new token only, with a cache of ``max_length`` positions allocated once."""

    def __init__(self, model: Any, max_length: int) -> None:
        self.model = model
        self.max_length = max_length
        self.cache = KVCache(model.config.num_hidden_layers, max_length)
        self.mask: Tensor | None = None  # (B, max_length), ones beyond the prompt
        self.next_position: Tensor | None = None  # (B, 1)

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.cache.reset()
        self.mask = self.next_position = positions = None
        if attention_mask is not None:
            batch, length = input_ids.shape
            self.mask = attention_mask.new_ones(batch, self.max_length)
            self.mask[:, :length] = attention_mask
            positions = position_ids(attention_mask)
            self.next_position = positions[:, -1:] + 1
        return self._run(input_ids, positions)

    def step(self, token_ids: Tensor) -> Tensor:
        positions = self.next_position
        if positions is not None:
            self.next_position = positions + 1
        return self._run(token_ids[:, None], positions)

    def _run(self, input_ids: Tensor, positions: Tensor | None) -> Tensor:
        seen = self.cache.get_seq_length() + input_ids.shape[1]
        output = self.model(
            input_ids,
            past_key_values=self.cache,
            attention_mask=None if self.mask is None else self.mask[:, :seen],
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


class RecomputingDecoder:
    """Runs the whole text again for every token: the yardstick for the cache, and for models without one."""

    def __init__(self, model: Any, max_length: int) -> None:
        self.model = model
        self.max_length = max_length
        self.tokens: Tensor | None = None  # (B, max_length), the first `length` of them filled
        self.mask: Tensor | None = None
        self.length = 0

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        batch, self.length = input_ids.shape
        self.tokens = input_ids.new_zeros(batch, self.max_length)
        self.tokens[:, : self.length] = input_ids
        self.mask = None
        if attention_mask is not None:
            self.mask = attention_mask.new_ones(batch, self.max_length)
            self.mask[:, : self.length] = attention_mask
        return self._run()

    def step(self, token_ids: Tensor) -> Tensor:
        assert self.tokens is not None, "prefill comes first"
        self.tokens[:, self.length] = token_ids
        self.length += 1
        return self._run()

    def _run(self) -> Tensor:
        assert self.tokens is not None
        mask = None if self.mask is None else self.mask[:, : self.length]
        output = self.model(
            self.tokens[:, : self.length],
            attention_mask=mask,
            position_ids=None if mask is None else position_ids(mask),
            use_cache=False,
            logits_to_keep=1,
        )
        return output.logits[:, -1]
