"""The run loop of all algorithms: iterate, log, evaluate, save; several seeds one after the other, and their plot.

out/seed-0/metrics.jsonl, tensorboard/, checkpoint/, best/
out/returns.png, out/summary.json
"""

from __future__ import annotations

import ast
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..training.checkpoint import (
    NEWEST,
    find_checkpoint,
    has_checkpoint,
    load_state,
    restore_checkpoint,
    save_checkpoint,
)
from ..training.config import decisive, from_dict, resolve_device, to_dict
from ..training.logs import MetricsLog, read_metrics
from .a2c import A2C
from .agent import Agent, SavedPolicy, load_weights
from .config import AgentConfig
from .dqn import DQN
from .environments import Environments, Make
from .evaluate import Evaluation, actions_of, evaluate
from .exploration import CountBonus
from .policies import ActorCritic, Policy, QNetwork
from .ppo import PPO
from .reinforce import Reinforce

AGENTS: dict[str, type[Agent]] = {"dqn": DQN, "reinforce": Reinforce, "a2c": A2C, "ppo": PPO}
EVALUATION_SEED = 1_000_000  # episodes that no training seed plays


@dataclass(frozen=True)
class Result:
    """What a seed came to.

    Attributes:
        greedy: the last evaluation, of the likeliest actions; ``sampled``: of drawn ones, None for DQN.
        seconds: of this process; ``steps_per_second`` leaves evaluation out.
        out: its directory.
    """

    seed: int
    steps: int
    greedy: Evaluation
    sampled: Evaluation | None
    seconds: float
    steps_per_second: float
    out: Path


def train(config: AgentConfig, *, make: Make | None = None, quiet: bool = False) -> list[Result]:
    """Trains an agent per seed, and leaves logs, checkpoints, returns.png and summary.json in ``config.run.out``.

    Args:
        make: makes the environment, in place of ``config.environment``, which then only names it.

    Raises:
        FileExistsError: a seed's directory holds a checkpoint already and ``run.resume`` is not set.
        FileNotFoundError: ``run.resume`` is set and there is no checkpoint.
        ValueError: settings, environment and saved run that do not fit together; the message names what.
        EnvironmentFailed, BadUpdateError: see there.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    out = Path(config.run.out)
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    begun = [seed for seed in seeds if has_checkpoint(out / f"seed-{seed}")]
    if begun and not config.run.resume:
        raise FileExistsError(
            f"run.out: {out / f'seed-{begun[0]}'} holds a checkpoint already; continue it with --run.resume, or choose "
            "another --run.out"
        )
    if config.run.resume and not begun:
        raise FileNotFoundError(f"run.resume: no seed in {out} has a checkpoint; run without it")
    results = []
    for seed in seeds:
        resume = seed in begun  # the run may have been stopped before its later seeds
        result = _train_seed(replace(config, run=replace(config.run, resume=resume)), seed, make, quiet)
        results.append(result)
        if not quiet:
            print(
                f"seed {seed}: {result.steps:,} steps, {result.steps_per_second:,.0f} a second; return "
                f"{result.greedy.mean:.2f} ± {result.greedy.deviation:.2f} over {len(result.greedy.episodes)} episodes"
            )
    means = [result.greedy.mean for result in results]
    summary = {
        "algorithm": config.algorithm,
        "environment": config.environment,
        "mean": statistics.fmean(means),
        "deviation_over_seeds": statistics.pstdev(means),
        "seeds": {
            result.seed: {
                "return": result.greedy.mean,
                "sampled_return": None if result.sampled is None else result.sampled.mean,
                "steps": result.steps,
                "steps_per_second": result.steps_per_second,
            }
            for result in results
        },
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    from .plots import plot_returns

    plot_returns(
        {config.algorithm: [read_metrics(result.out) for result in results]},
        out / "returns.png",
        title=f"{config.algorithm} on {config.environment}, {len(results)} seed{'s' * (len(results) > 1)}",
    )
    if not quiet:
        print(f"{out / 'returns.png'}")
    return results


def make_agent(config: AgentConfig, seed: int, make: Make | None = None) -> Agent:
    """The agent of a run at its beginning; arguments and errors as in :func:`train`."""
    torch.manual_seed(seed)
    environments = make_environments(config, seed, make)
    try:
        policy = make_policy(config, environments).to(resolve_device(config.run.device))
        observations = policy.observations
        bonus = None
        if config.run.bonus:
            size = 0 if observations.is_text else int(torch.Size(observations.shape).numel())
            bonus = CountBonus(config.run.bonus, size, seed=seed)
        environments.reset()
        return AGENTS[config.algorithm](
            policy,
            environments,
            getattr(config, config.algorithm),
            total_steps=config.run.steps,
            seed=seed,
            bonus=bonus,
        )
    except BaseException:
        environments.close()
        raise


def make_environments(
    config: AgentConfig, seed: int, make: Make | None = None, copies: int = 0, observations: Any = None
) -> Environments:
    """The copies that ``config`` asks for, or ``copies``."""
    policy = config.policy
    return Environments(
        config.environment if make is None else make,
        copies or config.run.copies,
        seed,
        observations=observations,
        observation_options={
            "history": policy.history,
            "normalise": policy.normalise,
            "max_choices": policy.max_choices,
        },
        processes=config.run.processes,
        options=_options(config.environment_options),
    )


def make_policy(config: AgentConfig, environments: Environments) -> Policy:
    """The network that the algorithm learns."""
    if config.algorithm == "dqn":
        return QNetwork(environments.observations, environments.action_space, config.policy, config.dqn.dueling)
    return ActorCritic(environments.observations, environments.action_space, config.policy)


def load_policy(run: str | Path, *, make: Make | None = None) -> tuple[Policy, Environments, AgentConfig]:
    """A trained policy, copies of its environment to use it in, and the settings of its run.

    Args:
        run: a seed's directory, or a checkpoint in it.
        make: as in :func:`train`.
    """
    directory = find_checkpoint(run)
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    settings.pop("model_type", None)
    config = from_dict(AgentConfig, settings)
    environments = make_environments(config, EVALUATION_SEED, make, copies=1)
    policy = make_policy(config, environments)
    load_weights(policy, directory)
    environments.observations.load_state_dict(load_state(directory)["agent"]["observations"])
    environments.observations.frozen = True
    return policy, environments, config


class _Run:
    """One seed."""

    def __init__(self, config: AgentConfig, seed: int, make: Make | None, quiet: bool) -> None:
        self.config, self.seed, self.make, self.quiet = config, seed, make, quiet
        self.out = Path(config.run.out) / f"seed-{seed}"
        self.agent = make_agent(config, seed, make)
        self.best = -float("inf")
        if config.run.resume:
            checkpoint = restore_checkpoint(self.out)
            state = load_state(checkpoint)
            self._check_settings(state["config"])
            load_weights(self.agent.policy, checkpoint)
            self.agent.load_state_dict(state["agent"])
            self.best = state["best"]
        self.log = MetricsLog(self.out, self.agent.steps, config.run.tensorboard)
        self.evaluations: Environments | None = None
        self._numbers: list[dict[str, float]] = []
        self._returns: list[float] = []
        self._lengths: list[int] = []
        self._clock, self._logged_steps, self._logged_at = 0.0, self.agent.steps, 0.0

    def fit(self) -> Result:
        run, agent, began, first = self.config.run, self.agent, time.monotonic(), self.agent.steps
        try:
            while agent.steps < run.steps:
                before, at = agent.steps, time.monotonic()
                iteration = agent.iterate()
                self._clock += time.monotonic() - at
                self._numbers.append(iteration.numbers)
                self._returns += [episode.total for episode in iteration.episodes]
                self._lengths += [episode.length for episode in iteration.episodes]
                ended = agent.steps >= run.steps
                save = ended or _passed(before, agent.steps, run.save_every)
                if save or _passed(before, agent.steps, run.log_every):
                    self._write()
                if _passed(before, agent.steps, run.eval_every) and not ended:
                    self._evaluate(run.eval_episodes)
                if save and not ended:
                    self._save()
            greedy, sampled = self._evaluate(run.final_episodes)
            self._save()
        finally:
            self.log.close()
            agent.environments.close()
            if self.evaluations is not None:
                self.evaluations.close()
        rate = (agent.steps - first) / self._clock if self._clock else 0.0
        return Result(self.seed, agent.steps, greedy, sampled, time.monotonic() - began, rate, self.out)

    def _write(self) -> None:
        """A line in the log: means since the last one."""
        if not self._numbers:
            return
        names = dict.fromkeys(name for numbers in self._numbers for name in numbers)
        record: dict[str, Any] = {"step": self.agent.steps}
        for name in names:
            record[name] = statistics.fmean(numbers[name] for numbers in self._numbers if name in numbers)
        if self._returns:
            record["episodes"] = len(self._returns)
            record["episode_return"] = statistics.fmean(self._returns)
            record["episode_length"] = statistics.fmean(self._lengths)
        seconds = self._clock - self._logged_at
        record["steps_per_second"] = (self.agent.steps - self._logged_steps) / max(seconds, 1e-9)
        self.log.write([record])
        self._numbers, self._returns, self._lengths = [], [], []
        self._logged_steps, self._logged_at = self.agent.steps, self._clock

    def _evaluate(self, episodes: int) -> tuple[Evaluation, Evaluation | None]:
        policy = self.agent.policy
        if self.evaluations is None:
            self.evaluations = make_environments(
                self.config, EVALUATION_SEED, self.make, min(10, episodes), policy.observations
            )
        greedy = evaluate(actions_of(policy), self.evaluations, episodes)
        record: dict[str, Any] = {"step": self.agent.steps, "evaluation_return": greedy.mean}
        record |= {"evaluation_deviation": greedy.deviation, "evaluation_length": greedy.mean_length}
        sampled = None
        if self.config.algorithm != "dqn":
            sampled = evaluate(actions_of(policy, greedy=False, seed=self.seed), self.evaluations, episodes)
            record["evaluation_return_sampled"] = sampled.mean
        self.log.write([record])
        if not self.quiet:
            print(f"seed {self.seed}, step {self.agent.steps:>9,}: return {greedy.mean:.2f} ± {greedy.deviation:.2f}")
        if greedy.mean > self.best:
            self.best = greedy.mean
            if self.config.run.keep_best:
                self._save("best")
        return greedy, sampled

    def _save(self, name: str = NEWEST) -> None:
        settings = to_dict(self.config)
        state = {"step": self.agent.steps, "config": settings, "best": self.best, "agent": self.agent.state_dict()}
        save_checkpoint(self.out / name, SavedPolicy(self.agent.policy, settings), None, state)

    def _check_settings(self, saved: dict[str, Any]) -> None:
        ours, theirs = _decisive(to_dict(self.config)), _decisive(saved)
        for name in ours:
            if name in theirs and ours[name] != theirs[name]:
                raise ValueError(f"{name}: got {ours[name]!r}, and the run in {self.out} has {theirs[name]!r}")


def _train_seed(config: AgentConfig, seed: int, make: Make | None, quiet: bool) -> Result:
    return _Run(config, seed, make, quiet).fit()


def _decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a step computes: the algorithm's own, the policy's, the environment's."""
    run = settings.get("run", {})
    others = {key: value for key, value in settings.items() if key not in ("seeds", "first_seed", "run")}
    used = {key: value for key, value in others.items() if key not in AGENTS or key == settings["algorithm"]}
    return decisive(used) | {f"run.{name}": run[name] for name in ("copies", "bonus") if name in run}


def _passed(before: int, now: int, every: int) -> bool:
    return bool(every) and before // every != now // every


def _options(options: tuple[str, ...]) -> dict[str, Any]:
    """``NAME=VALUE`` as arguments; a value that is no literal of Python is a text."""
    values: dict[str, Any] = {}
    for option in options:
        name, value = option.split("=", 1)
        try:
            values[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name.strip()] = value
    return values
