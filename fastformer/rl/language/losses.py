"""The objectives of alignment, for the one trainer: a loss of a batch, its count, and what is noted of each step.

    policy        PPO, GRPO, RLOO, on batches of :class:`.experience.Experience`
    preferences   DPO, on pairs that have the reference's log-probabilities
    scores        a reward model, on pairs

Each object is called with a model and a batch, and leaves numbers of the batch in ``notes``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...data import Batch
from ...training.objectives import Objective
from .config import PolicyConfig
from .estimators import (
    KL_ESTIMATORS,
    aggregate,
    clipped_policy_loss,
    clipped_value_loss,
    dpo_loss,
    kl_estimate,
    masked_mean,
    pairwise_reward_loss,
)
from .policy import sequence_scores, token_log_probs

Notes = dict[str, float]


class Noted:
    """A loss that notes numbers of the batches it is trained on."""

    def __init__(self) -> None:
        self.notes: list[Notes] = []

    def objective(self) -> Objective:
        """For the trainer."""
        return Objective(self, self.count)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        raise NotImplementedError

    def count(self, batch: Batch) -> int:
        """Targets that the loss is a mean over."""
        raise NotImplementedError

    def note(self, loss: Tensor, **numbers: Tensor) -> None:
        """Keeps the means of ``numbers``, unless this is a measurement."""
        if loss.requires_grad:
            self.notes.append({name: float(value.detach().float().mean()) for name, value in numbers.items()})

    def take(self) -> Notes:
        """The mean of what was noted since the last call."""
        notes, self.notes = self.notes, []
        names = dict.fromkeys(name for note in notes for name in note)
        return {name: sum(n[name] for n in notes if name in n) / sum(name in n for n in notes) for name in names}


class PolicyLoss(Noted):
    """The clipped ratio, KL divergence and, with a value head, the value's error.

    RLOO takes a whole completion for one action (Ahmadian et al. 2024, section 3.2): its ratio is that of the
    completion's probabilities. PPO's and GRPO's are those of tokens.

    Args:
        algorithm: ``"ppo"``, ``"grpo"`` or ``"rloo"``.
        config: the settings.
        temperature: at which completions were sampled.
        max_new_tokens: for the aggregation ``"constant"``.
    """

    def __init__(self, algorithm: str, config: PolicyConfig, temperature: float, max_new_tokens: int) -> None:
        super().__init__()
        self.algorithm, self.config = algorithm, config
        self.temperature, self.max_new_tokens = temperature, max_new_tokens

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch with ``input_ids``, ``completion_mask`` (B, S), ``loss_mask`` (B, S - 1), ``advantages``
        (B,) or (B, S - 1), and where there are several steps on a rollout ``old_log_probs``; with a reference
        ``reference_log_probs``; for PPO ``values`` and ``returns``; all (B, S - 1)."""
        config, mask = self.config, batch["loss_mask"]
        log_probs, values = token_log_probs(model, batch["input_ids"], batch["completion_mask"], self.temperature)
        # With one step on each rollout the policy is the one that sampled, and the ratio is 1 with its gradient.
        old = batch.get("old_log_probs", log_probs.detach())
        advantages = batch["advantages"]
        bounds = {"clip_low": config.clip_low, "clip_high": config.clip_high}
        if self.algorithm == "rloo":
            kept = mask.any(1)
            difference = torch.where(mask, log_probs - old, 0.0).sum(1)
            losses, ratio, clipped = clipped_policy_loss(difference, torch.zeros_like(difference), advantages, **bounds)
            loss, weight = masked_mean(losses, kept), kept
        else:
            advantages = advantages[:, None] if advantages.dim() == 1 else advantages
            losses, ratio, clipped = clipped_policy_loss(log_probs, old, advantages, **bounds)
            if self.algorithm == "grpo" and config.kl_coefficient:
                reference = batch["reference_log_probs"]
                losses = losses + config.kl_coefficient * kl_estimate(log_probs, reference, config.kl_estimator)
            loss, weight = aggregate(losses, mask, config.aggregation, self.max_new_tokens), mask
        noted = {
            "ratio": masked_mean(ratio, weight),
            "clip_fraction": masked_mean(clipped.float(), weight),
            "entropy": -masked_mean(log_probs, mask),
            "approximate_kl": masked_mean(kl_estimate(old, log_probs, "k3"), mask),
        }
        if "reference_log_probs" in batch:
            for name in KL_ESTIMATORS:
                kl = kl_estimate(log_probs.detach(), batch["reference_log_probs"], name)
                noted[f"kl_{name}"] = masked_mean(kl, mask)
        if "old_log_probs" not in batch:
            difference = (log_probs.detach() - batch["sampling_log_probs"]).abs()
            noted["sampling_difference"] = masked_mean(difference, mask)
        if values is not None:
            errors = clipped_value_loss(values, batch["values"], batch["returns"], config.value_clip)
            value_loss = aggregate(errors, mask, config.aggregation, self.max_new_tokens)
            loss = loss + config.value_coefficient * value_loss
            noted["value_loss"] = value_loss
        self.note(loss, **noted)
        return loss

    def count(self, batch: Batch) -> int:
        """Tokens, where the loss is their mean, else completions."""
        if self.algorithm != "rloo" and self.config.aggregation == "token":
            return int(batch["loss_mask"].sum())
        if self.algorithm == "rloo":
            return int(batch["loss_mask"].any(1).sum())
        return len(batch["input_ids"])


class PreferenceLoss(Noted):
    """DPO on batches of :class:`.preferences.Pairs`."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        config = self.config
        totals = completion_log_probs(model, batch, mean=config.preference_loss == "ipo")
        losses, chosen, rejected = dpo_loss(
            *totals.chunk(2),
            *batch["reference"].chunk(2),
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            kind=config.preference_loss,
        )
        loss = losses.mean()
        self.note(
            loss, reward_chosen=chosen, reward_rejected=rejected, margin=chosen - rejected, accuracy=chosen > rejected
        )
        return loss

    def count(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch["input_ids"]) // 2


class ScoreLoss(Noted):
    """Bradley-Terry's, for a reward model on batches of :class:`.preferences.Pairs`."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        chosen, rejected = sequence_scores(model, batch["input_ids"], batch["lengths"]).chunk(2)
        loss = pairwise_reward_loss(chosen, rejected).mean()
        self.note(
            loss, score_chosen=chosen, score_rejected=rejected, margin=chosen - rejected, accuracy=chosen > rejected
        )
        return loss

    def count(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch["input_ids"]) // 2


def completion_log_probs(model: nn.Module, batch: Batch, mean: bool = False) -> Tensor:
    """Log-probability ``(B,)`` of each completion as a whole, or the mean over its tokens."""
    table = token_log_probs(model, batch["input_ids"], batch["completion_mask"])[0]
    totals = table.sum(1)
    return totals / batch["completion_mask"].sum(1) if mean else totals
