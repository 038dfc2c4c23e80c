"""Drawing the next token from logits: temperature, then the k largest, then the smallest set of probability top_p, then
what is at least min_p times as likely as the likeliest.

Top-p is nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751), min-p is Nguyen et al. 2024 (arXiv:2407.01082). With
top_k only the k candidates are ever sorted, exponentiated and drawn from, so the cost after one top-k pass does not
depend on the vocabulary. The draw is an exponential race, argmax p_i / e_i with e_i ~ Exp(1): the winner is i with
probability p_i / sum(p), and the n first are a draw of n without replacement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# (tokens the columns stand for, or None for 0 … K - 1; a tensor (B, K) to be like) -> Exp(1) numbers (B, K)
Noise = Callable[[Tensor | None, Tensor], Tensor]


def check_sampling(
    temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None = None
) -> None:
    """Raises ValueError, naming the argument, unless temperature > 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1."""
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature: {temperature} is not positive; for the likeliest token use do_sample=False")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k: {top_k} is negative; 0 or None keeps every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p} is not in (0, 1]")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p: {min_p} is not in [0, 1]")


@dataclass(frozen=True)
class Shortlist:
    """What is left to draw from: logits and probabilities ``(B, K)`` (-inf and 0 where removed) of some tokens.

    ``tokens (B, K)`` says which, None the whole vocabulary in order. The probabilities need not add up to 1.
    """

    logits: Tensor
    probability: Tensor
    tokens: Tensor | None

    def scores(self, vocab_size: int) -> Tensor:
        """The logits ``(B, V)``, -inf for every token that cannot be drawn."""
        if self.tokens is None:
            return self.logits
        full = self.logits.new_full((len(self.logits), vocab_size), -torch.inf)
        return full.scatter_(1, self.tokens, self.logits)

    def draw(self, noise: Noise) -> Tensor:
        """One token per row, ``(B)`` int64."""
        choice = (self.probability / noise(self.tokens, self.probability)).argmax(1, keepdim=True)
        return (choice if self.tokens is None else self.tokens.gather(1, choice))[:, 0]


@dataclass(frozen=True)
class Sampler:
    """The options of :func:`sample`, checked; ``min_tokens`` stay whatever top_k, top_p and min_p say."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    min_tokens: int = 1

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)

    def __call__(self, logits: Tensor) -> Shortlist:
        """logits ``(B, V)`` -> what can be drawn."""
        nucleus = self.top_p is not None and self.top_p < 1
        ordered = nucleus or (bool(self.min_p) and self.min_tokens > 1)
        tokens = None
        top_k = max(self.top_k, self.min_tokens) if self.top_k else None
        if top_k is not None and top_k < logits.shape[1]:
            logits, tokens = logits.topk(top_k, sorted=ordered)
        elif ordered:
            logits, tokens = logits.sort(descending=True)
        logits = logits.float()
        if self.temperature is not None and self.temperature != 1:
            logits = logits / self.temperature
        probability = torch.softmax(logits, 1)
        if probability.device.type == "cpu" and not torch.isfinite(probability.sum()):
            raise ValueError("logits: a row has no finite probability (NaN, or every logit is -inf)")
        if nucleus:
            before = probability.cumsum(1) - probability  # the mass of all likelier tokens
            logits, probability = self._without(before >= self.top_p, logits, probability)
        if self.min_p:
            floor = self.min_p * probability.amax(1, keepdim=True)
            logits, probability = self._without(probability < floor, logits, probability)
        return Shortlist(logits, probability, tokens)

    def _without(self, removed: Tensor, logits: Tensor, probability: Tensor) -> tuple[Tensor, Tensor]:
        if self.min_tokens > 1:  # then they are in order
            removed[:, : self.min_tokens] = False
        return logits.masked_fill(removed, -torch.inf), probability.masked_fill(removed, 0.0)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row.

    Args:
        logits: ``(B, V)``, any floating dtype.
        temperature: divides the logits; > 0.
        top_k: keep the k largest logits; 0 or None keeps all.
        top_p: of those, keep the largest whose probabilities add up to top_p, at least one; 1 or None keeps all.
        min_p: of those, keep the ones at least min_p times as likely as the likeliest; 0 or None keeps all.
        generator: source of randomness, on the device of ``logits``; default torch's global one.

    Returns:
        ``(B)`` int64.

    Raises:
        ValueError: an argument out of range; on the CPU also a row without a finite probability (NaN, or all -inf).
    """
    sampler = Sampler(temperature, top_k, top_p, min_p)
    if logits.dim() != 2:
        raise ValueError(f"logits: shape {tuple(logits.shape)} is not (B, V)")
    return sampler(logits).draw(generator_noise(generator))


def generator_noise(generator: torch.Generator | None) -> Noise:
    """Numbers from ``generator``, None for torch's global one, in the order of the rows."""
    return lambda tokens, like: torch.empty_like(like).exponential_(generator=generator)


def _signed(value: int) -> int:
    """The last 64 bits of an integer, as an int64."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


class SeededNoise:
    """Numbers that are a function of (key of the row, step, token) and of nothing else.

    Neither the other rows of a batch, nor the filters that left this token in, nor the device change them. They are the
    highest bits of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") from state
    ``key`` at counter step * 2^32 + token.

    Args:
        keys: ``(B)`` int64, one a row.
    """

    GOLDEN, FIRST, SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys[:, None]
        self.step = 0

    def __call__(self, tokens: Tensor | None, like: Tensor) -> Tensor:
        if tokens is None:
            tokens = torch.arange(like.shape[1], device=like.device)
        # Products wrap, as they should; >> repeats the sign, which the masks take away.
        x = tokens * self.GOLDEN + (self.keys + _signed((self.step << 32) * self.GOLDEN))
        self.step += 1
        x = x.bitwise_xor_((x >> 30).bitwise_and_((1 << 34) - 1)).mul_(self.FIRST)
        x = x.bitwise_xor_((x >> 27).bitwise_and_((1 << 37) - 1)).mul_(self.SECOND)
        # The last shift would change none of the 23 highest bits, which give a number in (0, 1) without rounding.
        uniform = x.bitwise_right_shift_(41).float().add_(2.0**22 + 0.5).mul_(2.0**-23)
        return uniform.log_().neg_()


def prompt_keys(seed: int, rows: list[list[int]], repeats: int) -> list[int]:
    """A key for each continuation of each prompt, ``len(rows) * repeats`` of them.

    It is a hash of the seed, the prompt's tokens, and how many continuations the same prompt had before in this call.
    So a prompt draws the same numbers alone and in any batch, and two equal prompts different ones.
    """
    keys, seen = [], {}
    for row in rows:
        count = seen.get(tuple(row), 0)
        seen[tuple(row)] = count + repeats
        for i in range(count, count + repeats):
            digest = hashlib.blake2b(repr((seed, i, row)).encode(), digest_size=8).digest()
            keys.append(int.from_bytes(digest, "little", signed=True))
    return keys
