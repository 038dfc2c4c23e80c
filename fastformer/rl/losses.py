"""The losses of the algorithms, as functions of what a batch of B steps came to."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def policy_gradient_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """−mean log π(a|s) · A (Williams 1992; Sutton & Barto 2018, section 13.4, with A = G − b(s) for REINFORCE).

    Args:
        log_probs, advantages: ``(B,)``; no gradient goes through the latter.
    """
    return -(log_probs * advantages.detach()).mean()


def clipped_policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """−mean min(r A, clamp(r, 1 − clip, 1 + clip) A), r = π(a|s) / π_old(a|s) (Schulman et al. 2017, equation 7)."""
    ratio = (log_probs - old_log_probs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def value_loss(values: Tensor, returns: Tensor, old_values: Tensor | None = None, clip: float = 0.0) -> Tensor:
    """½ mean (V − R)², or with ``clip`` the larger of that and the same of V kept within ``clip`` of the old value
    (Engstrom et al. 2020, "Implementation matters in deep policy gradients", section 2).

    Args:
        values, returns, old_values: ``(B,)``.
    """
    squares = (values - returns).square()
    if clip and old_values is not None:
        kept = old_values + (values - old_values).clamp(-clip, clip)
        squares = torch.max(squares, (kept - returns).square())
    return 0.5 * squares.mean()


def approximate_kl(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """KL(π_old ‖ π), estimated from actions of π_old by mean (r − 1) − log r, which is never negative
    (Schulman 2020, "Approximating KL divergence", k3)."""
    log_ratio = log_probs - old_log_probs
    return (log_ratio.exp() - 1 - log_ratio).mean()


def td_targets(rewards: Tensor, discounts: Tensor, next_target: Tensor, next_online: Tensor | None = None) -> Tensor:
    """r + discount · Q_target(s', a*), ``(B,)``.

    a* is the best by Q_target (Mnih et al. 2015, equation 3), or with ``next_online`` by Q (double Q-learning, van
    Hasselt et al. 2016, equation 4).

    Args:
        rewards: ``(B,)``, the sum over n steps.
        discounts: ``(B,)``, discount^n, and 0 after a termination.
        next_target, next_online: ``(B, A)``, -inf for an action that is not there.
    """
    best = (next_target if next_online is None else next_online).argmax(1, keepdim=True)
    values = next_target.gather(1, best)[:, 0]
    # Where an episode ended there may be no action at all.
    return rewards + discounts * values.masked_fill(values == -math.inf, 0.0)


def q_loss(q: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """mean weight · Huber(Q(s, a) − target), Huber's δ 1 (Mnih et al. 2015, methods; weights: Schaul et al. 2016,
    section 3.4).

    Args:
        q, targets, weights: ``(B,)``; no gradient goes through the targets.
    """
    return (weights * F.smooth_l1_loss(q, targets.detach(), reduction="none")).mean()
