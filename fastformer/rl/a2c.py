"""A2C: advantage actor-critic, the synchronous form of A3C (Mnih et al. 2016, "Asynchronous methods for deep RL").

An iteration is a few steps of every copy and one step of the optimiser down

    −mean log π(a|s) A  +  value_weight · ½ mean (V − R)²  −  entropy · mean H(π)

with A the generalised advantages (λ = ``decay``; 1 is the paper's n-step advantage) and R = A + V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..training.config import _check
from .agent import Iteration, OnPolicyAgent, describe
from .losses import policy_gradient_loss, value_loss
from .reinforce import common_rules


@dataclass(frozen=True)
class A2CConfig:
    """A2C."""

    learning_rate: float = 7e-4
    """Of RMSProp (decay 0.99, as in the paper)."""
    rmsprop_eps: float = 1e-5
    """Of RMSProp."""
    anneal: bool = False
    """Learning rate to 0 over the run, along a line."""
    clip_norm: float = 0.5
    """Largest norm of the gradient; 0 does not clip."""
    steps: int = 5
    """Of every copy in an iteration."""
    discount: float = 0.99
    """γ."""
    decay: float = 1.0
    """λ of the generalised advantages."""
    normalise: bool = False
    """Advantages of an iteration to mean 0 and deviation 1."""
    entropy: float = 0.0
    """Weight of the policy's entropy."""
    value_weight: float = 1.0
    """Weight of the value network's loss."""

    def __post_init__(self) -> None:
        _check(
            "a2c",
            self,
            *common_rules(self),
            ("steps", "at least 1", self.steps >= 1),
            ("decay", "in [0, 1]", 0 <= self.decay <= 1),
        )


class A2C(OnPolicyAgent):
    """See the module."""

    name = "a2c"
    config: A2CConfig

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(parameters, self.config.learning_rate, alpha=0.99, eps=self.config.rmsprop_eps)

    def iterate(self) -> Iteration:
        config, policy = self.config, self.policy
        rollout, episodes = self.collect(config.steps)
        old_values, advantages = self.advantages(rollout, config.discount, config.decay)
        returns = (advantages + old_values).flatten().to(self.device)
        if config.normalise:
            advantages = (advantages - advantages.mean()) / (advantages.std(unbiased=False) + 1e-8)
        rows, actions = rollout.observations.flatten(0, 1).to(self.device), rollout.actions.flatten(0, 1)
        log_probs, entropy = policy.evaluate(rows, actions.to(self.device))
        values = policy.values(rows)
        policy_loss = policy_gradient_loss(log_probs, advantages.flatten().to(self.device))
        critic_loss = value_loss(values, returns)
        norm = self.learn(policy_loss + config.value_weight * critic_loss - config.entropy * entropy.mean())
        numbers = {
            "policy_loss": float(policy_loss.detach()),
            "value_loss": float(critic_loss.detach()),
            "entropy": float(entropy.detach().mean()),
            "gradient_norm": norm,
            **describe(episodes, old_values.flatten(), returns.cpu()),
        }
        return Iteration(numbers, episodes)
