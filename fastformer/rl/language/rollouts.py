"""Rollouts: several completions of each prompt, by the generation engine, with what the policy thought of each token.

All completions of a batch of prompts are sampled at once, over one key/value cache in which a prompt is computed once
for its whole group. The log-probabilities of the distribution that was sampled from are kept on the way; where the
policy that is trained computes in another precision, or by other kernels, their difference to its own can be told.

Only the temperature changes that distribution: with top-k or top-p a token's probability would not be the policy's, and
neither ratios nor the KL divergence would mean anything.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...data import Batch
from ...generation import generate
from ...generation.text import decode
from .preferences import rows_of


@dataclass
class Rollouts:
    """N = P G completions, those of a prompt next to each other.

    Attributes:
        prompt_ids, completion_ids: tokens; a completion's with the end token, if it came to it.
        completions: texts, without the end token; "" where the policy ended at once.
        truncated: ``(N,)`` bool: the limit came before the end token.
        log_probs: for each completion ``(tokens,)``, those of the distribution that was sampled from.
        seconds: that sampling took.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    completions: list[str]
    truncated: Tensor
    log_probs: list[Tensor]
    seconds: float

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, ``(N,)``."""
        return torch.tensor([len(ids) for ids in self.completion_ids])

    def batch(self) -> Batch:
        """``input_ids``, ``attention_mask``, ``completion_mask`` (N, S), padded at the end, and
        ``sampling_log_probs`` (N, S - 1), entry t of token t + 1."""
        rows = [p + c for p, c in zip(self.prompt_ids, self.completion_ids)]
        ids, lengths = rows_of(rows)
        columns = torch.arange(ids.shape[1])
        prompts = torch.tensor([len(p) for p in self.prompt_ids])
        real = columns < lengths[:, None]
        mask = real & (columns >= prompts[:, None])
        log_probs = torch.zeros(ids.shape).masked_scatter(mask, torch.cat(self.log_probs))[:, 1:]
        return {
            "input_ids": ids,
            "attention_mask": real.long(),
            "completion_mask": mask.long(),
            "sampling_log_probs": log_probs.contiguous(),
        }


class _Recorder:
    """A logits processor that changes nothing, and notes the log-probability of each token that was drawn."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.columns: list[Tensor] = []
        self.latest: Tensor | None = None

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        self._note(tokens[:, -1])
        self.latest = torch.log_softmax(scores if self.temperature == 1 else scores / self.temperature, 1)
        return scores

    def _note(self, token: Tensor) -> None:
        if self.latest is not None:
            self.columns.append(self.latest.gather(1, token[:, None]))

    def table(self, new: Tensor) -> Tensor:
        """``(rows, T)`` for the new tokens ``(rows, T)``; what follows an end token means nothing."""
        if len(self.columns) < new.shape[1]:
            self._note(new[:, -1])
        return torch.cat(self.columns[: new.shape[1]], 1)


def roll_out(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int = 1,
    max_new_tokens: int = 64,
    end: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 0,
    record: bool = True,
) -> Rollouts:
    """Samples ``group_size`` completions of each prompt.

    Args:
        model: causal language model, as :class:`.policy.SamplingModel` has it.
        tokenizer: for the completions' texts.
        prompts: token ids, one or more each.
        end: token that ends a completion.
        temperature: divides the logits; 0 takes the likeliest token (then a group is of one).
        seed: the completions are a function of it, the model and the prompts.
        batch_size: completions sampled together, in whole groups; 0: all.
        record: note log-probabilities.

    Raises:
        ValueError: no prompt or one without tokens, no room for a token, or a temperature below 0.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts: expected at least one, of one token or more each")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
    if temperature < 0 or (temperature == 0 and group_size > 1):
        raise ValueError(f"temperature: got {temperature}, expected above 0, or 0 for groups of one")
    begin = time.perf_counter()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    step = max(1, batch_size // group_size) if batch_size else len(prompts)
    found: list[tuple[list[int], list[int], Tensor]] = []
    for start in range(0, len(prompts), step):
        chunk = [list(prompt) for prompt in prompts[start : start + step]]
        found += _sample(model, chunk, group_size, max_new_tokens, end, temperature, generator, record)
    completion_ids = [completion for _, completion, _ in found]
    return Rollouts(
        prompt_ids=[prompt for prompt, _, _ in found],
        completion_ids=completion_ids,
        completions=[decode(tokenizer, ids[:-1] if ids[-1] == end else ids) for ids in completion_ids],
        truncated=torch.tensor([ids[-1] != end for ids in completion_ids]),
        log_probs=[log_probs for _, _, log_probs in found],
        seconds=time.perf_counter() - begin,
    )


def _sample(
    model: Any,
    prompts: list[list[int]],
    group_size: int,
    max_new_tokens: int,
    end: int,
    temperature: float,
    generator: torch.Generator,
    record: bool,
) -> list[tuple[list[int], list[int], Tensor]]:
    """(prompt, completion, log-probabilities) of each of the completions."""
    width = max(map(len, prompts))
    ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    recorder = _Recorder(temperature or 1.0)
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": None, "min_p": None}
    device = next(model.parameters()).device
    tokens = generate(
        model,
        ids.to(device),
        attention_mask=mask.to(device),
        generator=generator if temperature else None,
        logits_processor=[recorder] if record else None,
        max_new_tokens=max_new_tokens,
        num_return_sequences=group_size,
        eos_token_id=end,
        pad_token_id=end,
        repetition_penalty=None,
        no_repeat_ngram_size=None,
        num_beams=1,
        stop_strings=None,
        **(drawn if temperature else {"do_sample": False}),
    )
    assert isinstance(tokens, Tensor)
    new = tokens[:, width:]
    table = recorder.table(new).float().cpu() if record else torch.zeros(new.shape)
    found = []
    for row, (tokens_of_row, log_probs) in enumerate(zip(new.tolist(), table.clone())):
        length = tokens_of_row.index(end) + 1 if end in tokens_of_row else len(tokens_of_row)
        found.append((prompts[row // group_size], tokens_of_row[:length], log_probs[:length]))
    return found
