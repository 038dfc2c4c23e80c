"""Observations as rows of one tensor, whatever the environment returns.

    numbers   float32 (D,): boxes flattened, discrete ones as one-hot; normalised by a running mean and deviation
    history   float32 (n, D + 1): the last n of these, oldest first; the last feature is 1 where there is one
    texts     int64 (1 + C,): the number of the text, then the numbers of the C texts to choose from, -1 for none

A text is a number in a table of all texts met so far, so that buffers hold a few bytes per step, and a text that comes
again (most do) is embedded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..extras import require


class TextTable:
    """All texts met so far, numbered in the order they came."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.texts)

    def number(self, text: str) -> int:
        """The text's number; a new text gets the next one."""
        number = self._numbers.get(text)
        if number is None:
            number = self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return number

    def load(self, texts: Sequence[str]) -> None:
        """Puts back the ``texts`` of another table."""
        self.texts = list(texts)
        self._numbers = {text: number for number, text in enumerate(self.texts)}


class RunningMoments:
    """Mean and variance of all rows seen, by the parallel update of Chan et al. 1979."""

    def __init__(self, size: int) -> None:
        self.mean, self.variance, self.count = np.zeros(size), np.ones(size), 0.0

    def update(self, rows: np.ndarray) -> None:
        """Takes in rows ``(N, D)``."""
        count = len(rows)
        delta, total = rows.mean(0) - self.mean, self.count + count
        squares = self.variance * self.count + rows.var(0) * count + delta**2 * self.count * count / total
        self.mean = self.mean + delta * count / total
        self.variance, self.count = squares / total, total


class Observations:
    """Makes rows of one environment's observations.

    Args:
        space, action_space: of one environment. A text, or a sequence of characters, is ``spaces.Text``.
        history: n, how many observations a row has; 1 for the last one alone. For numbers.
        normalise: numbers by running mean and deviation, clipped at 10 deviations.
        max_choices: C, the most texts there are to choose from, where actions are texts; 0: they are generated, and
            rows are (1,).
        name: of the environment, for messages.

    Raises:
        ValueError: a space that is neither numbers nor text, or a setting that does not fit it.
    """

    def __init__(
        self,
        space: Any,
        action_space: Any,
        *,
        history: int = 1,
        normalise: bool = False,
        max_choices: int = 32,
        name: str = "environment",
    ) -> None:
        spaces = require("gymnasium", "fastformer.rl", "rl").spaces
        for setting, value, least in (("history", history, 1), ("max_choices", max_choices, 0)):
            if value < least:
                raise ValueError(f"{setting}: got {value}, expected at least {least}")
        self.space, self.name = space, name
        self.is_text = isinstance(space, spaces.Text)
        acts_in_text = isinstance(action_space, spaces.Text)
        self.chooses = acts_in_text and max_choices > 0
        self.history, self.max_choices = history, max_choices
        self.texts = TextTable()
        self.frozen = False
        self.discrete = isinstance(space, spaces.Discrete)
        accepted = ("Box", "Discrete", "MultiDiscrete", "MultiBinary", "Text")
        if not isinstance(space, tuple(getattr(spaces, kind) for kind in accepted)):
            raise ValueError(f"environment: {name} has observations {space}, expected {', '.join(accepted)}")
        if acts_in_text and not self.is_text:
            raise ValueError(f"environment: {name} has texts as actions, and observations {space} that are not")
        if self.is_text and (history > 1 or normalise):
            raise ValueError(
                f"history, normalise: the observations of {name} are texts, expected history 1 and no normalise"
            )
        self.size = 0 if self.is_text else int(spaces.flatdim(space))
        self._flatten = spaces.flatten
        self._one_hot = isinstance(space, spaces.MultiDiscrete)
        self.moments = RunningMoments(self.size) if normalise else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row."""
        if self.is_text:
            return (1 + self.max_choices,) if self.chooses else (1,)
        return (self.size,) if self.history == 1 else (self.history, self.size + 1)

    @property
    def dtype(self) -> torch.dtype:
        """Of a row."""
        return torch.int64 if self.is_text else torch.float32

    def check(self, space: Any, name: str) -> None:
        """Raises ValueError unless rows of ``space`` are made here."""
        if space != self.space:
            raise ValueError(f"environment: {name} has observations {space}, expected {self.space} as in training")

    def windows(self, copies: int) -> np.ndarray | None:
        """What ``copies`` environments have to remember: their last n observations."""
        return None if self.history == 1 else np.zeros((copies, *self.shape), np.float32)

    def __call__(
        self, seen: Sequence[tuple[Any, Any]], at: np.ndarray, windows: np.ndarray | None, began: np.ndarray
    ) -> Tensor:
        """Rows of ``seen``, (observation, choices) of the copies ``at``; ``began`` ``(N,)``: with a new episode."""
        if self.is_text:
            return self._text_rows(seen)
        numbers = self._number_rows(seen, update=not self.frozen)
        if windows is None:
            return torch.from_numpy(numbers)
        windows[began] = 0
        windows[at] = _pushed(windows[at], numbers)
        return torch.from_numpy(windows[at])  # indexed by an array, so a copy

    def last(self, seen: Sequence[tuple[Any, Any]], at: np.ndarray, windows: np.ndarray | None) -> Tensor:
        """Rows of the last observations of the episodes that the copies ``at`` have just ended."""
        if self.is_text:
            # Nothing is chosen there any more: an end without choices is no mistake, and the value asks the text alone.
            return self._text_rows(seen, ended=True)
        numbers = self._number_rows(seen, update=False)
        return torch.from_numpy(numbers if windows is None else _pushed(windows[at], numbers))

    def _number_rows(self, seen: Sequence[tuple[Any, Any]], update: bool) -> np.ndarray:
        if self.discrete:
            rows = np.zeros((len(seen), self.size), np.float32)
            rows[np.arange(len(seen)), [int(observation) - int(self.space.start) for observation, _ in seen]] = 1
        elif self._one_hot:
            rows = np.stack([self._flatten(self.space, observation) for observation, _ in seen]).astype(np.float32)
        else:
            rows = np.array([observation for observation, _ in seen], np.float32).reshape(len(seen), -1)
        if rows.shape[1] != self.size:
            raise ValueError(
                f"{self.name}: observations of {rows.shape[1]} numbers, expected {self.size} ({self.space})"
            )
        if self.moments is None:
            return rows
        if update:
            self.moments.update(rows)
        scaled = (rows - self.moments.mean) / np.sqrt(self.moments.variance + 1e-8)
        return np.clip(scaled, -10, 10).astype(np.float32)

    def _text_rows(self, seen: Sequence[tuple[Any, Any]], ended: bool = False) -> Tensor:
        rows = torch.full((len(seen), *self.shape), -1, dtype=torch.int64)
        for row, (text, choices) in zip(rows, seen):
            if not isinstance(text, str):
                raise ValueError(f"{self.name}: the observation is {text!r}, expected a text")
            numbers = [self.texts.number(text)]
            if self.chooses:
                choices = list(choices or ())
                if not choices and not ended:
                    raise ValueError(f"{self.name}: no info['choices'] at {text[:80]!r}; max_choices 0 generates texts")
                if len(choices) > self.max_choices:
                    raise ValueError(
                        f"max_choices: got {self.max_choices}, and {self.name} has {len(choices)} at {text[:80]!r}"
                    )
                numbers += [self.texts.number(choice) for choice in choices]
            row[: len(numbers)] = torch.tensor(numbers)
        return rows

    def state_dict(self) -> dict[str, Any]:
        moments = self.moments
        return {
            "texts": self.texts.texts,
            "moments": None
            if moments is None
            else {
                "mean": torch.from_numpy(moments.mean.copy()),
                "variance": torch.from_numpy(moments.variance.copy()),
                "count": float(moments.count),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.texts.load(state["texts"])
        if self.moments is not None and state["moments"] is not None:
            self.moments.mean = state["moments"]["mean"].numpy()
            self.moments.variance = state["moments"]["variance"].numpy()
            self.moments.count = state["moments"]["count"]


def _pushed(windows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """``windows`` ``(N, n, D + 1)`` without the oldest row and with ``numbers`` as the newest."""
    newest = np.concatenate([numbers, np.ones((len(numbers), 1), np.float32)], 1)
    return np.concatenate([windows[:, 1:], newest[:, None]], 1)
