"""Text of any length from a model with a limited context, piece by piece as it is made.

When the context is full, its later half is kept as the new prompt and writing goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import IncrementalDecoder, Tokenizer
from .models.gpt2 import GPT2LMHeadModel


@dataclass(frozen=True)
class Written:
    """``text`` without the prompt, the number of ``tokens`` in it, and the ``seconds`` they took."""

    text: str
    tokens: int
    seconds: float


class _Pieces:
    """A streamer: hands text to ``emit`` as tokens come in."""

    def __init__(self, tokenizer: Tokenizer, emit: Callable[[str], None]) -> None:
        self._decoder = IncrementalDecoder(tokenizer)
        self._emit = emit
        self._is_prompt = True
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        if self._is_prompt:  # the first call of each generation repeats its prompt
            self._is_prompt = False
            return
        self.ids.extend(value.tolist())
        self._emit(self._decoder.push(value.tolist()))

    def end(self) -> None:
        self._is_prompt = True

    def flush(self) -> None:
        self._emit(self._decoder.flush())


def write(
    model: GPT2LMHeadModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    emit: Callable[[str], None] = lambda piece: None,
) -> Written:
    """Continues ``prompt``.

    Args:
        prompt: at least one token of text, unless the tokenizer has an end-of-text token to begin from.
        max_new_tokens: tokens to write; fewer if the model ends the text.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: draw among the likeliest k only; None or 0 for all.
        seed: of the draws; None draws other text at every call.
        emit: called with each new piece of text.

    Raises:
        ValueError: an empty prompt, a character the tokenizer does not know, or a setting out of range, named.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
    if temperature < 0:
        raise ValueError(f"temperature: got {temperature}, expected 0 (the likeliest token) or more")
    ids = tokenizer.encode(prompt)
    if not ids:
        if tokenizer.eos_token_id is None:
            raise ValueError("prompt: is empty; give this model at least one character to begin with")
        ids = [tokenizer.eos_token_id]
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    context = model.config.n_positions
    collected: list[str] = []

    def keep(piece: str) -> None:
        if piece:
            collected.append(piece)
            emit(piece)

    pieces = _Pieces(tokenizer, keep)
    begin = time.perf_counter()
    while len(pieces.ids) < max_new_tokens:
        window = (ids + pieces.ids)[-context:]
        if len(window) == context:
            window = window[-max(1, context // 2) :]
        before, room = len(pieces.ids), min(max_new_tokens - len(pieces.ids), context - len(window))
        if room < 1:
            raise ValueError(f"the model's context of {context} tokens leaves no room to write")
        model.generate(
            torch.tensor([window], device=device),
            max_new_tokens=room,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_k=top_k or None,
            generator=generator,
            streamer=pieces,
        )
        if len(pieces.ids) - before < room:
            break  # the model ended the text
    pieces.flush()
    return Written("".join(collected), len(pieces.ids), time.perf_counter() - begin)
