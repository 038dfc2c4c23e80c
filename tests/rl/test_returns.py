"""Returns and advantages against closed forms, and against stable-baselines3's."""

import numpy as np
import pytest
import torch

from fastformer.rl import discounted_returns, generalised_advantages, n_step_returns
from fastformer.rl.losses import approximate_kl, clipped_policy_loss, q_loss, td_targets, value_loss

NO = torch.zeros(4, 1, dtype=torch.bool)
REWARDS = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]


def at(*steps):
    flags = NO.clone()
    flags[list(steps)] = True
    return flags


def test_discounted_return_of_one_episode():
    returns = discounted_returns(REWARDS, at(3), NO, discount=0.5)[:, 0]
    assert returns.tolist() == [1 + 0.5 * (2 + 0.5 * (3 + 0.5 * 4)), 2 + 0.5 * (3 + 0.5 * 4), 3 + 0.5 * 4, 4]


def test_termination_has_no_future_truncation_has_and_neither_has_the_next_episode():
    values = torch.full((4, 1), 10.0)
    terminated = discounted_returns(REWARDS, at(1), NO, values, discount=0.5)[:, 0]
    truncated = discounted_returns(REWARDS, NO, at(1), values, discount=0.5)[:, 0]
    assert terminated.tolist() == [2.0, 2.0, 3 + 0.5 * (4 + 5), 4 + 5]
    assert truncated.tolist() == [1 + 0.5 * 7, 2 + 5, 3 + 0.5 * (4 + 5), 4 + 5]


def test_advantages_at_both_ends_of_the_decay():
    values, following = torch.rand(4, 1), torch.rand(4, 1)
    following[:3] = values[1:]
    args = (REWARDS, values, following, NO, NO)
    one_step = generalised_advantages(*args, discount=0.9, decay=0.0)
    torch.testing.assert_close(one_step, REWARDS + 0.9 * following - values)
    whole = generalised_advantages(*args, discount=0.9, decay=1.0)
    torch.testing.assert_close(whole, discounted_returns(REWARDS, NO, NO, following, discount=0.9) - values)


def test_n_steps_lie_between():
    values, following = torch.rand(4, 1), torch.rand(4, 1)
    following[:3] = values[1:]
    one = n_step_returns(REWARDS, NO, NO, following, discount=0.9, steps=1)
    torch.testing.assert_close(one, REWARDS + 0.9 * following)
    all_of_them = n_step_returns(REWARDS, NO, at(1), following, discount=0.9, steps=9)
    torch.testing.assert_close(all_of_them, discounted_returns(REWARDS, NO, at(1), following, discount=0.9))
    two = n_step_returns(REWARDS, at(2), NO, following, discount=0.9, steps=2)[:, 0]
    v = following[:, 0]
    torch.testing.assert_close(
        two, torch.stack([1 + 1.8 + 0.81 * v[1], torch.tensor(2 + 2.7), torch.tensor(3.0), 4 + 0.9 * v[3]])
    )


def test_advantages_are_those_of_stable_baselines3():
    buffers = pytest.importorskip("stable_baselines3.common.buffers", reason="stable-baselines3 is not installed")
    from gymnasium import spaces

    generator = torch.Generator().manual_seed(0)
    steps, copies, discount, decay = 40, 3, 0.97, 0.9
    rewards, values = (torch.randn(steps, copies, generator=generator) for _ in range(2))
    terminated, truncated = (torch.rand(steps, copies, generator=generator) < 0.1 for _ in range(2))
    truncated &= ~terminated
    last, final = torch.randn(copies, generator=generator), torch.randn(steps, copies, generator=generator)
    following = torch.where(truncated, final, torch.cat([values[1:], last[None]]))
    mine = generalised_advantages(rewards, values, following, terminated, truncated, discount=discount, decay=decay)

    box = spaces.Box(-1, 1, (1,))
    peer = buffers.RolloutBuffer(steps, box, spaces.Discrete(2), "cpu", decay, discount, copies)
    starts = np.zeros(copies)
    for t in range(steps):  # a truncated step's future is added to its reward there
        reward = rewards[t] + discount * final[t] * truncated[t]
        blank = np.zeros((copies, 1))
        peer.add(blank, blank, reward.numpy(), starts, values[t][:, None], torch.zeros(copies))
        starts = (terminated[t] | truncated[t]).numpy().astype(np.float32)
    peer.compute_returns_and_advantage(last, starts)
    np.testing.assert_allclose(mine.numpy(), peer.advantages, rtol=0, atol=1e-5)


def test_bad_shapes_and_numbers_are_named():
    with pytest.raises(ValueError, match="next_values"):
        generalised_advantages(REWARDS, REWARDS, REWARDS[:2], NO, NO, discount=0.9, decay=0.9)
    with pytest.raises(ValueError, match="decay"):
        generalised_advantages(REWARDS, REWARDS, REWARDS, NO, NO, discount=0.9, decay=1.5)
    with pytest.raises(ValueError, match="steps"):
        n_step_returns(REWARDS, NO, NO, REWARDS, discount=0.9, steps=0)


def test_clipped_loss_has_no_gradient_where_the_ratio_has_gone_far_enough():
    old = torch.zeros(4)
    log_probs = torch.tensor([1.3, 0.7, 1.3, 0.7]).log().requires_grad_()
    clipped_policy_loss(log_probs, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2).backward()
    # r A is kept where it would get worse: too likely and bad, too unlikely and good
    torch.testing.assert_close(log_probs.grad, torch.tensor([0.0, -0.7, 1.3, 0.0]) / 4)
    assert approximate_kl(log_probs.detach(), old) > 0 and approximate_kl(old, old) == 0


def test_value_loss_takes_the_larger_of_both():
    values, returns, old = torch.tensor([2.0]), torch.tensor([2.0]), torch.tensor([0.0])
    assert value_loss(values, returns) == 0
    assert value_loss(values, returns, old, 0.5) == 0.5 * 1.5**2


def test_double_q_takes_the_targets_value_of_the_online_choice():
    rewards, discounts = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.5, 0.0, 0.5])
    target = torch.tensor([[1.0, 5.0], [9.0, 9.0], [-torch.inf, -torch.inf]])
    online = torch.tensor([[3.0, 2.0], [0.0, 0.0], [-torch.inf, -torch.inf]])
    assert td_targets(rewards, discounts, target).tolist() == [3.5, 1.0, 1.0]
    assert td_targets(rewards, discounts, target, online).tolist() == [1.5, 1.0, 1.0]
    assert (
        q_loss(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.5])).item()
        == (0.125 + 1.25) / 2
    )
