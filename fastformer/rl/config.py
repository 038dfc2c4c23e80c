"""What a run of ``fastformer rl`` is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from ..training.config import _check, from_dict
from .a2c import A2CConfig
from .dqn import DQNConfig
from .policies import PolicyConfig
from .ppo import PPOConfig
from .reinforce import ReinforceConfig

ALGORITHMS = ("dqn", "reinforce", "a2c", "ppo")


@dataclass(frozen=True)
class RunConfig:
    """Where, how long, and what is written."""

    out: str = "runs/rl"
    """Directory: seed-<n>/ with checkpoint, logs and plot of each, and returns.png of all."""
    steps: int = 100_000
    """Of one environment: with 8 copies each makes an eighth of them."""
    copies: int = 8
    """Copies of the environment that are stepped together."""
    processes: int = 0
    """Processes that step them; 0: this one. For environments that take milliseconds a step."""
    bonus: float = 0.0
    """Added to the reward of an observation that was seen n times: this / sqrt(n)."""
    eval_every: int = 10_000
    """Steps between two evaluations; 0: only at the end."""
    eval_episodes: int = 20
    """Episodes in each, of environments and seeds of their own."""
    final_episodes: int = 100
    """Episodes in the one at the end."""
    log_every: int = 1000
    """Steps between two lines in the log."""
    save_every: int = 50_000
    """Steps between two checkpoints; 0: only at the end."""
    keep_best: bool = False
    """Keep the best of the evaluated policies in best/."""
    device: str = "cpu"
    """auto (a GPU where there is one), cpu, cuda, cuda:1 …; small networks are fastest on a CPU."""
    threads: int = 1
    """CPU threads; 0 leaves PyTorch's choice."""
    resume: bool = False
    """Continue each seed from its checkpoint, to the bit."""
    tensorboard: bool = True
    """Write a TensorBoard log."""

    def __post_init__(self) -> None:
        _check(
            "run",
            self,
            *((name, "at least 1", getattr(self, name) >= 1) for name in AT_LEAST_ONE),
            *((name, "at least 0", getattr(self, name) >= 0) for name in AT_LEAST_ZERO),
        )


AT_LEAST_ONE = ("steps", "copies", "eval_episodes", "final_episodes", "log_every")
AT_LEAST_ZERO = ("processes", "bonus", "eval_every", "save_every", "threads")


@dataclass(frozen=True)
class AgentConfig:
    """Train an agent in an environment. Defaults are the pair's own where there are some."""

    algorithm: Literal["dqn", "reinforce", "a2c", "ppo"] = "ppo"
    """Of the sections named like algorithms only this one's counts."""
    environment: str = "CartPole-v1"
    """A name in Gymnasium's registry (MiniGrid's missions become texts), or textworld:small, medium, large or FILE."""
    environment_options: tuple[str, ...] = ()
    """NAME=VALUE, arguments of the environment: is_slippery=False."""
    seeds: int = 1
    """Runs, each with another seed."""
    first_seed: int = 0
    """Of the first."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    dqn: DQNConfig = field(default_factory=DQNConfig)
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    a2c: A2CConfig = field(default_factory=A2CConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm: got {self.algorithm!r}, expected one of {', '.join(ALGORITHMS)}")
        if self.seeds < 1 or self.first_seed < 0:
            raise ValueError(f"seeds, first_seed: got {self.seeds}, {self.first_seed}, expected at least 1 and 0")
        for option in self.environment_options:
            if "=" not in option:
                raise ValueError(f"environment_options: got {option!r}, expected NAME=VALUE")


TEXTWORLD: dict[str, Any] = {
    "policy": {"activation": "relu", "hidden": (128,)},
    "dqn": {"discount": 0.9, "exploration": 0.5, "learning_starts": 200, "batch_size": 32, "n_steps": 3},
    "run": {"steps": 5000, "copies": 1, "eval_every": 1000, "eval_episodes": 5, "final_episodes": 20},
}
# (algorithm, environment) -> settings in place of the defaults. Those of CartPole are rl-baselines3-zoo's, so that the
# budgets are the published ones.
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("ppo", "CartPole-v1"): {
        "ppo": {
            "steps": 32,
            "minibatch": 256,
            "epochs": 20,
            "learning_rate": 1e-3,
            "anneal": True,
            "discount": 0.98,
            "decay": 0.8,
        },
        "run": {"steps": 100_000, "copies": 8},
    },
    ("a2c", "CartPole-v1"): {"a2c": {"anneal": True}, "run": {"steps": 500_000, "copies": 8, "eval_every": 25_000}},
    ("dqn", "CartPole-v1"): {
        "policy": {"hidden": (256, 256), "activation": "relu"},
        "dqn": {
            "learning_rate": 2.3e-3,
            "train_every": 256,
            "gradient_steps": 128,
            "target_every": 256,
            "exploration": 0.16,
            "last_epsilon": 0.04,
        },
        "run": {"steps": 50_000, "copies": 1, "eval_every": 5000},
    },
    ("reinforce", "CartPole-v1"): {"reinforce": {"normalise": True}, "run": {"steps": 200_000}},
    ("ppo", "FrozenLake-v1"): {
        "ppo": {"steps": 128, "minibatch": 256, "entropy": 0.01, "learning_rate": 1e-3, "anneal": True},
        "run": {"steps": 200_000, "eval_every": 20_000, "eval_episodes": 100, "final_episodes": 1000},
    },
    ("dqn", "FrozenLake-v1"): {
        "policy": {"activation": "relu"},
        "dqn": {"learning_rate": 5e-4, "exploration": 0.5, "n_steps": 3},
        "run": {"steps": 100_000, "copies": 4, "eval_episodes": 100, "final_episodes": 1000},
    },
    ("ppo", "MiniGrid-GoToDoor-5x5-v0"): {
        "policy": {"hidden": (128, 128)},
        "ppo": {"steps": 128, "minibatch": 256, "epochs": 4, "entropy": 0.01, "learning_rate": 1e-3, "anneal": True},
        "run": {"steps": 200_000, "eval_every": 20_000},
    },
    ("dqn", "textworld:small"): TEXTWORLD,
    ("dqn", "textworld:medium"): TEXTWORLD,
    ("dqn", "textworld:large"): {**TEXTWORLD, "run": {**TEXTWORLD["run"], "steps": 20_000, "bonus": 0.1}},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "dqn": {"policy": {"activation": "relu"}, "run": {"copies": 1}},
}


def preset(algorithm: str, environment: str) -> AgentConfig:
    """The settings for this pair: its own, or the algorithm's."""
    settings = PRESETS.get((algorithm, environment)) or DEFAULTS.get(algorithm, {})
    base = dataclasses.replace(AgentConfig(), algorithm=algorithm, environment=environment)  # type: ignore[arg-type]
    return from_dict(AgentConfig, settings, base)
