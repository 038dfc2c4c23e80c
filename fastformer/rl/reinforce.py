"""REINFORCE with a baseline (Williams 1992; Sutton & Barto 2018, section 13.4).

An iteration is one whole episode of every copy. The gradient is that of −mean log π(a|s) (G − b(s)), G the discounted
return of the rest of the episode, b a value network, the mean return, or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..training.config import _check
from .agent import Iteration, OnPolicyAgent, describe
from .losses import policy_gradient_loss, value_loss
from .returns import discounted_returns


@dataclass(frozen=True)
class ReinforceConfig:
    """REINFORCE."""

    learning_rate: float = 3e-3
    """Of Adam."""
    adam_eps: float = 1e-8
    """Of Adam."""
    anneal: bool = False
    """Learning rate to 0 over the run, along a line."""
    clip_norm: float = 0.5
    """Largest norm of the gradient; 0 does not clip."""
    discount: float = 0.99
    """γ."""
    baseline: Literal["value", "mean", "none"] = "value"
    """What returns are compared with."""
    normalise: bool = False
    """Advantages of an iteration to a deviation of 1."""
    entropy: float = 0.0
    """Weight of the policy's entropy."""
    value_weight: float = 0.5
    """Weight of the value network's loss."""

    def __post_init__(self) -> None:
        _check("reinforce", self, *common_rules(self), ("baseline", "value, mean or none", self.baseline in BASELINES))


BASELINES = ("value", "mean", "none")


class Reinforce(OnPolicyAgent):
    """See the module."""

    name = "reinforce"
    config: ReinforceConfig

    def iterate(self) -> Iteration:
        config, policy = self.config, self.policy
        rollout, episodes = self.collect(0)
        valid = rollout.valid
        next_values = torch.zeros_like(rollout.rewards)
        if config.baseline == "value" and rollout.truncated.any():  # the rest of a truncated episode has to be guessed
            next_values[rollout.final_at[:, 0], rollout.final_at[:, 1]] = self.values(rollout.final_observations)
        returns = discounted_returns(
            rollout.rewards, rollout.terminated, rollout.truncated, next_values, discount=config.discount
        )[valid].to(self.device)
        rows, actions = rollout.observations[valid].to(self.device), rollout.actions[valid].to(self.device)
        log_probs, entropy = policy.evaluate(rows, actions)
        values = policy.values(rows) if config.baseline == "value" else torch.zeros_like(returns)
        advantages = returns - (returns.mean() if config.baseline == "mean" else values.detach())
        if config.normalise:
            advantages = advantages / (advantages.std(unbiased=False) + 1e-8)
        policy_loss, critic_loss = policy_gradient_loss(log_probs, advantages), value_loss(values, returns)
        loss = policy_loss - config.entropy * entropy.mean()
        if config.baseline == "value":
            loss = loss + config.value_weight * critic_loss
        norm = self.learn(loss)
        numbers = {
            "policy_loss": float(policy_loss.detach()),
            "value_loss": float(critic_loss.detach()),
            "entropy": float(entropy.detach().mean()),
            "gradient_norm": norm,
            **describe(episodes, values.detach(), returns),
        }
        return Iteration(numbers, episodes)


def common_rules(config) -> tuple[tuple[str, str, bool], ...]:
    """What every algorithm's configuration has to be."""
    return (
        ("learning_rate", "above 0", config.learning_rate > 0),
        ("clip_norm", "at least 0", config.clip_norm >= 0),
        ("discount", "in [0, 1]", 0 <= config.discount <= 1),
    )
