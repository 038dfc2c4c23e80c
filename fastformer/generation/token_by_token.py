"""Greedy search and sampling: one decoder step per token, the likeliest or a drawn one.

On a GPU the question whether all texts have ended is asked every few tokens only, since the answer costs a
synchronisation; surplus columns are cut off at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .decoder import Decoder
from .outputs import GenerateOutput
from .processors import Processor
from .sampling import Noise, Sampler
from .stopping import Stopping


class Streamer(Protocol):
    """Receives tokens as they are made: :class:`fastformer.generation.TextStreamer`, or those of ``transformers``."""

    def put(self, value: Tensor) -> None:
        """First the prompts ``(B, S)``, then each step's tokens ``(B)``, on the CPU."""
        ...

    def end(self) -> None:
        """No more tokens follow."""
        ...


@dataclass
class TokenByToken:
    """The settings of one search; :meth:`__call__` runs it.

    Args:
        repeats: continuations per prompt.
        processors: change the logits ``(B * repeats, V)`` of a step before a token is chosen.
        sampler, noise: draw the token; None takes the likeliest.
        stopping: ends a text.
        fill_token: follows a text that has ended.
        streamer: receives the tokens.
        keep_scores, keep_logits: collect those of every step.
        check_every: steps from one question whether all texts have ended to the next.
    """

    repeats: int
    processors: Sequence[Processor]
    sampler: Sampler | None
    stopping: Stopping
    noise: Noise | None
    fill_token: int
    streamer: Streamer | None
    keep_scores: bool
    keep_logits: bool
    check_every: int

    def __call__(self, decoder: Decoder, prompts: Tensor, mask: Tensor | None, limit: int) -> GenerateOutput:
        """prompts and mask ``(B, S)``, at most ``limit`` tokens in all."""
        length = prompts.shape[1]
        rows = prompts.repeat_interleave(self.repeats, 0) if self.repeats > 1 else prompts
        tokens = rows.new_full((len(rows), limit), self.fill_token)
        tokens[:, :length] = rows
        ended = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        stops, looks_back = bool(self.stopping), self.stopping.looks_back
        kept_scores: list[Tensor] = []
        kept_logits: list[Tensor] = []
        token = rows[:, -1]
        if self.streamer is not None:
            self.streamer.put(rows.cpu())
        for position in range(length, limit):
            if position == length:
                scores = decoder.prefill(prompts, mask, self.repeats)
            else:
                scores = decoder.step(token)
            if self.keep_logits:
                kept_logits.append(scores.float())
            if self.processors:
                scores = scores.float()
                for processor in self.processors:
                    scores = processor(tokens[:, :position], scores)
            if self.sampler is None:
                token = scores.argmax(1)
                if self.keep_scores:
                    kept_scores.append(scores.float())
            else:
                shortlist = self.sampler(scores)
                token = shortlist.draw(self.noise)
                if self.keep_scores:
                    kept_scores.append(shortlist.scores(scores.shape[1]))
            if stops:
                token = torch.where(ended, self.fill_token, token)
            tokens[:, position] = token
            if self.streamer is not None:
                self.streamer.put(token.cpu())
            if looks_back:
                ended |= self.stopping(tokens[:, : position + 1], tuple(kept_scores) if self.keep_scores else None)
            elif stops:
                ended |= self.stopping.is_end(token)
            if stops and (position - length) % self.check_every == 0 and bool(ended.all()):
                limit = position + 1
                break
        if self.streamer is not None:
            self.streamer.end()
        tokens = tokens[:, :limit]
        if self.check_every > 1:
            tokens = tokens[:, : length + self.stopping.length(tokens[:, length:])]
        new = tokens.shape[1] - length
        return GenerateOutput(
            sequences=tokens,
            scores=tuple(kept_scores[:new]) if self.keep_scores else None,
            logits=tuple(kept_logits[:new]) if self.keep_logits else None,
        )
