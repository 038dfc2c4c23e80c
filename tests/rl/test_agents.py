"""Every algorithm learns what takes seconds, repeats itself, resumes to the bit, and stays put without rewards."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("gymnasium", reason="gymnasium is not installed")

from fastformer.rl import (
    PPO,
    Environments,
    GeneratedTextPolicy,
    PPOConfig,
    actions_of,
    evaluate,
    load_policy,
    make_agent,
    preset,
    train,
)
from fastformer.rl.agent import BadUpdateError
from fastformer.rl.config import AgentConfig, RunConfig
from fastformer.rl.plots import mean_and_spread
from fastformer.training.config import from_dict
from fastformer.training.logs import read_metrics
from tests.rl.test_policies import Letters, small_model
from tests.rl.toys import Chooser, Identity, Line, recall_of_two, unrewarded

ALGORITHMS = ("dqn", "reinforce", "a2c", "ppo")
QUICK = {
    "dqn": {
        "learning_starts": 100,
        "learning_rate": 3e-3,
        "train_every": 16,
        "gradient_steps": 8,
        "target_every": 100,
        "exploration": 0.5,
    },
    "reinforce": {"learning_rate": 1e-2},
    "a2c": {"learning_rate": 1e-2, "normalise": True},
    "ppo": {"steps": 16, "minibatch": 64, "epochs": 4, "learning_rate": 1e-2},
}


def settings(algorithm, out, *, steps=2000, policy=None, run=None, **changes):
    values = {
        "algorithm": algorithm,
        "policy": {"hidden": (32,), **(policy or {})},
        algorithm: {**QUICK[algorithm], "discount": 0.0, **changes},
        "run": {
            "out": str(out),
            "steps": steps,
            "copies": 8,
            "eval_every": 0,
            "final_episodes": 20,
            "log_every": 200,
            "save_every": 0,
            "tensorboard": False,
            **(run or {}),
        },
    }
    return from_dict(AgentConfig, values)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_identity_is_learnt(algorithm, tmp_path):
    result = train(settings(algorithm, tmp_path), make=Identity, quiet=True)[0]
    assert result.greedy.mean > 9.5, "ten is the best, 3.3 is chance"
    assert json.loads((tmp_path / "summary.json").read_text())["seeds"]["0"]["return"] == result.greedy.mean
    assert (tmp_path / "returns.png").stat().st_size > 1000
    policy, environments, _ = load_policy(result.out, make=Identity)
    assert evaluate(actions_of(policy), environments, 3).mean > 9.5


@pytest.mark.parametrize("changes", [{"dueling": True, "n_steps": 3}, {"prioritised": True, "double": False}])
def test_identity_is_learnt_with_every_switch_of_dqn(changes, tmp_path):
    result = train(settings("dqn", tmp_path, discount=0.5, **changes), make=Identity, quiet=True)[0]
    assert result.greedy.mean > 9


@pytest.mark.parametrize("algorithm", ["dqn", "ppo"])
def test_a_text_is_chosen_by_what_was_read(algorithm, tmp_path):
    # 1 of 2 or 3 by chance, 4 the best
    result = train(settings(algorithm, tmp_path, steps=2500, policy={"max_choices": 3}), make=Chooser, quiet=True)[0]
    assert result.greedy.mean > 3.5


def test_a_history_recalls_what_one_observation_cannot(tmp_path):
    with_history = settings("ppo", tmp_path / "a", steps=2500, epochs=8, policy={"history": 2})
    without = settings("ppo", tmp_path / "b", steps=2500)
    scores = [train(config, make=recall_of_two, quiet=True)[0].greedy.mean for config in (with_history, without)]
    assert scores[0] > 8 and scores[1] < 7  # 5 by chance


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_resuming_repeats_the_run_to_the_bit(algorithm, tmp_path):
    more = {"prioritised": True, "n_steps": 2} if algorithm == "dqn" else {}
    policy = {"normalise": True, "history": 2} if algorithm == "ppo" else {}
    run = {"save_every": 320, "bonus": 0.1}

    def config(out, **changes):
        made = settings(algorithm, tmp_path / out, steps=960, policy=policy, run=run, **more)
        return dataclasses.replace(made, run=dataclasses.replace(made.run, **changes))

    class Interrupt(Exception):
        pass

    def interrupting():
        environment = Identity()
        plain, count = environment.step, 0

        def step(action):
            nonlocal count
            count += 1
            if count == 60:  # of each of 8 copies, so between the checkpoints of steps 320 and 640
                raise Interrupt
            return plain(action)

        environment.step = step
        return environment

    whole = train(config("whole"), make=Identity, quiet=True)[0]
    with pytest.raises(RuntimeError, match="Interrupt"):
        train(config("cut"), make=interrupting, quiet=True)
    resumed = train(config("cut", resume=True), make=Identity, quiet=True)[0]
    records = [
        [{k: v for k, v in record.items() if k != "steps_per_second"} for record in read_metrics(result.out)]
        for result in (whole, resumed)
    ]
    assert records[0] == records[1] and whole.greedy == resumed.greedy
    again = train(config("again"), make=Identity, quiet=True)[0]
    assert again.greedy == whole.greedy
    with pytest.raises(FileExistsError, match=r"run\.out"):
        train(config("cut"), make=Identity, quiet=True)
    with pytest.raises(ValueError, match=r"run\.copies: got 4, and the run in"):
        train(config("cut", resume=True, copies=4), make=Identity, quiet=True)
    with pytest.raises(FileNotFoundError, match="no seed in"):
        train(config("new", resume=True), make=Identity, quiet=True)
    both = train(dataclasses.replace(config("cut", resume=True), seeds=2), make=Identity, quiet=True)
    assert both[0].greedy == whole.greedy and both[1].steps == whole.steps  # the second had not begun


@pytest.mark.parametrize("algorithm", ["reinforce", "a2c", "ppo"])
def test_without_rewards_nothing_changes(algorithm, tmp_path):
    agent = make_agent(settings(algorithm, tmp_path), 0, unrewarded)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    for _ in range(3):
        numbers = agent.iterate().numbers
        assert numbers["gradient_norm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters()))


def test_ppo_stops_where_the_policy_has_gone_too_far(tmp_path):
    config = settings("ppo", tmp_path, learning_rate=0.1, max_kl=1e-3, minibatch=1024, epochs=10)
    assert make_agent(config, 0, Identity).iterate().numbers["minibatches"] < 10


def test_a_loss_that_is_not_finite_is_named_and_changes_nothing(tmp_path):
    agent = make_agent(settings("a2c", tmp_path), 0, Line)
    with torch.no_grad():
        agent.policy.value_head.bias.fill_(float("inf"))
    before = agent.policy.head.layer.weight.detach().clone()
    with pytest.raises(BadUpdateError, match=r"a2c on Line, step 40, update 1: the loss is"):
        agent.iterate()
    assert torch.equal(before, agent.policy.head.layer.weight)


def test_a_language_model_learns_to_write_what_is_rewarded():
    """Only the first letter counts: the reward is 1 if the text begins with one of a to m."""

    class Writer(Chooser):
        def step(self, action):
            self.shown = ""
            *rest, _ = super().step("")
            return rest[0], float(action[:1] in tuple("abcdefghijklm")), *rest[2:], {}

    environments = Environments(Writer, 32, observation_options={"max_choices": 0})
    environments.reset()
    policy = GeneratedTextPolicy(environments.observations, small_model(), Letters(), max_new_tokens=2)
    config = PPOConfig(steps=1, epochs=4, minibatch=32, discount=0.0, learning_rate=1e-2)
    agent = PPO(policy, environments, config, total_steps=10_000)
    rewards = []
    for _ in range(12):
        agent.iterate()
        texts = policy.for_environment(
            policy.act(environments.current, generator=agent.generator), environments.current
        )
        rewards.append(sum(text[:1] in tuple("abcdefghijklm") for text in texts) / 32)
    assert rewards[0] < 0.8 and sum(rewards[-3:]) / 3 > 0.9


def test_the_plot_is_of_steps_that_at_least_half_of_the_seeds_measured():
    seeds = [[{"step": 10, "r": 1.0}, {"step": 20, "r": 5.0}, {"step": 30, "loss": 1.0}], [{"step": 20, "r": 7.0}], []]
    assert mean_and_spread(seeds, "r") == [(20, 6.0, 5.0, 7.0)]


def test_presets_and_settings():
    assert preset("ppo", "CartPole-v1").ppo.decay == 0.8
    assert preset("dqn", "Taxi-v4").run.copies == 1 and preset("dqn", "Taxi-v4").policy.activation == "relu"
    with pytest.raises(ValueError, match="algorithm: got 'sarsa'"):
        preset("sarsa", "CartPole-v1")
    with pytest.raises(ValueError, match=r"ppo\.clip"):
        PPOConfig(clip=0.0)
    with pytest.raises(ValueError, match=r"run\.steps"):
        RunConfig(steps=0)
    with pytest.raises(ValueError, match="environment_options"):
        AgentConfig(environment_options=("slippery",))


def test_the_command(tmp_path, capsys):
    from fastformer import cli

    arguments = ["rl", "--algorithm", "a2c", "--environment", "CartPole-v1", "--seeds", "2", "--run.steps", "400"]
    options = ["--run.out", str(tmp_path), "--run.final-episodes", "2", "--run.eval-every", "0", "--run.no-tensorboard"]
    assert cli.main([*arguments, *options]) == 0
    assert "seed 1: 400 steps" in capsys.readouterr().out and (tmp_path / "returns.png").is_file()
    assert cli.main(["rl", "--environment", "CartPole-v9", "--run.out", str(tmp_path / "none")]) == 1
    assert "CartPole-v9" in capsys.readouterr().err
