"""How an agent comes to try what it does not yet believe in.

ε-greedy takes a random action with probability ε; a softmax policy is kept from narrowing by its entropy (a term of the
losses in :mod:`.a2c` and :mod:`.ppo`); and a bonus for rare observations may be added to either's rewards.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def linear_schedule(first: float, last: float, fraction: float, progress: float) -> float:
    """From ``first`` to ``last`` over the first ``fraction`` of a run of which ``progress`` in [0, 1] is done."""
    return last if progress >= fraction else first + (last - first) * progress / fraction


def epsilon_greedy(scores: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    """The best action, or with probability ``epsilon`` any that there is.

    Args:
        scores: ``(N, A)`` on the CPU, -inf for an action that is not there.

    Returns:
        ``(N,)`` int64.
    """
    best = scores.argmax(1)
    if epsilon <= 0:
        return best
    tries = torch.rand(len(scores), generator=generator) < epsilon
    any_of_them = torch.multinomial(torch.isfinite(scores).float(), 1, generator=generator)[:, 0]
    return torch.where(tries, any_of_them, best)


class CountBonus:
    """A reward of scale / √n for the n-th visit of an observation (Tang et al. 2017, "#Exploration", equation 1).

    Numbers are counted by the signs of ``bits`` random projections of them (SimHash, section 2.2 there), texts by
    themselves.

    Args:
        scale: β there.
        size: numbers in a row; 0 for texts.
        bits: more tell more observations apart.
    """

    def __init__(self, scale: float, size: int, bits: int = 32, seed: int = 0) -> None:
        if scale < 0:
            raise ValueError(f"scale: got {scale}, expected at least 0")
        self.scale = scale
        generator = torch.Generator().manual_seed(seed)
        self._directions = torch.randn(size, bits, generator=generator) if size else None
        self._powers = 2 ** torch.arange(min(bits, 62))
        self.counts: dict[int, int] = {}

    def __call__(self, observations: Tensor) -> Tensor:
        """``(N, …)`` -> ``(N,)``, and counts them."""
        if self._directions is None:
            keys = observations[:, 0].tolist()
        else:
            signs = observations.flatten(1) @ self._directions > 0
            keys = (signs[:, : len(self._powers)] * self._powers).sum(1).tolist()
        bonuses = []
        for key in keys:
            self.counts[key] = self.counts.get(key, 0) + 1
            bonuses.append(self.scale / math.sqrt(self.counts[key]))
        return torch.tensor(bonuses)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = dict(state["counts"])
