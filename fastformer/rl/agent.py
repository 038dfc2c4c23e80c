"""What every algorithm is made of: a policy, its optimiser, copies of an environment, and what resuming needs.

An algorithm is a subclass with ``iterate``: some steps in the environments, some of the optimiser.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .buffers import Rollout
from .environments import Environments, Episode, Step
from .exploration import CountBonus
from .policies import ActorCritic, Policy
from .returns import explained_variance, generalised_advantages

WEIGHTS = "model.safetensors"
SCORED_AT_A_TIME = 4096


class BadUpdateError(RuntimeError):
    """A loss or gradient that is not finite; the message names the step, and nothing was changed by it."""


@dataclass(frozen=True)
class Iteration:
    """What :meth:`Agent.iterate` did: numbers for the log, and the episodes that ended meanwhile."""

    numbers: dict[str, float]
    episodes: list[Episode]


class Agent:
    """A policy that learns in ``environments``.

    Args:
        policy: its network.
        environments: copies to learn in; already reset.
        config: of the algorithm, with ``learning_rate``, ``anneal`` and ``clip_norm``.
        total_steps: of the run, in steps of one environment: what schedules count to.
        seed: of the actions drawn and of batches.
        bonus: added to the rewards that are learnt from.

    Attributes:
        steps: of one environment so far, updates: of the optimiser.
    """

    name = "agent"

    def __init__(
        self,
        policy: Policy,
        environments: Environments,
        config: Any,
        *,
        total_steps: int,
        seed: int = 0,
        bonus: CountBonus | None = None,
    ) -> None:
        self.policy, self.environments, self.config, self.bonus = policy, environments, config, bonus
        self.total_steps, self.steps, self.updates = total_steps, 0, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.device = next(policy.parameters()).device
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = self.make_optimizer(self.parameters)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, self.config.learning_rate, eps=self.config.adam_eps, fused=True)

    def iterate(self) -> Iteration:
        """Some steps, and what is learnt from them."""
        raise NotImplementedError

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        return min(1.0, self.steps / self.total_steps)

    @property
    def left(self) -> float:
        """1 to 0 over the run where the configuration anneals, else 1."""
        return 1 - self.progress if self.config.anneal else 1.0

    def step(self, actions: Tensor, rows: Tensor, active: list[bool] | None = None) -> Step:
        """Steps the environments and counts."""
        step = self.environments.step(self.policy.for_environment(actions, rows), active)
        self.steps += self.environments.copies if active is None else sum(active)
        if self.bonus is not None:
            step.rewards.add_(self.bonus(step.successors()))
        return step

    def learn(self, loss: Tensor) -> float:
        """One step of the optimiser down the gradient of ``loss``; the gradient's norm before it was clipped.

        Raises:
            BadUpdateError: the loss or gradient is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.left
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = self.config.clip_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(norm):
            raise BadUpdateError(
                f"{self.name} on {self.environments.name}, step {self.steps}, update {self.updates + 1}: the loss is "
                f"{float(loss.detach())}, the norm of its gradient {norm}"
            )
        self.optimizer.step()
        self.updates += 1
        self.policy.forget()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """All that the next iteration depends on, but for the weights."""
        policy = self.policy
        return {
            "steps": self.steps,
            "updates": self.updates,
            "generator": self.generator.get_state(),
            "optimizer": self.optimizer.state_dict(),
            "environments": self.environments.state_dict(),
            "observations": policy.observations.state_dict(),
            "embeddings": None if policy.texts is None else policy.texts.vectors(),
            "bonus": None if self.bonus is None else self.bonus.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.updates = state["steps"], state["updates"]
        self.generator.set_state(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.policy.observations.load_state_dict(state["observations"])
        self.environments.load_state_dict(state["environments"])
        if self.policy.texts is not None:
            self.policy.texts.load_vectors(state["embeddings"])
        if self.bonus is not None and state["bonus"] is not None:
            self.bonus.load_state_dict(state["bonus"])


class OnPolicyAgent(Agent):
    """One that learns from the steps of its present policy alone, an :class:`.policies.ActorCritic`."""

    policy: ActorCritic

    def collect(self, steps: int) -> tuple[Rollout, list[Episode]]:
        """``steps`` steps of every copy; 0: one whole episode of each, at whose beginning they stand."""
        environments, policy, whole = self.environments, self.policy, not steps
        copies = environments.copies
        observations, actions, results, valid = [], [], [], []
        active = [True] * copies  # a copy whose episode is over waits at the beginning of its next one
        with torch.no_grad():
            while any(active) and (whole or len(results) < steps):
                rows = environments.current
                chosen = policy.act(rows.to(self.device), generator=self.generator).cpu()
                result = self.step(chosen, rows, active if whole else None)
                observations.append(rows)
                actions.append(chosen)
                results.append(result)
                valid.append(list(active))
                if whole:
                    for i in result.ended.tolist():
                        active[i] = False
        at = [(t, i) for t, result in enumerate(results) for i in result.ended.tolist()]
        rollout = Rollout(
            observations=torch.stack(observations),
            actions=torch.stack(actions),
            rewards=torch.stack([result.rewards for result in results]),
            terminated=torch.stack([result.terminated for result in results]),
            truncated=torch.stack([result.truncated for result in results]),
            final_at=torch.tensor(at, dtype=torch.int64).reshape(-1, 2),
            final_observations=torch.cat([result.final_observations for result in results]),
            last_observations=environments.current,
            valid=torch.tensor(valid),
        )
        return rollout, [episode for result in results for episode in result.episodes]

    def values(self, rows: Tensor) -> Tensor:
        """V of any number of rows, ``(B,)`` on the CPU, without gradients."""
        with torch.no_grad():
            return in_parts(lambda part: self.policy.values(part.to(self.device)).cpu(), rows)

    def advantages(self, rollout: Rollout, discount: float, decay: float) -> tuple[Tensor, Tensor]:
        """Values and generalised advantages, ``(T, N)`` each. Every value is computed in one batch here: acting needs
        none."""
        shape = rollout.rewards.shape
        every = torch.cat([rollout.observations.flatten(0, 1), rollout.last_observations, rollout.final_observations])
        seen, last, final = self.values(every).split([shape.numel(), shape[1], len(rollout.final_at)])
        values = seen.view(shape)
        advantages = generalised_advantages(
            rollout.rewards,
            values,
            rollout.next_values(values, last, final),
            rollout.terminated,
            rollout.truncated,
            discount=discount,
            decay=decay,
        )
        return values, advantages


def describe(episodes: list[Episode], values: Tensor, returns: Tensor) -> dict[str, float]:
    """Numbers for the log that all on-policy algorithms have."""
    numbers = {"explained_variance": explained_variance(values, returns)}
    if episodes:
        numbers["episode_return"] = sum(e.total for e in episodes) / len(episodes)
        numbers["episode_length"] = sum(e.length for e in episodes) / len(episodes)
    return numbers


def in_parts(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``function`` of ``rows``, a few thousand at a time."""
    return torch.cat([function(part) for part in rows.split(SCORED_AT_A_TIME)])


class SavedPolicy(nn.Module):
    """A policy as :func:`fastformer.training.checkpoint.save_checkpoint` writes models: settings and trained weights.

    A language model that is not trained is not written: ``policy.text_encoder`` says where it is.
    """

    def __init__(self, policy: Policy, settings: dict[str, Any]) -> None:
        super().__init__()
        self.policy, self.settings = policy, settings

    def save_pretrained(self, directory: Path, **_: Any) -> None:
        text = json.dumps({"model_type": "agent", **self.settings}, indent=2, default=asdict)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")
        weights = {name: p.detach().contiguous() for name, p in self.policy.named_parameters() if p.requires_grad}
        save_file(weights, directory / WEIGHTS)


def load_weights(policy: Policy, directory: Path) -> None:
    """Puts back what :class:`SavedPolicy` wrote.

    Raises:
        ValueError: weights of another network; the message names the first that differs.
    """
    saved = load_file(directory / WEIGHTS)
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    for name in sorted({*saved, *parameters}):
        if name not in saved or name not in parameters or saved[name].shape != parameters[name].shape:
            raise ValueError(f"{directory}: its weights are of another network: {name} differs")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
