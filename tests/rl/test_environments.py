"""Episodes begin and end where they should, in one process and in several; what an environment does wrong is named."""

import pytest
import torch

pytest.importorskip("gymnasium", reason="gymnasium is not installed")

from gymnasium.utils.env_checker import check_env

from fastformer.rl import (
    EnvironmentFailed,
    Environments,
    PolicyConfig,
    evaluate,
    make_agent,
    make_environment,
    random_actions,
)
from fastformer.rl.config import AgentConfig, RunConfig
from fastformer.rl.observations import RunningMoments
from tests.rl.toys import (
    Broken,
    Chooser,
    Continuous,
    Identity,
    Line,
    NothingToChoose,
    Wrong,
    broken_by_nan,
    truncated_line,
)


def test_an_ended_copy_is_reset_and_its_last_observation_kept():
    environments = Environments(Line, 2)
    assert environments.reset().tolist() == [[0.0], [0.0]]
    steps = [environments.step([0, 1]) for _ in range(3)]
    assert [step.observations[0].item() for step in steps] == [1.0, 2.0, 0.0]
    last = steps[-1]
    assert last.terminated.all() and not last.truncated.any() and last.rewards.tolist() == [3.0, 3.0]
    assert last.ended.tolist() == [0, 1] and last.final_observations.tolist() == [[3.0], [3.0]]
    assert last.successors().tolist() == [[3.0], [3.0]]
    assert [(episode.total, episode.length) for episode in last.episodes] == [(6.0, 3), (6.0, 3)]


def test_a_time_limit_truncates():
    environments = Environments(truncated_line, 1)
    environments.reset()
    step = [environments.step([0]) for _ in range(3)][-1]
    assert step.truncated.all() and not step.terminated.any()


def test_a_copy_that_waits_stays_as_it_is():
    environments = Environments(Line, 2)
    environments.reset()
    step = environments.step([0, 0], [True, False])
    assert step.observations.tolist() == [[1.0], [0.0]] and step.rewards.tolist() == [1.0, 0.0]


def test_discrete_numbers_are_one_hot_and_actions_begin_where_they_do():
    environments = Environments(lambda: Identity(values=4, start=5), 1, seed=3)
    row = environments.reset()
    step = environments.step([5 + int(row.argmax())])
    assert row.sum() == 1 and step.rewards.item() == 1.0


def test_history_is_padded_and_starts_anew_with_an_episode():
    environments = Environments(Line, 1, observation_options={"history": 2})
    rows = [environments.reset(), *(environments.step([0]).observations for _ in range(3))]
    # (observation, 1 where there is one), oldest first
    assert [row[0].tolist() for row in rows] == [
        [[0.0, 0.0], [0.0, 1.0]],
        [[0.0, 1.0], [1.0, 1.0]],
        [[1.0, 1.0], [2.0, 1.0]],
        [[0.0, 0.0], [0.0, 1.0]],
    ]


def test_running_moments_are_those_of_all_rows():
    rows = torch.randn(50, 3).double().numpy() * 4 + 2
    moments = RunningMoments(3)
    for part in (rows[:7], rows[7:8], rows[8:]):
        moments.update(part)
    torch.testing.assert_close(torch.from_numpy(moments.mean), torch.from_numpy(rows.mean(0)))
    torch.testing.assert_close(torch.from_numpy(moments.variance), torch.from_numpy(rows.var(0)))


def test_processes_do_what_one_does():
    seen = []
    for processes in (0, 2):
        with Environments(Chooser, 3, seed=5, processes=processes) as environments:
            rows = [environments.reset()]
            for _ in range(6):
                act = random_actions(environments, seed=len(rows))
                rows.append(environments.step(act(environments.current)).observations)
            seen.append((torch.stack(rows), environments.observations.texts.texts))
    assert torch.equal(seen[0][0], seen[1][0]) and seen[0][1] == seen[1][1]


def test_state_is_the_present_episodes_played_again():
    def play(environments, steps):
        return torch.stack([environments.step([i % 3, 0]).observations for i in range(steps)])

    first = Environments(Identity, 2, seed=1)
    first.reset()
    play(first, 13)
    second = Environments(Identity, 2, seed=1)
    second.reset()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.current, second.current)
    assert torch.equal(play(first, 15), play(second, 15))


def test_evaluation_gives_every_copy_its_share_and_repeats():
    environments = Environments(Identity, 3, seed=2, observation_options={"normalise": True})
    runs = [evaluate(random_actions(environments, 7), environments, 7) for _ in range(2)]
    assert len(runs[0].episodes) == 7 and runs[0] == runs[1]
    assert environments.observations.moments.count == 0  # evaluation leaves the statistics alone


@pytest.mark.parametrize(
    ("make", "processes", "message"),
    [
        (Broken, 0, r"environment Broken, copy 0, episode 0, step 2: step\(1\) raised KeyError: 'no such room'"),
        (Broken, 1, r"environment Broken, copy 0, episode 0, step 2: step\(1\) raised KeyError: 'no such room'"),
        (broken_by_nan, 0, r"environment broken_by_nan, copy 0, episode 0, step 2: the reward is nan"),
    ],
)
def test_a_failure_names_environment_episode_and_step(make, processes, message):
    with Environments(make, 1, processes=processes) as environments:
        environments.reset()
        environments.step([1])
        with pytest.raises(EnvironmentFailed, match=message):
            environments.step([1])


def test_nothing_to_choose_from_is_an_error():
    environments = Environments(NothingToChoose, 1)
    environments.reset()
    with pytest.raises(
        EnvironmentFailed, match="NothingToChoose, copy 0, episode 0, step 1: there is nothing to choose"
    ):
        environments.step(["take the red one"])


def test_wrong_spaces_and_settings_are_named():
    with pytest.raises(ValueError, match=r"environment: Wrong has observations Dict.*expected Box"):
        Environments(Wrong, 1)
    with pytest.raises(ValueError, match=r"environment: Continuous has actions Box.*expected Discrete"):
        make_agent(AgentConfig(run=RunConfig(copies=1)), 0, Continuous)
    with pytest.raises(ValueError, match="max_choices: got 1, and Chooser has"):
        Environments(Chooser, 1, observation_options={"max_choices": 1}).reset()
    with pytest.raises(ValueError, match="'NoSuchThing-v0' cannot be made"):
        make_environment("NoSuchThing-v0")
    with pytest.raises(ValueError, match="copies"):
        Environments(Line, 0)
    with pytest.raises(ValueError, match="actions: got 1"):
        environments = Environments(Line, 2)
        environments.reset()
        environments.step([0])
    with pytest.raises(ValueError, match=r"policy\.heads"):
        PolicyConfig(heads=3)


@pytest.mark.filterwarnings("ignore:.*unwrapped")
def test_minigrid_in_words():
    pytest.importorskip("minigrid", reason="minigrid is not installed")
    environment = make_environment("MiniGrid-GoToDoor-5x5-v0")
    text, _ = environment.reset(seed=0)
    assert text.startswith("go to the green door. a closed ")
    assert environment.step(0)[0] != text
    check_env(environment, skip_render_check=True)
    environment.close()


@pytest.mark.filterwarnings("ignore:Game|.*unwrapped")
@pytest.mark.slow  # compiles a game
def test_textworld(tmp_path):
    pytest.importorskip("textworld", reason="textworld is not installed")
    game = make_environment("textworld:small", {"directory": str(tmp_path), "max_steps": 3})
    text, info = game.reset(seed=0)
    assert "go east" in info["choices"] or len(info["choices"]) > 1
    for command in info["walkthrough"]:
        text, reward, terminated, _, info = game.step(command)
    assert terminated and reward == 1 and text
    game.reset()
    assert [game.step("look")[3] for _ in range(3)] == [False, False, True]
    check_env(game, skip_render_check=True)
    with pytest.raises(ValueError, match="textworld:huge"):
        make_environment("textworld:huge")
