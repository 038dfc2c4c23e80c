"""Rollouts as batches: a loader for the trainer whose data the policy writes itself.

When its batches are used up, the next prompts are sampled from the policy as it then is, completions are rewarded, and
log-probabilities, values and advantages are computed; batches of them follow, ``rollout.epochs`` times in new orders.
Which prompts a rollout has, what is drawn, and the orders are functions of the seed and the rollout's number, so the
state is that number and the batches that are left: a run that resumes in the middle of a rollout goes on with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...data import Batch
from .config import AlignConfig
from .estimators import (
    KL_ESTIMATORS,
    generalised_advantages,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    masked_mean,
    whiten,
)
from .losses import Notes
from .policy import Reference, SamplingModel, device_of, evaluating, precision, token_log_probs
from .rewards import Rewards, Scored
from .rollouts import Rollouts, roll_out

SEED_STRIDE = 1_000_003


class Experience:
    """Batches without end, from rollouts of the policy.

    Args:
        policy: what is trained, with a value head for PPO.
        sampler: what it samples as.
        reference: for the KL divergence; None without one.
        tokenizer: of the model.
        examples: with the text of the prompt as ``prompt``, and columns for the rewards.
        prompt_ids: their tokens.
        rewards: of completions.
        config: the settings.
        end: token that ends a completion.
    """

    def __init__(
        self,
        policy: nn.Module,
        sampler: SamplingModel,
        reference: Reference | None,
        tokenizer: Any,
        examples: Sequence[Mapping[str, Any]],
        prompt_ids: Sequence[Sequence[int]],
        rewards: Rewards,
        config: AlignConfig,
        end: int,
    ) -> None:
        self.policy, self.sampler, self.reference, self.tokenizer = policy, sampler, reference, tokenizer
        self.examples, self.prompt_ids, self.rewards = examples, prompt_ids, rewards
        self.config, self.end = config, end
        self.number = 0  # rollouts so far
        self.notes: list[Notes] = []  # of rollouts, until the trainer takes them
        self.samples: list[tuple[str, str, float]] = []  # (prompt, completion, reward) of the latest
        self._left: list[Batch] = []

    def next_batch(self) -> Batch:
        """The next batch, of a new rollout where the last one is used up; ``_ids`` are the completions' numbers."""
        if not self._left:
            self._left = self._collect()
        return self._left.pop(0)

    def describe(self, completion: int) -> str:
        """A completion of the latest rollout, in words."""
        rollout, row = divmod(completion, self.config.rows)
        if rollout != self.number - 1 or row >= len(self.samples):
            return str(completion)
        prompt, text, reward = self.samples[row]
        return f"{completion} (prompt {prompt[-60:]!r}, completion {text[:60]!r}, reward {reward:.4g})"

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, besides the weights and the same prompts."""
        return {"number": self.number, "left": self._left, "prompts": len(self.prompt_ids)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where ``state`` was taken.

        Raises:
            ValueError: there are not as many prompts as in the saved run.
        """
        if state["prompts"] != len(self.prompt_ids):
            raise ValueError(f"cannot resume: {state['prompts']} prompts in the saved run, {len(self.prompt_ids)} here")
        self.number, self._left = state["number"], list(state["left"])

    def chosen_prompts(self, number: int) -> list[int]:
        """Indices of the prompts of rollout ``number``: all in a random order, then all in another."""
        count, size = self.config.rollout.prompts, len(self.prompt_ids)
        chosen = []
        for place in range(number * count, (number + 1) * count):
            epoch, index = divmod(place, size)
            generator = torch.Generator().manual_seed(self.config.run.seed * SEED_STRIDE + epoch)
            chosen.append(int(torch.randperm(size, generator=generator)[index]))
        return chosen

    def _collect(self) -> list[Batch]:
        begin = time.perf_counter()
        rollout = self.config.rollout
        chosen = self.chosen_prompts(self.number)
        seed = (self.config.run.seed * SEED_STRIDE + self.number) * 2 + 1
        with evaluating(self.policy):
            rollouts = roll_out(
                self.sampler.current(),
                self.tokenizer,
                [self.prompt_ids[i] for i in chosen],
                group_size=rollout.group_size,
                max_new_tokens=rollout.max_new_tokens,
                end=self.end,
                temperature=rollout.temperature,
                seed=seed,
                batch_size=rollout.batch_size,
            )
        examples = [self.examples[i] for i in chosen for _ in range(rollout.group_size)]
        scored = score(self.rewards, examples, rollouts)
        prompts = [example["prompt"] for example in examples]
        self.samples = list(zip(prompts, rollouts.completions, scored.total.tolist()))
        batch = rollouts.batch()
        keep = ~rollouts.truncated if rollout.mask_truncated else torch.ones(len(rollouts.truncated), dtype=torch.bool)
        batch["loss_mask"] = batch["completion_mask"][:, 1:].bool() & keep[:, None]
        notes = self._notes(rollouts, scored)
        self._judge(batch, notes)
        self._advantages(batch, scored.total, notes)
        notes["rollouts_per_second"] = len(examples) / (time.perf_counter() - begin)
        self.notes.append(notes)
        self.number += 1
        return self._split(batch, seed)

    def _judge(self, batch: Batch, notes: Notes) -> None:
        """The policy's log-probabilities and values before it changes, and the reference's, some rows at a time."""
        config = self.config
        old_needed = config.updates > 1 or config.algorithm == "ppo" or self._kl_in_rewards()
        temperature = config.rollout.temperature
        old: list[Tensor] = []
        values: list[Tensor] = []
        reference: list[Tensor] = []
        for rows in torch.arange(len(batch["input_ids"])).split(config.data.batch_size):
            ids = batch["input_ids"][rows].to(device_of(self.policy))
            mask = batch["completion_mask"][rows].to(ids.device)
            with evaluating(self.policy), precision(self.policy, config.run.dtype):
                if old_needed:
                    log_probs, value = token_log_probs(self.policy, ids, mask, temperature)
                    old.append(log_probs.cpu())
                    if value is not None:
                        values.append(value.cpu())
                if self.reference is not None:
                    reference.append(self.reference.log_probs(ids, mask, temperature).cpu())
        tokens = batch["completion_mask"][:, 1:]
        if old_needed:
            batch["old_log_probs"] = torch.cat(old)
            difference = (batch["old_log_probs"] - batch["sampling_log_probs"]).abs()
            notes["sampling_difference"] = float(masked_mean(difference, tokens))
            if values:
                batch["values"] = torch.cat(values)
        if self.reference is not None:
            batch["reference_log_probs"] = torch.cat(reference)
            policy = batch["old_log_probs"] if old_needed else batch["sampling_log_probs"]
            for name in KL_ESTIMATORS:
                kl = kl_estimate(policy, batch["reference_log_probs"], name)
                notes[f"rollout_kl_{name}"] = float(masked_mean(kl, tokens))

    def _kl_in_rewards(self) -> bool:
        return bool(self.config.policy.kl_coefficient) and self.config.algorithm in ("ppo", "rloo")

    def _advantages(self, batch: Batch, rewards: Tensor, notes: Notes) -> None:
        policy, groups = self.config.policy, (-1, self.config.rollout.group_size)
        tokens = batch["completion_mask"][:, 1:].bool()
        penalty = torch.zeros(tokens.shape)
        if self._kl_in_rewards():
            kl = kl_estimate(batch["old_log_probs"], batch["reference_log_probs"], "k1")
            penalty = torch.where(tokens, policy.kl_coefficient * kl, 0.0)
            notes["kl_penalty"] = float(penalty.sum(1).mean())
        if self.config.algorithm == "grpo":
            batch["advantages"] = group_advantages(rewards.view(groups), scale=policy.scale_advantages).flatten()
        elif self.config.algorithm == "rloo":
            batch["advantages"] = leave_one_out_advantages((rewards - penalty.sum(1)).view(groups)).flatten()
        else:
            last = torch.where(tokens, torch.arange(tokens.shape[1]), -1).amax(1, keepdim=True)
            by_token = (-penalty).scatter_add(1, last, rewards[:, None])
            advantages, batch["returns"] = generalised_advantages(
                by_token, batch["values"], tokens, gamma=policy.gamma, lam=policy.lam
            )
            batch["advantages"] = whiten(advantages, batch["loss_mask"])

    def _split(self, batch: Batch, seed: int) -> list[Batch]:
        count, first = len(batch["input_ids"]), (self.number - 1) * self.config.rows
        batches = []
        for epoch in range(self.config.rollout.epochs):
            generator = torch.Generator().manual_seed(seed + epoch)
            for rows in torch.randperm(count, generator=generator).split(self.config.data.batch_size):
                part: Batch = {name: table[rows] for name, table in batch.items()}
                batches.append({**_narrowed(part), "_ids": (rows + first).tolist()})
        return batches

    def _notes(self, rollouts: Rollouts, scored: Scored) -> Notes:
        lengths, total = rollouts.lengths.float(), scored.total
        groups = total.view(-1, self.config.rollout.group_size)
        empty = sum(not text for text in rollouts.completions) / len(rollouts.completions)
        notes = {
            "reward": float(total.mean()),
            "reward_deviation": float(groups.std(1).mean()) if groups.shape[1] > 1 else 0.0,
            "groups_alike": float((groups == groups[:, :1]).all(1).float().mean()),
            **{f"reward_{name}": float(part.nanmean()) for name, part in scored.parts.items()},
            "length": float(lengths.mean()),
            "length_min": float(lengths.min()),
            "length_max": float(lengths.max()),
            "truncated": float(rollouts.truncated.float().mean()),
            "empty": empty,
            "sampling_seconds": rollouts.seconds,
        }
        return {"rollout": float(self.number + 1), **notes}


def score(rewards: Rewards, examples: Sequence[Mapping[str, Any]], rollouts: Rollouts) -> Scored:
    """Rewards of ``rollouts``, the examples' columns passed on."""
    names = dict.fromkeys(name for example in examples for name in example if name != "prompt")
    columns = {name: [example.get(name) for example in examples] for name in names}
    prompts = [example["prompt"] for example in examples]
    return rewards(prompts, rollouts.completions, completion_ids=rollouts.completion_ids, **columns)


def _narrowed(batch: Batch) -> Batch:
    """Without the columns that are padding in all of these rows."""
    width = int(batch["attention_mask"].sum(1).max())
    wide = ("input_ids", "attention_mask", "completion_mask")
    return {
        name: table[:, : width if name in wide else width - 1].contiguous() if table.dim() == 2 else table
        for name, table in batch.items()
    }
