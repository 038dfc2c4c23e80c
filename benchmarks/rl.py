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
import functools
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
from fastformer.rl.evaluate import Act
from fastformer.rl.run import EVALUATION_SEED

SPEED = {"ppo": 100_000, "a2c": 100_000, "dqn": 50_000}  # steps
EPISODES = 100


Rule = Callable[[Any, list[str], set[Any]], Any]  # what is observed, the choices, a set to remember by -> an action


@dataclass(frozen=True)
class Target:
    """An agent, and the mean return that it is to reach; 0 where beating chance and the rule by hand is the goal.

    ``best`` is as good as can be, or nearly, with the world's rules known: what there is to reach.
    """

    algorithm: str
    environment: str
    goal: float = 0.0
    by_hand: Rule | None = None
    best: Rule | None = None


def cross_the_lake(row: Any, choices: list[str], seen: set[Any]) -> int:
    """The shortest way over the ice, as if it were not slippery."""
    return {0: 1, 4: 1, 8: 2, 9: 1, 13: 2, 14: 2, 1: 2, 2: 1, 6: 1, 10: 1, 3: 0}.get(int(row.argmax()), 1)


def know_the_ice(row: Any, choices: list[str], seen: set[Any]) -> int:
    """The policy that value iteration finds where the ice's probabilities are known."""
    return _best_on_ice()[int(row.argmax())]


@functools.cache
def _best_on_ice() -> list[int]:
    import gymnasium

    world = gymnasium.make("FrozenLake-v1").unwrapped.P  # type: ignore[attr-defined]
    values, scores = [0.0] * len(world), [[0.0]] * len(world)
    for _ in range(2000):
        scores = [
            [
                sum(p * (reward + (0.0 if over else values[after])) for p, after, reward, over in world[place][action])
                for action in world[place]
            ]
            for place in world
        ]
        values = [max(of_place) for of_place in scores]
    return [of_place.index(max(of_place)) for of_place in scores]


def walk_to_the_door(text: str, choices: list[str], seen: set[Any]) -> int:
    """Turns until the door is seen, walks towards it, is done beside it. Beside a corner it turns to and fro."""
    ahead, aside, side = _door(text)
    if ahead + aside == 1:
        return 6
    if ahead > 1 and "wall ahead" not in text:
        return 2
    return 0 if side == "left" else 1


def go_to_the_door(text: str, choices: list[str], seen: set[Any]) -> int:
    """The same, walking on while nothing is in the way, which also takes it out of the corners."""
    ahead, aside, side = _door(text)
    if ahead + aside == 1:
        return 6
    if ahead and not re.search(r"wall ahead|door 1 ahead(?:\.|$)", text):
        return 2
    return 0 if side == "left" else 1


def _door(text: str) -> tuple[int, int, str]:
    """How far ahead the mission's door is, how far aside, and on which side; zeros where it is not seen."""
    mission, _, seen = text.partition(". ")
    colour = mission.removesuffix(" door").split()[-1]
    found = re.search(rf"\w+ {colour} door(?: (\d+) ahead)?(?: (\d+) (left|right))?(?:\.|$)", seen)
    return (int(found[1] or 0), int(found[2] or 0), found[3] or "") if found else (0, 0, "")


def explore(text: str, choices: list[str], seen: set[Any]) -> str:
    """Whatever has not been tried in this room yet, going on before taking; where all has been, the next way out."""
    order = ("unlock", "open", "close", "take", "put", "insert", "go", "lock", "drop", "look", "examine", "inventory")
    room = (re.findall(r"-= (.*?) =-", text) or [""])[0]

    def rank(choice: str) -> tuple[int, int]:
        tried = sum((room, choice, n) in seen for n in range(30))
        return tried, next((i for i, word in enumerate(order) if choice.startswith(word)), len(order))

    chosen = min(choices, key=rank)
    seen.add((room, chosen, rank(chosen)[0]))
    return chosen


TARGETS = {
    "cartpole-dqn": Target("dqn", "CartPole-v1", 475),
    "cartpole-ppo": Target("ppo", "CartPole-v1", 475),
    "cartpole-a2c": Target("a2c", "CartPole-v1", 475),
    "frozenlake": Target("ppo", "FrozenLake-v1", by_hand=cross_the_lake, best=know_the_ice),
    "minigrid": Target("ppo", "MiniGrid-GoToDoor-5x5-v0", by_hand=walk_to_the_door, best=go_to_the_door),
    "textworld": Target("dqn", "textworld:large", by_hand=explore),
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
    """A row per agent: returns of its seeds, of chance, of a rule by hand, of the best there is."""
    lines = [
        "| agent | steps | returns | random | by hand | the best there is | reached |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in jobs:
        target = TARGETS[name]
        config = preset(target.algorithm, target.environment)
        run = dataclasses.replace(config.run, steps=int(config.run.steps * scale), out=f"runs/rl/{name}")
        config = dataclasses.replace(config, seeds=seeds, run=run)
        chance, by_hand, best = baselines(target, config)
        means = [result.greedy.mean for result in train(config)]
        reached = all(mean >= target.goal and mean > max(chance, by_hand or chance) for mean in means)
        lines.append(
            f"| {target.algorithm}, {target.environment} | {run.steps:,} | "
            f"{', '.join(f'{mean:.2f}' for mean in means)} | {chance:.2f} | {_number(by_hand)} | {_number(best)} | "
            f"{'yes' if reached else 'NO'} |"
        )
        print(lines[-1])
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def baselines(target: Target, config: Any) -> tuple[float, float | None, float | None]:
    """Mean returns of chance, of the rule by hand, and of the best there is."""
    options = {"max_choices": config.policy.max_choices}
    with Environments(target.environment, 1, EVALUATION_SEED, observation_options=options) as environments:
        episodes = config.run.final_episodes
        chance = evaluate(random_actions(environments), environments, episodes).mean

        def played(rule: Rule | None) -> float | None:
            if rule is None:
                return None
            return evaluate(follow(rule, environments), environments, episodes).mean

        return chance, played(target.by_hand), played(target.best)


def follow(rule: Rule, environments: Environments) -> Act:
    """A rule as :func:`fastformer.rl.evaluate` takes it."""
    observations, seen = environments.observations, set()  # type: ignore[var-annotated]

    def act(rows: Any) -> list[Any]:
        texts = observations.texts.texts
        if not environments.state_dict()["episodes"][0]["actions"]:  # a new episode
            seen.clear()
        if not observations.is_text:
            return [rule(rows[0], [], seen)]
        choices = [texts[n] for n in rows[0][1:].tolist() if n >= 0]
        return [rule(texts[rows[0][0]], choices, seen)]

    return act


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
