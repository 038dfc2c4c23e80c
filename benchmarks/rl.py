"""Agents beside stable-baselines3, and against random and hand-made policies.

    python -m benchmarks.rl speed                   steps a second and returns on CartPole, both in one process
    python -m benchmarks.rl targets --seeds 3       what each agent is meant to reach, and whether it does
    python -m benchmarks.rl targets --jobs frozenlake textworld

--keep writes the table to benchmarks/results/<machine>/. `speed` gives both the settings of rl-baselines3-zoo, the same
budget and one thread, and lets them take turns; evaluation, 100 greedy episodes, is not in the time. `targets` runs
`fastformer rl`'s own presets.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.machine import keep
from fastformer.rl import Environments, evaluate, preset, random_actions, train
from fastformer.rl.run import EVALUATION_SEED

SPEED = {"ppo": 100_000, "a2c": 100_000, "dqn": 50_000}  # steps
EPISODES = 100


@dataclass(frozen=True)
class Target:
    """An agent, and the mean return that it is to reach; 0 where beating the others is the goal."""

    algorithm: str
    environment: str
    goal: float = 0.0
    by_hand: Callable[[str], Any] | None = None


def cross_the_lake(row: Any) -> int:
    """The shortest way over the ice, as if it were not slippery."""
    return {0: 1, 4: 1, 8: 2, 9: 1, 13: 2, 14: 2, 1: 2, 2: 1, 6: 1, 10: 1, 3: 0}.get(int(row.argmax()), 1)


def go_to_the_door(text: str) -> int:
    """Turns until the door is seen, walks towards it, is done beside it."""
    colour = text.split(" door")[0].split()[-1]
    found = re.search(rf"\w+ {colour} door(?: (\d+) ahead)?(?: (\d+) (left|right))?", text.split(". ", 1)[-1])
    if found is None:
        return 1
    ahead, aside = int(found[1] or 0), int(found[2] or 0)
    if ahead + aside == 1:
        return 6
    if ahead > 1 and "wall ahead" not in text:
        return 2
    return 0 if found[3] == "left" else 1


def explore(text: str, choices: list[str], seen: set[tuple[str, str]]) -> str:
    """What has not been tried here, taking and opening first; then anything in turn."""
    order = ("take", "unlock", "open", "insert", "put", "lock", "close", "go", "drop", "look", "examine", "inventory")
    ranked = sorted(
        choices, key=lambda c: ((text, c) in seen, next((i for i, w in enumerate(order) if c.startswith(w)), 99))
    )
    seen.add((text, ranked[0]))
    return ranked[0]


TARGETS = {
    "cartpole-dqn": Target("dqn", "CartPole-v1", 475),
    "cartpole-ppo": Target("ppo", "CartPole-v1", 475),
    "cartpole-a2c": Target("a2c", "CartPole-v1", 475),
    "frozenlake": Target("ppo", "FrozenLake-v1", by_hand=cross_the_lake),
    "minigrid": Target("ppo", "MiniGrid-GoToDoor-5x5-v0", by_hand=go_to_the_door),
    "textworld": Target("dqn", "textworld:small", by_hand=explore),
}


def speed(jobs: list[str], seeds: int, scale: float) -> str:
    """Steps a second and returns of both, in turns."""
    lines = [
        "| algorithm | steps | fastformer steps/s | stable-baselines3 | ratio | return | stable-baselines3 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in jobs:
        steps = int(SPEED[name] * scale)
        ours, theirs = [], []
        for seed in range(seeds):
            for measure, into in ((run_ours, ours), (run_peer, theirs))[:: 1 if seed % 2 == 0 else -1]:
                into.append(measure(name, steps, seed))
                print(
                    f"{name} seed {seed} {measure.__name__[4:]}: {into[-1][0]:,.0f} steps/s, return {into[-1][1]:.1f}"
                )
        rates = [statistics.median(rate for rate, _ in runs) for runs in (ours, theirs)]
        returns = [", ".join(f"{value:.0f}" for _, value in runs) for runs in (ours, theirs)]
        lines.append(
            f"| {name} | {steps:,} | {rates[0]:,.0f} | {rates[1]:,.0f} | {rates[0] / rates[1]:.2f}× | "
            f"{returns[0]} | {returns[1]} |"
        )
    return "\n".join(lines)


def run_ours(name: str, steps: int, seed: int) -> tuple[float, float]:
    config = preset(name, "CartPole-v1")
    config = dataclasses.replace(config, dqn=dataclasses.replace(config.dqn, double=False))  # the peer's is not
    with tempfile.TemporaryDirectory() as out:
        run = dataclasses.replace(
            config.run, steps=steps, eval_every=0, final_episodes=EPISODES, tensorboard=False, out=out, save_every=0
        )
        result = train(dataclasses.replace(config, first_seed=seed, run=run), quiet=True)[0]
    return result.steps_per_second, result.greedy.mean


def run_peer(name: str, steps: int, seed: int) -> tuple[float, float]:
    import stable_baselines3 as sb3
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    torch.set_num_threads(1)

    def falling(first: float) -> Callable[[float], float]:
        return lambda left: left * first

    copies = 1 if name == "dqn" else 8
    environment = make_vec_env("CartPole-v1", n_envs=copies, seed=seed)
    options: dict[str, Any] = {
        "ppo": {
            "n_steps": 32,
            "batch_size": 256,
            "n_epochs": 20,
            "gae_lambda": 0.8,
            "gamma": 0.98,
            "learning_rate": falling(1e-3),
            "clip_range": falling(0.2),
        },
        "a2c": {"learning_rate": falling(7e-4)},
        "dqn": {
            "learning_rate": 2.3e-3,
            "batch_size": 64,
            "buffer_size": 100_000,
            "learning_starts": 1000,
            "gamma": 0.99,
            "target_update_interval": 10,
            "train_freq": 256,
            "gradient_steps": 128,
            "exploration_fraction": 0.16,
            "exploration_final_eps": 0.04,
            "policy_kwargs": {"net_arch": [256, 256]},
        },
    }[name]
    model = getattr(sb3, name.upper())("MlpPolicy", environment, seed=seed, device="cpu", **options)
    began = time.perf_counter()
    model.learn(steps)
    rate = steps / (time.perf_counter() - began)
    mean, _ = evaluate_policy(model, make_vec_env("CartPole-v1", n_envs=10, seed=EVALUATION_SEED), EPISODES)
    return rate, float(mean)


def targets(jobs: list[str], seeds: int, scale: float) -> str:
    """A row per agent: returns of its seeds, of chance, of a policy made by hand."""
    lines = ["| agent | steps | returns | random | by hand | reached |", "|---|---|---|---|---|---|"]
    for name in jobs:
        target = TARGETS[name]
        config = preset(target.algorithm, target.environment)
        run = dataclasses.replace(config.run, steps=int(config.run.steps * scale), out=f"runs/rl/{name}")
        config = dataclasses.replace(config, seeds=seeds, run=run)
        chance, by_hand = baselines(target, config)
        means = [result.greedy.mean for result in train(config)]
        reached = all(mean >= target.goal and mean > max(chance, by_hand or chance) for mean in means)
        lines.append(
            f"| {target.algorithm}, {target.environment} | {run.steps:,} | "
            f"{', '.join(f'{mean:.2f}' for mean in means)} | {chance:.2f} | "
            f"{'–' if by_hand is None else f'{by_hand:.2f}'} | {'yes' if reached else 'NO'} |"
        )
        print(lines[-1])
    return "\n".join(lines)


def baselines(target: Target, config: Any) -> tuple[float, float | None]:
    """Mean returns of chance, and of the policy made by hand."""
    options = {"max_choices": config.policy.max_choices}
    with Environments(target.environment, 1, EVALUATION_SEED, observation_options=options) as environments:
        episodes = config.run.final_episodes
        chance = evaluate(random_actions(environments), environments, episodes).mean
        if target.by_hand is None:
            return chance, None
        texts, seen = environments.observations.texts.texts, set()  # type: ignore[var-annotated]

        def act(rows: Any) -> list[Any]:
            row, table = rows[0], environments.observations.texts.texts
            if environments.observations.chooses:
                return [target.by_hand(table[row[0]], [table[n] for n in row[1:].tolist() if n >= 0], seen)]
            return [target.by_hand(table[row[0]] if texts else row)]

        return chance, evaluate(act, environments, episodes).mean


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "targets"))
    parser.add_argument("--jobs", nargs="*", help="ppo, a2c, dqn; or targets: " + ", ".join(TARGETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the budgets, to try it out")
    parser.add_argument("--keep", action="store_true", help="write the table to the results")
    arguments = parser.parse_args()
    known = SPEED if arguments.what == "speed" else TARGETS
    jobs = arguments.jobs or list(known)
    if unknown := set(jobs) - set(known):
        parser.error(f"--jobs: {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
    table = (speed if arguments.what == "speed" else targets)(jobs, arguments.seeds, arguments.scale)
    print(table)
    if arguments.keep:
        command = f"python -m benchmarks.rl {arguments.what} --jobs {' '.join(jobs)} --seeds {arguments.seeds}"
        keep(f"rl_{arguments.what}", table, command)


if __name__ == "__main__":
    main()
