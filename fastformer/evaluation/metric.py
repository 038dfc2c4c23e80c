"""What every metric here has in common: a corpus score is a function of sums over examples.

    scores(corpus) = f(sum over examples of s(prediction, reference))

BLEU sums n-gram counts, F1 counts per class, perplexity nats and tokens, a mean sums values and ones. Kept are the K
numbers ``s`` of each example, never texts or logits, and the same rows give the score of the whole corpus, of a slice
of it, and of each bootstrap resample of it (bootstrap.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np


class Metric(ABC):
    """Takes predictions one by one with :meth:`add`; scores with :meth:`compute`.

    Attributes:
        name: column or heading in a report.
        lower_is_better: True for errors and perplexities.
        columns: K, the numbers kept of each example.
    """

    name: str
    lower_is_better = False
    columns: int

    def __init__(self) -> None:
        self._rows = array("d")

    def __len__(self) -> int:
        """Examples added."""
        return len(self._rows) // self.columns

    @abstractmethod
    def add(self, prediction: Any, reference: Any) -> float:
        """Counts one example and returns its own score, for sorting examples by it."""

    @abstractmethod
    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Named scores of sums ``(..., K)`` float64, each ``(...)``; the first one is the headline.

        NaN where a score is undefined.
        """

    def rows(self) -> np.ndarray:
        """``s`` of every example, ``(N, K)`` float64."""
        return np.array(self._rows, dtype=np.float64).reshape(-1, self.columns)

    def identity(self, reference: Any) -> Any:
        """What of a reference is the same for every system, so that evaluations of other examples are told apart."""
        return reference

    def check(self) -> None:
        """Raises ValueError where what was added leaves the scores undefined; :meth:`compute` calls it."""
        if not len(self):
            raise ValueError(f"{self.name}: no examples were added, so there is nothing to score")

    def compute(self) -> dict[str, float]:
        """The scores of everything added.

        Raises:
            ValueError: no examples, or a score that they leave undefined.
        """
        self.check()
        return {name: float(value) for name, value in self.scores(self.rows().sum(axis=0)).items()}

    @property
    def headline(self) -> str:
        """Name of the first score."""
        return next(iter(self.scores(np.ones(self.columns))))

    @property
    def signature(self) -> str:
        """Versions and settings that another score must share to be comparable; empty where there are none."""
        return ""

    def _append(self, row: Sequence[float]) -> None:
        self._rows.extend(row)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient in float64, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.full(np.shape(denominator), np.nan), where=denominator != 0)
