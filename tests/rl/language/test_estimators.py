"""Estimators against closed forms, and against TRL's own functions where it offers them."""

import math

import pytest
import torch

from fastformer.rl.language.estimators import (
    aggregate,
    clipped_policy_loss,
    clipped_value_loss,
    dpo_loss,
    generalised_advantages,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    pairwise_reward_loss,
    whiten,
)


def test_estimates_of_the_divergence_against_its_closed_form():
    torch.manual_seed(0)
    p, q = (torch.randn(6, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (p.exp() * (p - q)).sum()
    expected = {name: (p.exp() * kl_estimate(p, q, name)).sum() for name in ("k1", "k3")}  # over all samples of p
    torch.testing.assert_close(expected, {"k1": exact, "k3": exact})
    near = torch.log_softmax(p + 1e-3 * torch.randn(6, dtype=torch.float64), 0)  # k2's bias vanishes nearby
    small = (p.exp() * (p - near)).sum()
    assert (p.exp() * kl_estimate(p, near, "k2")).sum() == pytest.approx(float(small), rel=1e-2)
    far = torch.linspace(-30, 30, 101)
    assert (kl_estimate(far, torch.zeros(101), "k3") >= 0).all()
    assert kl_estimate(p, p, "k3").eq(0).all()
    with pytest.raises(ValueError, match="estimator: got 'k4', expected one of k1, k2, k3"):
        kl_estimate(p, q, "k4")


def test_group_advantages_and_what_an_even_group_teaches():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    centred = torch.tensor([0.5, -0.5, -0.5, 0.5])
    scaled = group_advantages(rewards)
    torch.testing.assert_close(scaled[0], centred / (math.sqrt(1 / 3) + 1e-4))
    torch.testing.assert_close(group_advantages(rewards, scale=False)[0], centred)
    torch.testing.assert_close(leave_one_out_advantages(rewards)[0], torch.tensor([2.0, -2.0, -2.0, 2.0]) / 3)
    for advantages in (scaled, group_advantages(rewards, scale=False), leave_one_out_advantages(rewards)):
        assert advantages[1].eq(0).all()  # exactly, though the mean of four 0.1 is not 0.1
    with pytest.raises(ValueError, match=r"rewards: shape \(2, 1\) is not \(P, G\) with groups of 2 or more"):
        group_advantages(rewards[:, :1])


def test_generalised_advantages_against_the_sum_of_the_paper():
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    for row, (first, last) in enumerate(((0, 7), (2, 5), (6, 7))):  # whole, in the middle, one token
        mask[row, first:last] = True
    gamma, lam = 0.9, 0.8
    advantages, returns = generalised_advantages(rewards, values, mask, gamma=gamma, lam=lam)
    expected = torch.zeros(3, 7, dtype=torch.float64)
    for row in range(3):
        places = mask[row].nonzero().flatten().tolist()
        deltas = [
            rewards[row, t] + (gamma * values[row, t + 1] if t + 1 in places else 0.0) - values[row, t] for t in places
        ]
        for i, t in enumerate(places):
            expected[row, t] = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[i:]))
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0.0))
    # lam = 1 without a discount: what is still to come, less the value.
    plain, _ = generalised_advantages(rewards, values, torch.ones_like(mask), lam=1.0)
    torch.testing.assert_close(plain, rewards.flip(1).cumsum(1).flip(1) - values)


def test_the_clipped_ratio_has_no_gradient_beyond_its_bounds():
    old = torch.zeros(4, dtype=torch.float64)
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5], dtype=torch.float64)
    log_probs = ratio.log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    losses, ratios, clipped = clipped_policy_loss(log_probs, old, advantages, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(losses, torch.tensor([-1.3, 1.5, -0.5, 0.8], dtype=torch.float64))
    assert clipped.tolist() == [True, False, False, True]
    torch.testing.assert_close(ratios, ratio)
    losses.sum().backward()
    torch.testing.assert_close(log_probs.grad, torch.where(clipped, 0.0, -advantages * ratio))
    torch.testing.assert_close(
        clipped_value_loss(torch.tensor([1.0, 0.1]), torch.zeros(2), torch.tensor([0.9, 0.1]), clip=0.2),
        torch.tensor([0.245, 0.0]),  # held to 0.2, the first is further from 0.9
    )


def test_three_ways_to_add_up_and_whitening():
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])  # the last one has no token that counts
    assert aggregate(losses, mask, "sequence") == 2.0
    assert aggregate(losses, mask, "token") == 2.5
    assert aggregate(losses, mask, "constant", length=5) == pytest.approx(10 / 15)
    white = whiten(losses, mask)
    assert white[mask == 1].mean() == pytest.approx(0, abs=1e-6)
    assert white[mask == 1].std(correction=0) == pytest.approx(1, rel=1e-6)
    assert white[mask == 0].eq(0).all()
    with pytest.raises(ValueError, match="how: got 'sum'"):
        aggregate(losses, mask, "sum")


def test_preference_losses_against_closed_forms():
    chosen, rejected = torch.tensor([-3.0, -1.0]), torch.tensor([-4.0, -1.0])
    reference = torch.tensor([-3.5, -1.0]), torch.tensor([-3.5, -1.0])
    losses, better, worse = dpo_loss(chosen, rejected, *reference, beta=0.5)
    torch.testing.assert_close(losses, torch.tensor([math.log(1 + math.exp(-0.5)), math.log(2)]))
    torch.testing.assert_close(better - worse, torch.tensor([0.5, 0.0]))
    smoothed, _, _ = dpo_loss(chosen, rejected, *reference, beta=0.5, label_smoothing=0.1)
    torch.testing.assert_close(smoothed[0], losses[0] + 0.1 * 0.5)  # log sigmoid(x) - log sigmoid(-x) = x
    squares, _, _ = dpo_loss(chosen, rejected, *reference, beta=0.5, kind="ipo")
    torch.testing.assert_close(squares, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(
        pairwise_reward_loss(torch.tensor([2.0]), torch.tensor([1.0])), losses.new_tensor([0.3133]), atol=1e-4, rtol=0
    )


def test_the_numbers_of_trl():
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed (pip install trl)")
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    theirs = (rewards - rewards.nanmean(1, keepdim=True)) / (utils.nanstd(rewards, dim=1)[:, None] + 1e-4)
    torch.testing.assert_close(group_advantages(rewards), theirs)
    logits = torch.randn(3, 6, 11, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(2))
    log_probs = utils.selective_log_softmax(logits, ids)
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0])
    # grpo_trainer.py, _compute_loss: exp(ref - logp) - (ref - logp) - 1
    reference = log_probs + 0.1 * torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    theirs = torch.exp(reference - log_probs) - (reference - log_probs) - 1
    torch.testing.assert_close(kl_estimate(log_probs, reference), theirs, atol=1e-6, rtol=1e-4)
