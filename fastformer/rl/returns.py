"""What a step was worth: discounted returns, n-step returns and generalised advantages, over T steps of N copies.

All arrays are ``(T, N)``. ``next_values`` are the values of what each step led to: at an episode's end of its last
observation, not of the new episode's first. A step that terminated has no future; one that was truncated has its
``next_values``, and nothing of the steps after it, which belong to another episode.
"""

from __future__ import annotations

import torch
from torch import Tensor


def discounted_returns(
    rewards: Tensor, terminated: Tensor, truncated: Tensor, next_values: Tensor | None = None, *, discount: float
) -> Tensor:
    """G_t = r_t + discount · G_{t+1} (Sutton & Barto 2018, equation 3.9), up to the episode's end.

    Args:
        next_values: what is left out is estimated by: after a truncated step, and after the last one. None: 0.

    Returns:
        ``(T, N)``.
    """
    estimates = torch.zeros_like(rewards)
    if next_values is not None:
        estimated = truncated.clone()
        estimated[-1:] = True
        estimates = torch.where(estimated, next_values, estimates)
    zeros = torch.zeros_like(rewards)
    return generalised_advantages(rewards, zeros, estimates, terminated, truncated, discount=discount, decay=1.0)


def generalised_advantages(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    discount: float,
    decay: float,
) -> Tensor:
    """A_t = δ_t + discount · decay · A_{t+1}, δ_t = r_t + discount · V(s_{t+1}) − V(s_t).

    Schulman et al. 2016, "High-dimensional continuous control using generalized advantage estimation", equation 16.

    Args:
        values: V(s_t).
        decay: λ in [0, 1]; 0 is the one-step advantage, 1 the return minus the value.

    Returns:
        ``(T, N)``.

    Raises:
        ValueError: shapes that differ, or a discount or decay outside of [0, 1].
    """
    for name, array in (
        ("values", values),
        ("next_values", next_values),
        ("terminated", terminated),
        ("truncated", truncated),
    ):
        if array.shape != rewards.shape:
            raise ValueError(
                f"{name}: got shape {tuple(array.shape)}, expected that of rewards, {tuple(rewards.shape)}"
            )
    for name, number in (("discount", discount), ("decay", decay)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name}: got {number}, expected a number in [0, 1]")
    alive, goes_on = (~terminated).to(rewards.dtype), (~(terminated | truncated)).to(rewards.dtype)
    deltas = rewards + discount * alive * next_values - values
    kept = discount * decay * goes_on
    advantages = torch.empty_like(rewards)
    following = torch.zeros_like(rewards[0])
    for t in range(len(rewards) - 1, -1, -1):
        following = deltas[t] + kept[t] * following
        advantages[t] = following
    return advantages


def n_step_returns(
    rewards: Tensor, terminated: Tensor, truncated: Tensor, next_values: Tensor, *, discount: float, steps: int
) -> Tensor:
    """Σ_{k<n} discount^k r_{t+k} + discount^n V(s_{t+n}) (Sutton & Barto 2018, equation 7.1).

    n is ``steps``, or what is left of the episode or of the T steps.

    Returns:
        ``(T, N)``.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    alive, ends = (~terminated).to(rewards.dtype), terminated | truncated
    returns = torch.empty_like(rewards)
    length = len(rewards)
    for t in range(length):
        total, factor = torch.zeros_like(rewards[t]), torch.ones_like(rewards[t])
        for k in range(t, min(t + steps, length)):
            total = total + factor * rewards[k]
            factor = factor * discount
            last = torch.full_like(ends[k], k == min(t + steps, length) - 1) | ends[k]
            total = total + factor * torch.where(last, alive[k] * next_values[k], 0.0)
            factor = torch.where(ends[k], 0.0, factor)
        returns[t] = total
    return returns


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 − Var(returns − values) / Var(returns): 1 of a perfect critic, 0 of the mean; NaN without variance."""
    variance = returns.var(unbiased=False)
    return float(1 - (returns - values).var(unbiased=False) / variance) if variance > 0 else float("nan")
