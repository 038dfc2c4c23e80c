"""What the applications of reinforcement learning share: training, the same test episodes for every policy, the report.

A policy is here a function ``(observation, info) -> action`` of Gymnasium's values, so that one made by hand, one that
is learnt and a person at the keyboard are the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastformer.evaluation import Evaluation, Mean, Record, evaluate
from fastformer.extras import require
from fastformer.rl import AgentConfig, Result, actions_of, load_policy, train
from fastformer.rl.plots import plot_returns
from fastformer.training.checkpoint import has_checkpoint
from fastformer.training.logs import read_metrics

from .common import Recipe, conclude

Policy = Callable[[Any, Mapping[str, Any]], Any]
Make = Callable[[], Any]
TEST_SEED = 2_000_000  # episodes that neither training nor its evaluations play


@dataclass(frozen=True)
class AgentRecipe(Recipe):
    """A recipe with an agent."""

    agent: AgentConfig = field(default_factory=AgentConfig)
    """Its environment is the recipe's, its run.out and first seed the recipe's too."""
    episodes: int = 500
    """In the test; every policy plays the same ones."""


def train_agents(recipe: Recipe, agent: AgentConfig, make: Make, folder: str = "agent") -> list[Result]:
    """Trains an agent for each of ``agent.seeds`` in ``recipe.out/folder``, and continues those that were begun."""
    out = Path(recipe.out, folder)
    seeds = range(recipe.seed, recipe.seed + agent.seeds)
    begun = recipe.resume and any(has_checkpoint(out / f"seed-{seed}") for seed in seeds)
    run = replace(agent.run, out=str(out), device=recipe.device, resume=begun)
    return train(replace(agent, first_seed=recipe.seed, environment=make.__name__, run=run), make=make)


def learnt(run: str | Path, make: Make, *, greedy: bool = True, seed: int = 0) -> Policy:
    """The policy that was trained into ``run``, a seed's directory or a checkpoint: its likeliest actions, or drawn."""
    policy, environments, _ = load_policy(run, make=make)
    environments.close()
    observations, act = environments.observations, actions_of(policy, greedy=greedy, seed=seed)
    if observations.history > 1:
        raise ValueError(f"run: the policy in {run} reads the last {observations.history} observations, expected one")
    one, old = np.arange(1), np.zeros(1, bool)

    def choose(observation: Any, info: Mapping[str, Any]) -> Any:
        return act(observations([(observation, info.get("choices"))], one, None, old))[0]

    return choose


def at_random(make: Make, seed: int = 0) -> Policy:
    """Any action; any of the choices where there are some."""
    generator, space = np.random.default_rng(seed), make().action_space

    def choose(observation: Any, info: Mapping[str, Any]) -> Any:
        if choices := info.get("choices"):
            return choices[int(generator.integers(len(choices)))]
        return int(space.start) + int(generator.integers(space.n))

    return choose


def play(policy: Policy, make: Make, seeds: Iterable[int]) -> Iterator[Record]:
    """An episode for each seed. The prediction is what it came to: ``return``, ``length``, and all of the last step's
    ``info["measures"]``; shown beside it is ``info["transcript"]``, what a person would want to read.
    """
    environment = make()
    try:
        for seed in seeds:
            observation, info = environment.reset(seed=seed)
            total, length, over = 0.0, 0, False
            while not over:
                observation, reward, terminated, truncated, info = environment.step(policy(observation, info))
                total, length, over = total + float(reward), length + 1, bool(terminated or truncated)
            outcome = {"return": total, "length": float(length), **info.get("measures", {})}
            yield Record(outcome, seed, {"seed": seed, **outcome, "transcript": info.get("transcript", "")})
    finally:
        environment.close()


def judge(
    policy: Policy, make: Make, measures: Sequence[str], episodes: int, records: str | Path | None = None
) -> Evaluation:
    """The means of ``measures`` over the test's episodes; the first one sorts them. ``-length`` is better if lower."""

    def mean(name: str) -> Mean:
        key = name.removeprefix("-")
        return Mean(key, lambda outcome, seed: outcome[key], lower_is_better=key != name)

    metrics = [mean(name) for name in measures]
    seeds = range(TEST_SEED, TEST_SEED + episodes)
    return evaluate(policy, seeds, metrics, predict=lambda policy, seeds: play(policy, make, seeds), records=records)


def report(
    recipe: AgentRecipe,
    policies: Mapping[str, Policy],
    make: Make,
    measures: Sequence[str],
    *,
    title: str,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Plays the test with each policy, ours first, and writes ``report.md``, ``records.jsonl`` and ``results.json``."""
    (ours, policy), *others = policies.items()
    evaluation = judge(policy, make, measures, recipe.episodes, Path(recipe.out, "records.jsonl"))
    baselines = {name: judge(other, make, measures, recipe.episodes) for name, other in others}
    return conclude(evaluation, recipe, title=title, baselines=baselines, more={"policy": ours, **(more or {})})


def plot_curves(runs: Mapping[str, Sequence[Result]], path: Path, *, title: str, **options: Any) -> Path:
    """Return over steps, a line and a band of seeds for each of ``runs``; options of ``plot_returns``."""
    return plot_returns({k: [read_metrics(r.out) for r in v] for k, v in runs.items()}, path, title=title, **options)


def check_environment(environment: Any) -> None:
    """Gymnasium's own check of an environment; raises what it finds, warnings too."""
    import warnings

    require("gymnasium", "the applications of reinforcement learning", "rl")
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(environment, skip_render_check=True)
