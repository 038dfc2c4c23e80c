"""What was seen, kept to learn from: the last steps of the present policy, or of many before it.

    Rollout         T steps of N copies, in order, for the policy that made them
    ReplayBuffer    the last transitions of any policy, drawn evenly or by priority, each of one step or of n

A replay buffer holds two rows of observations, an action and three numbers a transition: ``nbytes`` says how much that
is, and all of it is allocated at the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .environments import Step


@dataclass(frozen=True)
class Rollout:
    """T steps of N copies under one policy.

    Attributes:
        observations: ``(T, N, …)``.
        actions: ``(T, N)`` int64, or of generated texts the T · N token rows (:mod:`.generated`).
        rewards: ``(T, N)``.
        terminated, truncated: ``(T, N)`` bool.
        final_at: ``(K, 2)``, the (t, copy) where episodes ended; ``final_observations`` ``(K, …)``, their last ones.
        last_observations: ``(N, …)``, after the last step.
        valid: ``(T, N)`` bool, False after the end of a copy that waits for the others.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    final_at: Tensor
    final_observations: Tensor
    last_observations: Tensor
    valid: Tensor

    def next_values(self, values: Tensor, last_values: Tensor, final_values: Tensor) -> Tensor:
        """``(T, N)``: the values of what each step led to.

        Args:
            values: ``(T, N)``, of the observations.
            last_values: ``(N,)``.
            final_values: ``(K,)``.
        """
        following = torch.cat([values[1:], last_values[None]])
        following[self.final_at[:, 0], self.final_at[:, 1]] = final_values
        return following


@dataclass(frozen=True)
class Transitions:
    """A batch of B transitions.

    Attributes:
        observations, next_observations: ``(B, …)``; the latter n steps later, or at the episode's end.
        actions: ``(B,)`` int64.
        rewards: ``(B,)``, the discounted sum of the n rewards.
        discounts: ``(B,)``, what the value of the next observation counts: discount^n, and 0 after a termination.
        weights: ``(B,)``, importance of each; 1 where drawn evenly.
        indices: ``(B,)``, places in the buffer.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    discounts: Tensor
    weights: Tensor
    indices: Tensor


class SumTree:
    """Non-negative numbers, their sum, and the place where a running sum passes a mark, in O(log n).

    Schaul et al. 2016, appendix B.2.1. Leaf i is node ``leaves + i``; node k is the sum of 2k and 2k + 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size: got {size}, expected at least 1")
        self.size = size
        self.leaves = 1 << (size - 1).bit_length()
        self._nodes = np.zeros(2 * self.leaves)

    @property
    def total(self) -> float:
        return float(self._nodes[1])

    def get(self, places: np.ndarray) -> np.ndarray:
        return self._nodes[self.leaves + places]

    def set(self, places: np.ndarray, numbers: np.ndarray) -> None:
        """Puts ``numbers`` at ``places``; of a place named twice the last counts."""
        nodes = self.leaves + np.asarray(places)
        self._nodes[nodes] = numbers
        while nodes[0] > 1:  # all are on one level
            nodes = np.unique(nodes >> 1)
            self._nodes[nodes] = self._nodes[2 * nodes] + self._nodes[2 * nodes + 1]

    def find(self, marks: np.ndarray) -> np.ndarray:
        """The first place at which the sum of all up to it exceeds the mark, for marks in [0, total)."""
        nodes, marks = np.ones(len(marks), np.int64), np.array(marks, np.float64)
        while nodes[0] < self.leaves:
            nodes *= 2
            left = self._nodes[nodes]
            # Rounding can leave a mark at the very end of a subtree whose right half is empty.
            right = (marks >= left) & (self._nodes[nodes + 1] > 0)
            marks -= np.where(right, left, 0.0)
            nodes += right
        return nodes - self.leaves


class ReplayBuffer:
    """The last ``capacity`` transitions.

    Args:
        capacity: transitions.
        shape, dtype: of a row of observations.
        copies: N environments that add to it.
        discount: for the rewards of n steps.
        steps: n (Sutton 1988; Hessel et al. 2018, "Rainbow"). An episode's last transitions have fewer.
        alpha: 0 draws evenly; above, transition i with a probability in proportion to priority_i^alpha (Schaul et al.
            2016, "Prioritized experience replay", equation 1), new ones with the highest priority so far.

    Attributes:
        nbytes: memory in bytes, all allocated here.
    """

    def __init__(
        self,
        capacity: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        copies: int,
        *,
        discount: float,
        steps: int = 1,
        alpha: float = 0.0,
    ) -> None:
        for name, value, accepted, valid in (
            ("capacity", capacity, f"at least the number of copies, {copies}", capacity >= copies),
            ("steps", steps, "at least 1", steps >= 1),
            ("alpha", alpha, "in [0, 1]", 0 <= alpha <= 1),
            ("discount", discount, "in [0, 1]", 0 <= discount <= 1),
        ):
            if not valid:
                raise ValueError(f"{name}: got {value}, expected {accepted}")
        self.capacity, self.steps, self.discount, self.alpha = capacity, steps, discount, alpha
        self._columns = {
            "observations": torch.zeros(capacity, *shape, dtype=dtype),
            "actions": torch.zeros(capacity, dtype=torch.int64),
            "rewards": torch.zeros(capacity),
            "next_observations": torch.zeros(capacity, *shape, dtype=dtype),
            "discounts": torch.zeros(capacity),
        }
        self._place, self._size = 0, 0
        self._pending: list[list[tuple[Tensor, int, float]]] = [[] for _ in range(copies)]
        self._tree = SumTree(capacity) if alpha else None
        self._highest = 1.0
        self.nbytes = sum(column.nbytes for column in self._columns.values())
        if self._tree is not None:
            self.nbytes += self._tree._nodes.nbytes

    def __len__(self) -> int:
        return self._size

    def add(self, observations: Tensor, actions: Tensor, step: Step) -> None:
        """Takes in what ``actions`` ``(N,)`` on ``observations`` ``(N, …)`` led to."""
        successors = step.successors()
        if self.steps == 1:
            discounts = self.discount * (~step.terminated).float()
            self._put(observations, actions, step.rewards, successors, discounts)
            return
        rows: list[tuple[Tensor, int, float, Tensor, float]] = []
        rewards, terminated = step.rewards.tolist(), step.terminated.tolist()
        ended = set(step.ended.tolist())
        for i, pending in enumerate(self._pending):
            pending.append((observations[i], int(actions[i]), rewards[i]))
            while pending and (len(pending) == self.steps or i in ended):
                total = sum(self.discount**k * reward for k, (_, _, reward) in enumerate(pending))
                left = 0.0 if terminated[i] else self.discount ** len(pending)
                rows.append((pending[0][0], pending[0][1], total, successors[i], left))
                pending.pop(0)
        if rows:
            seen, acted, totals, following, discounts_of = zip(*rows)
            self._put(
                torch.stack(seen),
                torch.tensor(acted),
                torch.tensor(totals),
                torch.stack(following),
                torch.tensor(discounts_of),
            )

    def sample(self, size: int, generator: torch.Generator, beta: float = 1.0) -> Transitions:
        """``size`` transitions, with replacement.

        Args:
            beta: how far the weights (N · P(i))^−beta, scaled to at most 1, undo the uneven drawing (section 3.4).
        """
        if not self._size:
            raise ValueError("the replay buffer is empty")
        if self._tree is None:
            places = torch.randint(self._size, (size,), generator=generator)
            weights = torch.ones(size)
        else:
            total = self._tree.total
            # One mark in each of `size` equal parts of the sum (appendix B.2.1).
            drawn = torch.rand(size, generator=generator, dtype=torch.float64).numpy()
            found = self._tree.find((np.arange(size) + drawn) / size * total)
            places = torch.from_numpy(found)
            odds = (self._size * self._tree.get(found) / total) ** -beta
            weights = torch.from_numpy((odds / odds.max()).astype(np.float32))
        columns = {name: column[places] for name, column in self._columns.items()}
        return Transitions(**columns, weights=weights, indices=places)

    def set_priorities(self, places: Tensor, errors: Tensor, epsilon: float = 1e-6) -> None:
        """Priorities |error| + epsilon, to the power alpha."""
        if self._tree is None:
            return
        priorities = errors.detach().abs().double().cpu().numpy() + epsilon
        self._highest = max(self._highest, float(priorities.max()))
        self._tree.set(places.numpy(), priorities**self.alpha)

    def _put(self, *rows: Tensor) -> None:
        count = len(rows[0])
        if self._place + count <= self.capacity:
            places: Any = slice(self._place, self._place + count)
        else:
            places = (torch.arange(count) + self._place) % self.capacity
        for column, new in zip(self._columns.values(), rows):
            column[places] = new
        if self._tree is not None:
            at = (np.arange(count) + self._place) % self.capacity
            self._tree.set(at, np.full(count, self._highest**self.alpha))
        self._place = (self._place + count) % self.capacity
        self._size = min(self.capacity, self._size + count)

    def state_dict(self) -> dict[str, Any]:
        filled = np.arange(self._size)
        return {
            "columns": {name: column[: self._size].clone() for name, column in self._columns.items()},
            "place": self._place,
            "size": self._size,
            "pending": [[(seen.clone(), acted, reward) for seen, acted, reward in one] for one in self._pending],
            "highest": self._highest,
            "priorities": None if self._tree is None else torch.from_numpy(self._tree.get(filled)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["size"] > self.capacity:
            raise ValueError(f"capacity: got {self.capacity}, and the saved buffer has {state['size']} transitions")
        for name, column in state["columns"].items():
            self._columns[name][: len(column)] = column
        self._place, self._size, self._highest = state["place"], state["size"], state["highest"]
        self._pending = [list(one) for one in state["pending"]]
        if self._tree is not None and self._size:
            self._tree.set(np.arange(self._size), state["priorities"].numpy())
