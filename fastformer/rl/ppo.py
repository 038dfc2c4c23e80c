"""PPO (Schulman et al. 2017, "Proximal policy optimization algorithms").

An iteration is ``steps`` steps of every copy, then ``epochs`` passes over them in minibatches, each a step down

    −mean min(r A, clamp(r, 1 ± clip) A)  +  value_weight · value loss  −  entropy · mean H(π)        (equation 9)

with r the ratio to the policy that acted. The advantages are normalised per minibatch; the passes end early where the
policy has moved too far (``max_kl``). Details: Huang et al. 2022, "The 37 implementation details of PPO".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..training.config import _check
from .agent import SCORED_AT_A_TIME, Iteration, OnPolicyAgent, describe
from .losses import approximate_kl, clipped_policy_loss, value_loss
from .reinforce import common_rules


@dataclass(frozen=True)
class PPOConfig:
    """PPO."""

    learning_rate: float = 3e-4
    """Of Adam."""
    adam_eps: float = 1e-5
    """Of Adam."""
    anneal: bool = False
    """Learning rate and clip to 0 over the run, along a line."""
    clip_norm: float = 0.5
    """Largest norm of the gradient; 0 does not clip."""
    steps: int = 256
    """Of every copy in an iteration."""
    epochs: int = 10
    """Passes over them."""
    minibatch: int = 64
    """Steps in a minibatch; more than an iteration has is all of them."""
    discount: float = 0.99
    """γ."""
    decay: float = 0.95
    """λ of the generalised advantages."""
    clip: float = 0.2
    """How far the ratio of probabilities counts from 1."""
    value_clip: float = 0.0
    """How far the value may move from the old one; 0 does not clip."""
    normalise: bool = True
    """Advantages of a minibatch to mean 0 and deviation 1."""
    entropy: float = 0.0
    """Weight of the policy's entropy."""
    value_weight: float = 1.0
    """Weight of the value network's loss."""
    max_kl: float = 0.0
    """Ends the passes of an iteration when the policy is 1.5 times this far from the one that acted; 0: never."""

    def __post_init__(self) -> None:
        _check(
            "ppo",
            self,
            *common_rules(self),
            ("steps", "at least 1", self.steps >= 1),
            ("epochs", "at least 1", self.epochs >= 1),
            ("minibatch", "at least 1", self.minibatch >= 1),
            ("decay", "in [0, 1]", 0 <= self.decay <= 1),
            ("clip", "above 0", self.clip > 0),
            ("value_clip", "at least 0", self.value_clip >= 0),
            ("max_kl", "at least 0", self.max_kl >= 0),
        )


class PPO(OnPolicyAgent):
    """See the module."""

    name = "ppo"
    config: PPOConfig

    def iterate(self) -> Iteration:
        config, policy = self.config, self.policy
        left = self.left
        rollout, episodes = self.collect(config.steps)
        grid_values, grid_advantages = self.advantages(rollout, config.discount, config.decay)
        rows = rollout.observations.flatten(0, 1).to(self.device)
        actions = rollout.actions.flatten(0, 1).to(self.device)
        old_values, advantages = (grid.flatten().to(self.device) for grid in (grid_values, grid_advantages))
        returns = advantages + old_values
        with torch.no_grad():
            parts = zip(rows.split(SCORED_AT_A_TIME), actions.split(SCORED_AT_A_TIME))
            old_log_probs = torch.cat([policy.evaluate(*part)[0] for part in parts])
        sums = dict.fromkeys(("policy_loss", "value_loss", "entropy", "gradient_norm", "kl", "clip_fraction"), 0.0)
        batches, stopped = 0, False
        for _ in range(config.epochs):
            order = torch.randperm(len(rows), generator=self.generator)
            for batch in order.to(self.device).split(config.minibatch):
                log_probs, entropy = policy.evaluate(rows[batch], actions[batch])
                old, advantage = old_log_probs[batch], advantages[batch]
                kl = float(approximate_kl(log_probs.detach(), old))
                if config.max_kl and kl > 1.5 * config.max_kl:
                    stopped = True
                    break
                if config.normalise and len(batch) > 1:
                    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                policy_loss = clipped_policy_loss(log_probs, old, advantage, config.clip * left)
                critic_loss = value_loss(
                    policy.values(rows[batch]), returns[batch], old_values[batch], config.value_clip
                )
                bonus = entropy.mean()
                norm = self.learn(policy_loss + config.value_weight * critic_loss - config.entropy * bonus)
                outside = ((log_probs.detach() - old).exp() - 1).abs() > config.clip * left
                for name, value in zip(
                    sums, (policy_loss, critic_loss, bonus, norm, kl, outside.float().mean()), strict=True
                ):
                    sums[name] += float(value.detach() if isinstance(value, torch.Tensor) else value)
                batches += 1
            if stopped:
                break
        numbers = {name: total / max(1, batches) for name, total in sums.items()}
        return Iteration(
            {**numbers, "minibatches": batches, **describe(episodes, old_values.cpu(), returns.cpu())}, episodes
        )
