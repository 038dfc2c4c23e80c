"""The applications' shared parts: every policy plays the same episodes, and what they came to is compared."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("gymnasium", reason="needs fastformer[rl]")
pytest.importorskip("matplotlib", reason="needs fastformer[train]")

import gymnasium
from gymnasium import spaces

from examples.agents import AgentRecipe, at_random, check_environment, judge, learnt, play, report, train_agents
from fastformer.rl import AgentConfig, PPOConfig, RunConfig

WORDS = spaces.Text(20, charset="abcdefghijklmnopqrstuvwxyz ")


class Doors(gymnasium.Env):
    """Three doors, one of them open; the right one in at most two tries."""

    observation_space = action_space = WORDS

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.open, self.tries, self.said = str(self.np_random.choice(["left", "middle", "right"])), 0, []
        return self.open, self._info()

    def step(self, action):
        self.tries += 1
        self.said.append(action)
        right = action == self.open
        return self.open, float(right), right, self.tries == 2, self._info()

    def _info(self):
        choices = ["left", "middle", "right"]
        return {"choices": choices, "measures": {"tries": float(self.tries)}, "transcript": " ".join(self.said)}


def recipe(out, **options):
    agent = AgentConfig(
        ppo=PPOConfig(steps=16, epochs=4, minibatch=32, learning_rate=1e-2),
        run=RunConfig(steps=1500, eval_every=0, final_episodes=10, tensorboard=False),
    )
    return AgentRecipe(out=str(out), agent=agent, episodes=60, **options)


def test_learnt_policy_plays_the_same_episodes_and_is_compared(tmp_path, capsys):
    check_environment(Doors())
    config = recipe(tmp_path)
    results = train_agents(config, config.agent, Doors)
    policies = {"PPO": learnt(results[0].out, Doors), "random": at_random(Doors)}
    found = report(config, policies, Doors, ["return", "-tries"], title="Doors")
    assert found["scores"]["this"]["return"] > 0.95 and found["scores"]["this"]["tries"] < 1.2
    assert 0.35 < found["scores"]["random"]["return"] < 0.75
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert len({record["seed"] for record in records}) == 60 and records[0]["transcript"]
    assert "random" in (tmp_path / "report.md").read_text() and "random" in capsys.readouterr().out
    before = results[0].greedy
    again = train_agents(replace(config, resume=True), config.agent, Doors)
    assert again[0].greedy == before
    with pytest.raises(FileExistsError, match="holds a checkpoint"):
        train_agents(config, config.agent, Doors)


def test_episodes_repeat_and_measures_are_the_last_step_s():
    first, second = ([r.prediction for r in play(at_random(Doors, 3), Doors, range(5))] for _ in range(2))
    assert first == second and all(outcome["tries"] == outcome["length"] for outcome in first)
    with pytest.raises(KeyError, match="unknown"):
        judge(at_random(Doors), Doors, ["unknown"], 2)
