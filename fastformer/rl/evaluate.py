"""How good a policy is, apart from training: its own copies, its own seeds, greedy or drawn actions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .environments import Environments, Episode

Act = Callable[[Tensor], list[Any]]


@dataclass(frozen=True)
class Evaluation:
    """What ``len(episodes)`` episodes came to."""

    episodes: list[Episode]

    @property
    def mean(self) -> float:
        """Of the returns."""
        return statistics.fmean(e.total for e in self.episodes)

    @property
    def deviation(self) -> float:
        """Standard deviation of the returns."""
        return statistics.pstdev(e.total for e in self.episodes)

    @property
    def standard_error(self) -> float:
        """Of the mean."""
        return self.deviation / math.sqrt(len(self.episodes))

    @property
    def mean_length(self) -> float:
        return statistics.fmean(e.length for e in self.episodes)


def evaluate(act: Act, environments: Environments, episodes: int) -> Evaluation:
    """Plays ``episodes`` episodes from episode 0 on, the same ones each time.

    Each copy plays its share: taking the first to end of all copies would favour short episodes.

    Args:
        act: rows of observations ``(N, …)`` -> N actions, as the environments take them: :func:`actions_of` of a
            policy, :func:`random_actions`, or one made by hand.
    """
    if episodes < 1:
        raise ValueError(f"episodes: got {episodes}, expected at least 1")
    observations, copies = environments.observations, environments.copies
    left = [episodes // copies + (i < episodes % copies) for i in range(copies)]
    frozen, observations.frozen = observations.frozen, True
    played: list[Episode] = []
    try:
        environments.reset()
        while any(left):
            step = environments.step(act(environments.current), [n > 0 for n in left])
            for i in step.ended.tolist():
                left[i] -= 1
            played += step.episodes
    finally:
        observations.frozen = frozen
    return Evaluation(played)


def actions_of(policy: Any, *, greedy: bool = True, seed: int = 0) -> Act:
    """What ``policy`` does: always the best, or drawn with ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    device = next(policy.parameters()).device

    def act(rows: Tensor) -> list[Any]:
        with torch.no_grad():
            chosen = policy.act(rows.to(device), greedy=greedy, generator=generator)
        return policy.for_environment(chosen.cpu(), rows)

    return act


def random_actions(environments: Environments, seed: int = 0) -> Act:
    """Any action, any admissible text."""
    generator = torch.Generator().manual_seed(seed)
    space = environments.action_space

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    def act(rows: Tensor) -> list[Any]:
        if environments.observations.chooses:
            there = [[n for n in row if n >= 0] for row in rows[:, 1:].tolist()]
            table = environments.observations.texts.texts
            return [table[numbers[draw(len(numbers))]] for numbers in there]
        return [int(space.start) + draw(int(space.n)) for _ in rows]

    return act
