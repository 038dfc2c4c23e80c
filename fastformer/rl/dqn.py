"""Deep Q-learning (Mnih et al. 2015), with the parts of Rainbow (Hessel et al. 2018) that are switches here:

    double         the online network chooses the next action, the target network scores it (van Hasselt et al. 2016)
    dueling        Q = V + A − mean A (Wang et al. 2016)
    n_steps        returns of n steps before the bootstrap
    prioritised    transitions drawn in proportion to their error^alpha (Schaul et al. 2016)

An iteration is ``train_every`` steps with ε-greedy actions, then ``gradient_steps`` batches from the replay buffer.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from ..training.config import _check
from .agent import Agent, Iteration
from .buffers import ReplayBuffer
from .environments import Environments
from .exploration import epsilon_greedy, linear_schedule
from .losses import q_loss, td_targets
from .policies import QNetwork
from .reinforce import common_rules


@dataclass(frozen=True)
class DQNConfig:
    """DQN."""

    learning_rate: float = 1e-3
    """Of Adam."""
    adam_eps: float = 1e-8
    """Of Adam."""
    anneal: bool = False
    """Learning rate to 0 over the run, along a line."""
    clip_norm: float = 10.0
    """Largest norm of the gradient; 0 does not clip."""
    discount: float = 0.99
    """γ."""
    buffer_size: int = 100_000
    """Transitions kept."""
    batch_size: int = 64
    """Transitions in a batch."""
    learning_starts: int = 1000
    """Steps before the first batch."""
    train_every: int = 4
    """Steps between two rounds of batches."""
    gradient_steps: int = 1
    """Batches in a round."""
    target_every: int = 500
    """Steps between two copies of the network to the target network."""
    first_epsilon: float = 1.0
    """ε at the start."""
    last_epsilon: float = 0.05
    """ε in the end."""
    exploration: float = 0.1
    """Share of the run over which ε falls, along a line."""
    double: bool = True
    """The online network chooses the action that the target network scores."""
    dueling: bool = False
    """Values and advantages by layers of their own."""
    n_steps: int = 1
    """Rewards before the bootstrap."""
    prioritised: bool = False
    """Draw transitions by their error."""
    alpha: float = 0.6
    """How much the error counts."""
    first_beta: float = 0.4
    """How far weights undo the uneven drawing at the start; 1 in the end."""

    def __post_init__(self) -> None:
        _check(
            "dqn",
            self,
            *common_rules(self),
            *((name, "at least 1", getattr(self, name) >= 1) for name in COUNTS),
            *((name, "in [0, 1]", 0 <= getattr(self, name) <= 1) for name in SHARES),
        )


COUNTS = ("buffer_size", "batch_size", "train_every", "gradient_steps", "target_every", "n_steps")
SHARES = ("first_epsilon", "last_epsilon", "exploration", "alpha", "first_beta")


class DQN(Agent):
    """See the module."""

    name = "dqn"
    config: DQNConfig
    policy: QNetwork

    def __init__(self, policy: QNetwork, environments: Environments, config: DQNConfig, **options: Any) -> None:
        super().__init__(policy, environments, config, **options)
        self.target = copy_of(policy)
        self.buffer = ReplayBuffer(
            config.buffer_size,
            policy.observations.shape,
            policy.observations.dtype,
            environments.copies,
            discount=config.discount,
            steps=config.n_steps,
            alpha=config.alpha if config.prioritised else 0.0,
        )
        self._since_target = 0

    @property
    def epsilon(self) -> float:
        config = self.config
        return linear_schedule(config.first_epsilon, config.last_epsilon, config.exploration, self.progress)

    def iterate(self) -> Iteration:
        config, episodes = self.config, []
        environments = self.environments
        until = self.steps + max(config.train_every, environments.copies)
        while self.steps < until:
            rows = environments.current
            with torch.no_grad():
                scores = self.policy(rows.to(self.device)).cpu()
            actions = epsilon_greedy(scores, self.epsilon, self.generator)
            step = self.step(actions, rows)
            self.buffer.add(rows, actions, step)
            episodes += step.episodes
            self._since_target += environments.copies
            if self._since_target >= config.target_every:
                self._since_target = 0
                self.update_target()
        numbers: dict[str, float] = {"epsilon": self.epsilon, "buffer": len(self.buffer)}
        if episodes:
            numbers["episode_return"] = sum(e.total for e in episodes) / len(episodes)
            numbers["episode_length"] = sum(e.length for e in episodes) / len(episodes)
        if self.steps >= config.learning_starts and len(self.buffer):
            for _ in range(config.gradient_steps):
                learnt = self.update()
            numbers |= learnt
        return Iteration(numbers, episodes)

    def update(self) -> dict[str, float]:
        """One batch."""
        config = self.config
        beta = config.first_beta + (1 - config.first_beta) * self.progress
        batch = self.buffer.sample(config.batch_size, self.generator, beta)
        rows, following = batch.observations.to(self.device), batch.next_observations.to(self.device)
        with torch.no_grad():
            online = self.policy(following) if config.double else None
            targets = td_targets(
                batch.rewards.to(self.device), batch.discounts.to(self.device), self.target(following), online
            )
        q = self.policy(rows).gather(1, batch.actions.to(self.device)[:, None])[:, 0]
        loss = q_loss(q, targets, batch.weights.to(self.device))
        norm = self.learn(loss)
        self.buffer.set_priorities(batch.indices, q.detach() - targets)
        return {"loss": float(loss.detach()), "q": float(q.detach().mean()), "gradient_norm": norm}

    def update_target(self) -> None:
        """The target network takes the weights of the network."""
        with torch.no_grad():
            for target, parameter in zip(self.target.parameters(), self.policy.parameters()):
                target.copy_(parameter)
        self.target.forget()

    def state_dict(self) -> dict[str, Any]:
        target = {name: p.detach().clone() for name, p in self.target.named_parameters()}
        return {
            **super().state_dict(),
            "target": target,
            "since_target": self._since_target,
            "buffer": self.buffer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            for name, parameter in self.target.named_parameters():
                parameter.copy_(state["target"][name])
        self._since_target = state["since_target"]
        self.buffer.load_state_dict(state["buffer"])


def copy_of(policy: QNetwork) -> QNetwork:
    """Another network of the same weights, without gradients, that shares the table of texts and, untrained, the
    encoder and what it has embedded."""
    shared: dict[int, Any] = {id(policy.observations): policy.observations}
    if policy.texts is not None:
        shared[id(policy.texts.table)] = policy.texts.table
        if not policy.texts.trained:
            shared[id(policy.texts)] = policy.texts
    target = copy.deepcopy(policy, shared)
    trained = [parameter for parameter in target.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    return target
