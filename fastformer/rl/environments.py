"""Copies of a Gymnasium environment stepped together, in this process or in several.

A step gives each copy an action and returns the observations to act on next. Where an episode ends the copy is reset at
once, and its last observation is handed out beside the new one (Gymnasium's autoreset mode "SameStep"), because the two
ends differ: a *terminated* episode has no future, a *truncated* one (a time limit) has, and its value is bootstrapped
from that last observation (Pardo et al. 2018, "Time Limits in Reinforcement Learning", section 3).

Episode k of copy i is reset with a seed made of (seed, i, k). So the state of all copies is small, how many episodes
each has behind it and what was done in the present one, and a resumed run repeats these to stand where it stood. This
holds for every environment that ``reset(seed=…)`` makes start anew; one that carries something over does not resume.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..extras import require
from .observations import Observations

Make = str | Callable[[], Any]


class EnvironmentFailed(RuntimeError):
    """An environment raised, or returned what it must not; the message names it, the episode and the step."""


@dataclass(frozen=True)
class Episode:
    """A finished episode: the sum of its rewards, undiscounted, and its steps."""

    total: float
    length: int


@dataclass(frozen=True)
class Step:
    """What N copies returned; shapes of observations as :class:`.observations.Observations` makes them.

    Attributes:
        observations: ``(N, …)`` to act on next; of a new episode where one ended.
        rewards: ``(N,)`` float32.
        terminated, truncated: ``(N,)`` bool; where both, the episode is terminated.
        ended: ``(K,)`` int64, the copies whose episode ended.
        final_observations: ``(K, …)``, the last ones of these episodes.
        episodes: the same episodes' returns and lengths.
    """

    observations: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    ended: Tensor
    final_observations: Tensor
    episodes: list[Episode] = field(default_factory=list)

    def successors(self) -> Tensor:
        """``(N, …)``: what each action led to, which at an episode's end is its last observation."""
        if not len(self.ended):
            return self.observations
        successors = self.observations.clone()
        successors[self.ended] = self.final_observations
        return successors


def make_environment(name: Make, options: dict[str, Any] | None = None) -> Any:
    """One environment, by its name in Gymnasium's registry, ``textworld:<size>``, or a function that makes it.

    A mission in the observations of MiniGrid makes them texts (:class:`.text_environments.MiniGridText`).

    Raises:
        ValueError: a name that nothing is registered under.
        MissingPackageError: Gymnasium, or the package of the environment, is not installed.
    """
    if callable(name):
        return name()
    if name.startswith("textworld:"):
        from .text_environments import TextWorldGame

        return TextWorldGame(name.removeprefix("textworld:"), **(options or {}))
    gymnasium = require("gymnasium", "fastformer.rl", "rl")
    if name.startswith("MiniGrid"):
        require("minigrid", f"the environment {name}", "rl")
    try:
        environment = gymnasium.make(name, disable_env_checker=True, **(options or {}))
    except gymnasium.error.Error as error:
        raise ValueError(f"environment: {name!r} cannot be made: {error}") from error
    if not name.startswith("MiniGrid"):
        return environment
    from .text_environments import MiniGridText

    return MiniGridText(environment)


class Environments:
    """``copies`` of an environment, stepped together.

    Args:
        make: as in :func:`make_environment`; with ``processes`` it has to be picklable.
        copies: N.
        seed: of all episodes' beginnings.
        observations: what makes tensors of observations; evaluation shares that of training. None: a new one, with
            ``observation_options``.
        processes: 0 steps all copies here; more, in so many processes: for environments that take milliseconds.
        options: arguments of the environment's constructor.

    Attributes:
        name: to call it by in messages.
        action_space: of one copy.
        current: ``(N, …)``, the observations to act on, after ``reset``.
    """

    def __init__(
        self,
        make: Make,
        copies: int,
        seed: int = 0,
        *,
        observations: Observations | None = None,
        observation_options: dict[str, Any] | None = None,
        processes: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        if copies < 1:
            raise ValueError(f"copies: got {copies}, expected at least 1")
        if processes < 0:
            raise ValueError(f"processes: got {processes}, expected at least 0")
        self.name = make if isinstance(make, str) else getattr(make, "__name__", type(make).__name__)
        self.copies = copies
        starts = np.linspace(0, copies, min(max(1, processes), copies) + 1).astype(int)
        parts = [range(a, b) for a, b in itertools.pairwise(starts)]
        arguments = (make, options, self.name, seed)
        self._groups: list[Any] = [(_Remote if processes else _Group)(*arguments, part) for part in parts]
        self._parts = parts
        spaces = self._groups[0].spaces()
        self.action_space = spaces[1]
        if observations is None:
            observations = Observations(*spaces, name=self.name, **(observation_options or {}))
        observations.check(spaces[0], self.name)
        self.observations = observations
        self.current: Tensor = torch.empty(0)
        self._windows: Any = None

    def reset(self) -> Tensor:
        """Begins with episode 0 in every copy, ``(N, …)``."""
        begun = [start for group in self._each("reset") for start in group]
        self._windows = self.observations.windows(self.copies)
        everyone = np.arange(self.copies)
        self.current = self.observations(begun, everyone, self._windows, np.ones(self.copies, bool))
        return self.current

    def step(self, actions: Sequence[Any], active: Sequence[bool] | None = None) -> Step:
        """Gives copy i ``actions[i]``: a number, an array, or a text, as its action space says.

        Args:
            active: copies to step; the others stay as they are, with a reward of 0.

        Raises:
            EnvironmentFailed: an environment raised, or returned a reward that is not finite.
        """
        if len(actions) != self.copies:
            raise ValueError(f"actions: got {len(actions)}, expected {self.copies}, one for each copy")
        wanted = [(a if active is None or active[i] else None) for i, a in enumerate(actions)]
        results = [
            result
            for group in self._each("step", [[wanted[i] for i in part] for part in self._parts])
            for result in group
        ]
        stepped = np.array([i for i, result in enumerate(results) if result is not None], dtype=np.int64)
        rewards = np.zeros(self.copies, np.float32)
        terminated, truncated = np.zeros(self.copies, bool), np.zeros(self.copies, bool)
        ended, finals, following, episodes = [], [], [], []
        for i in stepped:
            seen, rewards[i], terminated[i], cut, last, episode = results[i]
            truncated[i] = cut and not terminated[i]
            following.append(seen)
            if episode is not None:
                ended.append(i)
                finals.append(last)
                episodes.append(Episode(*episode))
        at = np.array(ended, dtype=np.int64)
        began = np.zeros(self.copies, bool)
        began[at] = True
        if ended:
            final = self.observations.last(finals, at, self._windows)
        else:
            final = self.current[:0]
        following_rows = self.observations(following, stepped, self._windows, began)
        if len(stepped) == self.copies:
            self.current = following_rows
        else:
            self.current = self.current.clone()
            self.current[stepped] = following_rows
        return Step(
            self.current,
            torch.from_numpy(rewards),
            torch.from_numpy(terminated),
            torch.from_numpy(truncated),
            torch.from_numpy(at),
            final,
            episodes,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where every copy stands, in numbers of episodes and the actions of the present ones."""
        return {
            "episodes": [state for group in self._each("state") for state in group],
            "current": self.current,
            "windows": None if self._windows is None else torch.from_numpy(self._windows.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts every copy where it stood, by playing its present episode again."""
        if len(state["episodes"]) != self.copies:
            raise ValueError(f"copies: the saved run has {len(state['episodes'])} copies of {self.name}")
        self._each("load", [[state["episodes"][i] for i in part] for part in self._parts])
        self.current = state["current"]
        self._windows = None if state["windows"] is None else state["windows"].numpy().copy()

    def close(self) -> None:
        for group in self._groups:
            group.close()

    def __enter__(self) -> Environments:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _each(self, method: str, arguments: list[Any] | None = None) -> list[Any]:
        """The method of every group; processes run at the same time."""
        if isinstance(self._groups[0], _Remote):
            for i, group in enumerate(self._groups):
                group.send(method, *(() if arguments is None else (arguments[i],)))
            answers = [group.receive() for group in self._groups]  # all of them, so that none answers a later question
            for problem, _ in answers:
                if problem is not None:
                    raise EnvironmentFailed(problem)
            return [answer for _, answer in answers]
        return [
            getattr(group, method)(*(() if arguments is None else (arguments[i],)))
            for i, group in enumerate(self._groups)
        ]


class _Group:
    """Some copies, stepped one after the other. An observation is a pair: it, and the choices that came with it."""

    def __init__(self, make: Make, options: dict[str, Any] | None, name: str, seed: int, copies: range) -> None:
        self.name, self.seed, self.indices = name, seed, copies
        self.environments = [make_environment(make, options) for _ in copies]
        for environment in self.environments:
            for attribute in ("observation_space", "action_space"):
                if getattr(environment, attribute, None) is None:
                    raise ValueError(f"environment: {name} has no {attribute}")
        self.episode = [-1] * len(copies)
        self.actions: list[list[Any]] = [[] for _ in copies]
        self.total = [0.0] * len(copies)

    def spaces(self) -> tuple[Any, Any]:
        return self.environments[0].observation_space, self.environments[0].action_space

    def reset(self) -> list[tuple[Any, Any]]:
        self.episode = [-1] * len(self.environments)
        return [self._begin(i) for i in range(len(self.environments))]

    def step(self, actions: list[Any]) -> list[tuple[Any, ...] | None]:
        return [None if action is None else self._step(i, action) for i, action in enumerate(actions)]

    def state(self) -> list[Any]:
        return [{"episode": self.episode[i], "actions": _plain(self.actions[i])} for i in range(len(self.environments))]

    def load(self, states: list[Any]) -> None:
        for i, state in enumerate(states):
            self.episode[i] = state["episode"] - 1
            self._begin(i)
            for action in state["actions"]:
                self._step(i, np.asarray(action) if isinstance(action, list) else action)

    def close(self) -> None:
        for environment in self.environments:
            environment.close()

    def _begin(self, i: int) -> tuple[Any, Any]:
        self.episode[i] += 1
        self.actions[i], self.total[i] = [], 0.0
        seed = episode_seed(self.seed, self.indices[i], self.episode[i])
        try:
            observation, info = self.environments[i].reset(seed=seed)
        except Exception as error:
            raise EnvironmentFailed(f"{self._where(i)}: reset raised {type(error).__name__}: {error}") from error
        return self._seen(i, observation, info)

    def _step(self, i: int, action: Any) -> tuple[Any, ...]:
        self.actions[i].append(action)
        try:
            observation, reward, terminated, truncated, info = self.environments[i].step(action)
        except Exception as error:
            raise EnvironmentFailed(
                f"{self._where(i)}: step({action!r}) raised {type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(reward):
            raise EnvironmentFailed(f"{self._where(i)}: the reward is {reward}")
        self.total[i] += float(reward)
        if not (terminated or truncated):
            return self._seen(i, observation, info), reward, terminated, truncated, None, None
        episode = self.total[i], len(self.actions[i])
        return self._begin(i), reward, terminated, truncated, (observation, info.get("choices")), episode

    def _seen(self, i: int, observation: Any, info: dict[str, Any]) -> tuple[Any, Any]:
        choices = info.get("choices")
        if choices is not None and not len(choices):
            raise EnvironmentFailed(f"{self._where(i)}: there is nothing to choose from, info['choices'] is empty")
        return observation, choices

    def _where(self, i: int) -> str:
        return (
            f"environment {self.name}, copy {self.indices[i]}, episode {self.episode[i]}, step {len(self.actions[i])}"
        )


class _Remote:
    """A :class:`_Group` in a process of its own."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()
        problem, _ = self.receive()
        if problem is not None:
            raise EnvironmentFailed(problem)

    def send(self, *question: Any) -> None:
        self._pipe.send(question)

    def receive(self) -> tuple[str | None, Any]:
        try:
            return self._pipe.recv()
        except EOFError:
            return f"the process of environments {self._process.pid} ended (exit code {self._process.exitcode})", None

    def spaces(self) -> Any:
        self.send("spaces")
        problem, spaces = self.receive()
        if problem is not None:
            raise EnvironmentFailed(problem)
        return spaces

    def close(self) -> None:
        try:
            self.send("close")
        except OSError:
            pass  # it has ended already
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()
        self._pipe.close()


def _serve(pipe: Any, *arguments: Any) -> None:
    """Answers until asked to close: (None, answer), or (what went wrong, None)."""
    torch.set_num_threads(1)
    group: Any = None
    question: tuple[Any, ...] = ("__init__",)
    while True:
        try:
            answer = None
            if group is None:
                group = _Group(*arguments)
            else:
                answer = getattr(group, question[0])(*question[1:])
            pipe.send((None, answer))
        except EnvironmentFailed as error:
            pipe.send((str(error), None))
        except Exception:
            pipe.send((traceback.format_exc(), None))
        if question[0] == "close" or group is None:
            return
        try:
            question = pipe.recv()
        except EOFError:
            return


def episode_seed(seed: int, copy: int, episode: int) -> int:
    """A seed for ``reset``, below 2**31, that shares nothing with those beside it."""
    return int(np.random.SeedSequence([seed, copy, episode]).generate_state(1)[0]) >> 1


def _plain(actions: list[Any]) -> list[Any]:
    """Actions as Python's numbers, lists and texts, which a checkpoint holds."""
    return [a.tolist() if isinstance(a, np.ndarray | np.generic) else a for a in actions]
