"""Text of any length from a model with a limited context, piece by piece as it is made.

When the context is full, its later half is kept as the new prompt and writing goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .data import Tokenizer
from .generation import TextStreamer
from .models.pretrained import PreTrainedModel


@dataclass(frozen=True)
class Written:
    """``text`` without the prompt, the number of ``tokens`` in it, and the ``seconds`` they took."""

    text: str
    tokens: int
    seconds: float


class _Pieces(TextStreamer):
    """One text from several generations, each of which goes on where the one before ended."""

    def __init__(self, tokenizer: Tokenizer, emit: Callable[[str], None], stop_strings: str | Sequence[str]) -> None:
        super().__init__(tokenizer, emit, stop_strings=stop_strings)
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        is_prompt = self._is_prompt
        if is_prompt and self.ids:  # what was written already
            self._is_prompt = False
            return
        if not is_prompt:
            self.ids.extend(value.tolist())
        super().put(value)

    def end(self) -> None:
        self._is_prompt = True

    def flush(self) -> None:
        super().end()


def write(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    emit: Callable[[str], None] = lambda piece: None,
    **options: Any,
) -> Written:
    """Continues ``prompt``.

    Args:
        prompt: at least one token of text, unless the tokenizer has an end-of-text token to begin from.
        max_new_tokens: tokens to write; fewer if the model, or a stop string, ends the text.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: draw among the likeliest k only; None or 0 for all.
        seed: of the draws; None draws other text at every call.
        emit: called with each new piece of text; with ``num_beams`` once for each filled context, else as it is made.
        options: more of :func:`fastformer.generation.generate`: ``top_p``, ``repetition_penalty``, ``num_beams`` …

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
    context = model.config.max_position_embeddings
    streams = (options.get("num_beams") or 1) == 1
    collected: list[str] = []

    def keep(piece: str) -> None:
        if piece:
            collected.append(piece)
            emit(piece)

    pieces = _Pieces(tokenizer, keep, options.get("stop_strings") or ())
    begin = time.perf_counter()
    while len(pieces.ids) < max_new_tokens:
        window = (ids + pieces.ids)[-context:]
        if len(window) == context:
            window = window[-max(1, context // 2) :]
        before, room = len(pieces.ids), min(max_new_tokens - len(pieces.ids), context - len(window))
        if room < 1:
            raise ValueError(f"the model's context of {context} tokens leaves no room to write")
        out = model.generate(
            torch.tensor([window], device=device),
            max_new_tokens=room,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_k=top_k or None,
            generator=generator,
            streamer=pieces if streams else None,
            tokenizer=tokenizer,
            **options,
        )
        if not streams:
            for part in (out[0, : len(window)], out[0, len(window) :]):
                pieces.put(part)
            pieces.end()
        if pieces.stopped or len(pieces.ids) - before < room:
            break
    pieces.flush()
    return Written("".join(collected), len(pieces.ids), time.perf_counter() - begin)
