"""Environments small enough to know the best policy of, and to break on purpose."""

import gymnasium
import numpy as np
from gymnasium import spaces

TEXTS = spaces.Text(200, charset="abcdefghijklmnopqrstuvwxyz ")
COLOURS = ("red", "green", "blue")


class Identity(gymnasium.Env):
    """Repeat the number that is shown: 1 if so, else 0. Ten steps, then truncated."""

    def __init__(self, values=3, length=10, start=0):
        self.observation_space = spaces.Discrete(values)
        self.action_space = spaces.Discrete(values, start=start)
        self.length, self.start = length, start

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._draw(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        reward = float(action - self.start == self.shown)
        self.steps += 1
        return self._draw(), reward, False, self.steps >= self.length, {}

    def _draw(self):
        self.shown = int(self.np_random.integers(self.observation_space.n))
        return self.shown


class Recall(Identity):
    """Name the number that was shown at the step before: what only a policy with a history can."""

    def step(self, action):
        before = getattr(self, "before", self.shown) if self.steps else self.shown
        self.before = self.shown
        self.steps += 1
        reward = float(action == before)
        return self._draw(), reward, False, self.steps >= self.length, {}


class Chooser(gymnasium.Env):
    """Say the colour that is shown, among two or three in any order."""

    def __init__(self):
        self.observation_space = TEXTS
        self.action_space = TEXTS

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._draw()

    def step(self, action):
        reward = float(action == f"take the {self.shown} one")
        self.steps += 1
        return (self._draw()[0], reward, self.steps >= 4, False, self.info)

    def _draw(self):
        self.shown = COLOURS[self.np_random.integers(3)]
        others = [c for c in COLOURS if c != self.shown]
        offered = [self.shown, *others[: 1 + self.np_random.integers(2)]]
        self.np_random.shuffle(offered)
        self.info = {"choices": [f"take the {colour} one" for colour in offered]}
        return f"the light is {self.shown}", self.info


class Line(gymnasium.Env):
    """Walks 0, 1, 2, … whatever is done, with reward = position; ends at ``end``, terminated or truncated."""

    def __init__(self, end=3, truncates=False, reward=1.0):
        self.observation_space = spaces.Box(-10, 10, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.end, self.truncates, self.reward = end, truncates, reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return np.array([0.0], np.float32), {}

    def step(self, action):
        self.at += 1
        over = self.at == self.end
        observation = np.array([self.at], np.float32)
        return observation, self.reward * self.at, over and not self.truncates, over and self.truncates, {}


class Broken(Line):
    """Does at step 2 of the first episode what it is told to: raises, or a reward of NaN."""

    def __init__(self, how="raises"):
        super().__init__()
        self.how = how

    def step(self, action):
        if self.at == 1 and self.how == "raises":
            raise KeyError("no such room")
        observation, reward, *rest = super().step(action)
        return observation, float("nan") if self.at == 2 and self.how == "nan" else reward, *rest


class NothingToChoose(Chooser):
    """At the second step."""

    def step(self, action):
        return *super().step(action)[:4], {"choices": []}


class Wrong(Line):
    """Observations of a kind that nothing here can read."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Dict({"a": spaces.Discrete(2)})


class Continuous(Line):
    def __init__(self):
        super().__init__()
        self.action_space = spaces.Box(-1, 1, (2,))


def broken_by_nan():
    return Broken("nan")


def truncated_line():
    return Line(truncates=True)


def unrewarded():
    return Line(reward=0.0)


def recall_of_two():
    return Recall(values=2)
