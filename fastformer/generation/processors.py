"""What changes the logits of the next token before one is chosen.

A processor is called with the tokens so far ``(B, S)`` int64 and scores ``(B, V)`` float32, logits or
log-probabilities, and returns new scores; those of ``transformers`` fit. :func:`processors_for` puts them in that
library's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..models.generation_config import GenerationConfig
from .sampling import Sampler

Processor = Callable[[Tensor, Tensor], Tensor]


class RepetitionPenalty:
    """Positive scores of tokens already in the text / penalty, negative ones * penalty (Keskar et al. 2019, CTRL).

    Args:
        penalty: above 1 against repetition, below 1 for it.
        attention_mask: ``(B, S)`` of the prompts: tokens where it is 0 do not count. None for no padding.
    """

    def __init__(self, penalty: float, attention_mask: Tensor | None = None) -> None:
        self.penalty = penalty
        self.padding = None if attention_mask is None else attention_mask == 0

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        vocab_size = scores.shape[1]
        tokens = tokens.clamp(max=vocab_size)
        if self.padding is not None:
            tokens[:, : self.padding.shape[1]].masked_fill_(self.padding, vocab_size)
        scores = torch.nn.functional.pad(scores, (0, 1))  # a column for what does not count
        old = scores.gather(1, tokens)
        return scores.scatter_(1, tokens, torch.where(old < 0, old * self.penalty, old / self.penalty))[:, :vocab_size]


class NoRepeatNGram:
    """-inf for every token that would end a sequence of ``size`` tokens that the text already has."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        vocab_size, length = scores.shape[1], tokens.shape[1]
        if length < self.size:
            return scores
        last = tokens[:, length + 1 - self.size :]
        windows = tokens.unfold(1, self.size, 1)
        same = (windows[..., :-1] == last[:, None]).all(2)
        ends = torch.where(same, windows[..., -1].clamp(max=vocab_size), vocab_size)
        banned = torch.zeros(len(scores), vocab_size + 1, dtype=torch.bool, device=scores.device)
        return scores.masked_fill(banned.scatter_(1, ends, True)[:, :vocab_size], -torch.inf)


class MinLength:
    """-inf for the end tokens while the text, prompt included, has fewer than ``length`` tokens."""

    def __init__(self, length: int, end_tokens: Sequence[int]) -> None:
        self.length = length
        self.end_tokens = list(end_tokens)

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        if tokens.shape[1] >= self.length:
            return scores
        scores = scores.clone()
        scores[:, self.end_tokens] = -torch.inf
        return scores


class Warp:
    """Temperature, top_k, top_p and min_p as a processor: -inf for what they leave out."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        return self.sampler(scores).scores(scores.shape[1])


def processors_for(
    config: GenerationConfig,
    prompt_length: int,
    end_tokens: Sequence[int],
    attention_mask: Tensor | None = None,
    custom: Sequence[Processor] | None = None,
) -> list[Processor]:
    """The processors that ``config`` asks for, those for drawing left out, then the ``custom`` ones.

    Args:
        prompt_length: tokens before the first new one.
        end_tokens: what min_length and min_new_tokens hold back.
        attention_mask: ``(B, prompt_length)``, one row for each row of the scores, or None.
    """
    processors: list[Processor] = []
    if config.repetition_penalty not in (None, 1):
        processors.append(RepetitionPenalty(config.repetition_penalty, attention_mask))
    if config.no_repeat_ngram_size:
        processors.append(NoRepeatNGram(config.no_repeat_ngram_size))
    min_length = config.min_length or 0
    if config.min_new_tokens is not None:
        min_length = prompt_length + config.min_new_tokens
    if min_length > prompt_length and end_tokens:
        processors.append(MinLength(min_length, end_tokens))
    return [*processors, *(custom or ())]
