"""The sum tree against a plain sum, draws against their probabilities, n steps against their definition."""

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium", reason="gymnasium is not installed")

from fastformer.rl import CountBonus, Environments, ReplayBuffer, SumTree, epsilon_greedy, linear_schedule
from tests.rl.toys import Line, truncated_line


def filled(count=7, make=Line, **options):
    environments = Environments(make, 2)
    buffer = ReplayBuffer(16, (1,), torch.float32, 2, discount=0.5, **options)
    rows = environments.reset()
    for i in range(count):
        actions = torch.tensor([i % 2, 1])
        step = environments.step(actions.tolist())
        buffer.add(rows, actions, step)
        rows = step.observations
    return buffer


def everything(buffer):
    """(observation, reward, next observation, discount) of all that is in the buffer."""
    columns = buffer.state_dict()["columns"]
    names = ("observations", "rewards", "next_observations", "discounts")
    return {tuple(float(columns[name][i]) for name in names) for i in range(len(buffer))}


def test_transitions_of_one_step():
    assert everything(filled(3)) == {(0, 1, 1, 0.5), (1, 2, 2, 0.5), (2, 3, 3, 0)}  # 3 is the end, not the new start
    assert (2, 3, 3, 0.5) in everything(filled(3, truncated_line))


def test_transitions_of_n_steps_end_with_the_episode():
    assert everything(filled(3, steps=2)) == {(0, 1 + 0.5 * 2, 2, 0.25), (1, 2 + 0.5 * 3, 3, 0), (2, 3, 3, 0)}
    assert (1, 2 + 0.5 * 3, 3, 0.25) in everything(filled(3, truncated_line, steps=2))


def test_the_oldest_go_first():
    buffer = filled(3)
    assert len(buffer) == 6 and len(filled(40)) == 16


def test_sum_tree_finds_what_a_running_sum_finds():
    generator = np.random.default_rng(0)
    numbers = np.where(generator.random(37) < 0.3, 0, generator.random(37))
    tree = SumTree(37)
    tree.set(np.arange(37), generator.random(37))
    tree.set(np.arange(37), numbers)
    assert tree.total == pytest.approx(numbers.sum())
    marks = generator.random(500) * tree.total
    assert (tree.find(marks) == np.searchsorted(np.cumsum(numbers), marks, side="right")).all()


def test_priorities_are_the_odds_and_weights_undo_them():
    buffer = filled(2, alpha=0.5)
    places = torch.arange(4)
    errors = torch.tensor([0.0, 1.0, 4.0, 9.0])
    buffer.set_priorities(places, errors, epsilon=1e-12)
    generator = torch.Generator().manual_seed(0)
    batch = buffer.sample(6000, generator, beta=1.0)
    counts = torch.bincount(batch.indices, minlength=4) / 6000
    torch.testing.assert_close(counts, torch.tensor([0, 1, 2, 3]) / 6, rtol=0, atol=0.01)
    weights = {int(i): float(w) for i, w in zip(batch.indices, batch.weights)}
    assert weights == pytest.approx({1: 1.0, 2: 1 / 2, 3: 1 / 3}, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"steps": 3}, {"alpha": 0.6}])
def test_a_saved_buffer_goes_on_as_if_nothing_had_been(options):
    buffer, other = filled(4, **options), filled(1, **options)
    other.load_state_dict(buffer.state_dict())
    batches = [b.sample(5, torch.Generator().manual_seed(3), 0.5) for b in (buffer, other)]
    for name, column in vars(batches[0]).items():
        assert torch.equal(column, getattr(batches[1], name)), name


def test_settings_and_an_empty_buffer_are_named():
    with pytest.raises(ValueError, match="capacity"):
        ReplayBuffer(1, (1,), torch.float32, 2, discount=0.5)
    with pytest.raises(ValueError, match="alpha"):
        ReplayBuffer(8, (1,), torch.float32, 2, discount=0.5, alpha=2.0)
    with pytest.raises(ValueError, match="empty"):
        filled(0).sample(1, torch.Generator())


def test_epsilon_greedy_never_takes_what_is_not_there():
    scores = torch.tensor([[1.0, 2.0, -torch.inf]]).repeat(400, 1)
    generator = torch.Generator().manual_seed(0)
    assert (epsilon_greedy(scores, 0.0, generator) == 1).all()
    drawn = torch.bincount(epsilon_greedy(scores, 1.0, generator), minlength=3)
    assert drawn[2] == 0 and abs(int(drawn[0]) - 200) < 50
    assert [linear_schedule(1.0, 0.1, 0.5, p) for p in (0, 0.25, 0.5, 1)] == [1.0, 0.55, 0.1, 0.1]


def test_count_bonus_falls_with_visits():
    bonus = CountBonus(2.0, size=0)
    rows = torch.tensor([[5], [5], [6]])
    torch.testing.assert_close(bonus(rows), torch.tensor([2.0, 2 / 2**0.5, 2.0]))
    numbers = CountBonus(1.0, size=3, seed=1)
    assert numbers(torch.eye(3)).tolist() == [1.0, 1.0, 1.0] and numbers(torch.eye(3)[:1]).item() == pytest.approx(
        0.5**0.5
    )
