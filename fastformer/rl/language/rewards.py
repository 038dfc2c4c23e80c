"""Rewards: functions of prompts and completions, added up with weights, and checked.

    f(prompts, completions, **columns) -> list[float | None]

as in TRL: one number for each completion, None where the function does not apply. ``columns`` are the other columns of
the examples, a list each with an entry for each completion, and ``completion_ids``, the tokens. What a function gets
wrong (a number that is none, a list of another length, an exception) is an error that names it and the sample.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .policy import device_of, sequence_scores

RewardFunction = Callable[..., Sequence[float | None]]
SHOWN = 60  # characters of a text in a message


class RewardError(ValueError):
    """A reward function failed; the message names it and the sample."""


@dataclass(frozen=True)
class Scored:
    """Rewards of N completions.

    Attributes:
        total: ``(N,)`` float32, the weighted sum of what applies.
        parts: by the function's name ``(N,)``, NaN where it does not apply.
    """

    total: Tensor
    parts: dict[str, Tensor]


class Rewards:
    """A weighted sum of reward functions, called as one.

    Args:
        functions: by name, for messages and logs.
        weights: by the same names; 1 where there is none. With 0 a function is measured only.

    Raises:
        ValueError: no function, or a weight for none of them.
    """

    def __init__(self, functions: Mapping[str, RewardFunction], weights: Mapping[str, float] | None = None) -> None:
        if not functions:
            raise ValueError("functions: expected at least one reward function")
        self.functions = dict(functions)
        unknown = set(weights or {}) - set(functions)
        if unknown:
            raise ValueError(f"weights: {', '.join(sorted(unknown))} is none of {', '.join(functions)}")
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in functions}

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> Scored:
        """The rewards.

        Raises:
            RewardError: a function failed, or none applies to a sample.
        """
        parts = {
            name: torch.tensor(_checked(name, function, prompts, completions, columns), dtype=torch.float32)
            for name, function in self.functions.items()
        }
        table = torch.stack(list(parts.values()))
        lost = table.isnan().all(0).nonzero()
        if len(lost):
            raise RewardError(f"no reward function applies to {_sample(int(lost[0]), prompts, completions)}")
        weights = torch.tensor([self.weights[name] for name in parts])[:, None]
        return Scored((table.nan_to_num() * weights).sum(0), parts)


def _checked(
    name: str, function: RewardFunction, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Any]
) -> list[float]:
    """What the function returns, NaN for None."""
    try:
        returned = function(prompts, completions, **columns)
    except Exception as error:
        index = _culprit(function, prompts, completions, columns)
        where = f"{len(prompts)} samples" if index is None else _sample(index, prompts, completions)
        raise RewardError(f"reward {name!r}: {type(error).__name__}: {error}, on {where}") from error
    if isinstance(returned, Tensor):
        returned = returned.tolist()
    if not isinstance(returned, Sequence) or len(returned) != len(completions):
        got = f"{len(returned)} numbers" if isinstance(returned, Sequence) else type(returned).__name__
        raise RewardError(f"reward {name!r}: returned {got} for {len(completions)} completions")
    numbers = []
    for index, value in enumerate(returned):
        if value is not None and not (_is_number(value) and math.isfinite(value)):
            raise RewardError(f"reward {name!r}: returned {value!r} for {_sample(index, prompts, completions)}")
        numbers.append(math.nan if value is None else float(value))
    return numbers


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (hasattr(value, "item") and hasattr(value, "__float__"))


def _culprit(
    function: RewardFunction, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Any]
) -> int | None:
    """The first sample that the function fails on when it is alone."""
    for i in range(len(prompts)):
        try:
            function(prompts[i : i + 1], completions[i : i + 1], **{k: v[i : i + 1] for k, v in columns.items()})
        except Exception:
            return i
    return None


def _sample(index: int, prompts: Sequence[str], completions: Sequence[str]) -> str:
    return f"sample {index} (prompt {prompts[index][-SHOWN:]!r}, completion {completions[index][:SHOWN]!r})"


# ---- rewards of a text's form ----------------------------------------------------------------------------------------


def matches(pattern: str) -> RewardFunction:
    """1 where the whole completion matches the regular expression, else 0."""
    compiled = re.compile(pattern, re.DOTALL)

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        return [float(compiled.fullmatch(completion) is not None) for completion in completions]

    return reward


def length_within(low: int, high: int) -> RewardFunction:
    """1 for ``low`` to ``high`` characters, falling to 0 at twice the distance from the middle."""
    if not 0 <= low <= high:
        raise ValueError(f"low, high: got {low}, {high}, expected 0 <= low <= high")
    half = max((high - low) / 2, 1.0)

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        beyond = (max(low - len(c), len(c) - high, 0) for c in completions)
        return [max(0.0, 1.0 - distance / half) for distance in beyond]

    return reward


def overlong(limit: int, soft: int) -> RewardFunction:
    """0 up to ``limit - soft`` tokens, falling to -1 at ``limit`` and beyond (DAPO, arXiv:2503.14476, eq. 13)."""
    if not 0 < soft <= limit:
        raise ValueError(f"limit, soft: got {limit}, {soft}, expected 0 < soft <= limit")

    def reward(
        prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        return [-min(1.0, max(0.0, (len(ids) - (limit - soft)) / soft)) for ids in completion_ids]

    return reward


def longer(scale: float = 100.0) -> RewardFunction:
    """Characters over ``scale``: a reward that is easy to hack, to try a guard with."""

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        return [len(completion) / scale for completion in completions]

    return reward


def exact_answer(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list:
    """1 where the completion is the example's ``answer`` but for space around it, else 0; None without an answer."""
    return [None if a is None else float(c.strip() == str(a).strip()) for c, a in zip(completions, answer)]


class ModelReward:
    """A reward model as a function: its score of each prompt and completion.

    Args:
        model: with ``num_labels`` 1, such as :class:`fastformer.models.GPT2ForSequenceClassification`.
        tokenizer: the model's.
        batch_size: texts at a time.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 16) -> None:
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        if model.config.num_labels != 1:
            raise ValueError(f"reward.model: has {model.config.num_labels} labels; a reward model has 1")

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        """Scores, the text encoded as in training: the prompt, then the completion, then the end of text."""
        from .preferences import joined_ids, rows_of

        texts = [joined_ids(self.tokenizer, p, c)[0] for p, c in zip(prompts, completions)]
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            ids, lengths = rows_of(texts[start : start + self.batch_size])
            device = device_of(self.model)
            scores += sequence_scores(self.model, ids.to(device), lengths.to(device)).tolist()
        return scores
