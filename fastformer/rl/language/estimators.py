"""The arithmetic of policy optimisation, as functions of tensors: KL divergence, advantages, losses.

    KL           of k1 = log(p / q), k2 = k1^2 / 2, k3 = q / p - 1 + k1 under samples of p (Schulman 2020,
                 http://joschu.net/blog/kl-approx.html): k1 and k3 are unbiased, k3 is never negative
    advantages   GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1), Dr. GRPO's without the standard deviation
                 (Liu et al. 2025, arXiv:2503.20783), leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740, section
                 3), and generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16)
    losses       the clipped ratio of PPO (Schulman et al. 2017, arXiv:1707.06347, eq. 7) with DAPO's two bounds (Yu et
                 al. 2025, arXiv:2503.14476, eq. 8), DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7), IPO (Azar et
                 al. 2023, arXiv:2310.12036, eq. 17), and Bradley-Terry's for a reward model

A table is ``(B, T)``: a row for each completion, a column for each position, of which a mask of the same shape says
what is a token of the completion. Nothing outside of the mask plays a part.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

KL_ESTIMATORS = ("k1", "k2", "k3")
AGGREGATIONS = ("sequence", "token", "constant")
PREFERENCE_LOSSES = ("sigmoid", "ipo")
SMALLEST_DEVIATION = 1e-4  # added to a group's standard deviation, as in TRL


def kl_estimate(log_probs: Tensor, reference: Tensor, estimator: str = "k3") -> Tensor:
    """An estimate of KL(policy || reference) from each token that the policy sampled.

    Args:
        log_probs, reference: of the same tokens, any shape.
        estimator: ``"k1"`` (unbiased, may be negative), ``"k2"`` (biased, not negative), ``"k3"`` (unbiased, not
            negative by construction: x - 1 >= log x).
    """
    difference = log_probs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"estimator: got {estimator!r}, expected one of {', '.join(KL_ESTIMATORS)}")


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask`` is true; 0 where it nowhere is."""
    return torch.where(mask.bool(), values, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` of mean 0 and standard deviation 1 over ``mask``; 0 outside."""
    centred = values - masked_mean(values, mask)
    deviation = masked_mean(centred.square(), mask).sqrt()
    return torch.where(mask.bool(), centred / (deviation + 1e-8), 0.0)


# ---- advantages ------------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, *, scale: bool = True) -> Tensor:
    """A completion's reward against the mean of its group, over the group's standard deviation.

    Args:
        rewards: ``(P, G)``, G completions for each of P prompts.
        scale: False leaves the division out, which weighs questions that are nearly always or never solved more.

    Returns:
        ``(P, G)``, exactly 0 where all of a group have one reward.
    """
    _check_groups(rewards)
    centred = rewards - rewards.mean(1, keepdim=True)
    same = (rewards == rewards[:, :1]).all(1, keepdim=True)  # the mean of equal numbers is not always that number
    if scale:
        centred = centred / (rewards.std(1, keepdim=True) + SMALLEST_DEVIATION)
    return centred.masked_fill(same, 0.0)


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """A completion's reward against the mean of the others' for its prompt; ``(P, G)`` to ``(P, G)``."""
    _check_groups(rewards)
    count = rewards.shape[1]
    others = (rewards.sum(1, keepdim=True) - rewards) / (count - 1)
    same = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return (rewards - others).masked_fill(same, 0.0)


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the tokens of completions, after whose last one nothing follows.

    Args:
        rewards: ``(B, T)``, for writing token t.
        values: ``(B, T)``, of the text before token t.
        mask: ``(B, T)``, in each row one run of true.
        gamma, lam: the discount, and the weight of longer returns.

    Returns:
        (advantages, returns), ``(B, T)``, 0 outside of the mask.
    """
    mask = mask.bool()
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(values)
    following = next_value = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(mask[:, t], delta + gamma * lam * following, 0.0)
        advantages[:, t], next_value = following, values[:, t]
    return advantages, advantages + values


def _check_groups(rewards: Tensor) -> None:
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards: shape {tuple(rewards.shape)} is not (P, G) with groups of 2 or more")


# ---- losses ----------------------------------------------------------------------------------------------------------


def clipped_policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), for each token (or each completion).

    Returns:
        (losses, ratios, which of them the bound decides), each of the shape of ``log_probs``.
    """
    ratio = (log_probs - old_log_probs).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = -torch.minimum(ratio * advantages, bounded * advantages)
    clipped = ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))
    return losses, ratio.detach(), clipped


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.2) -> Tensor:
    """Half the squared error, the larger one of the value and of the value held to ``clip`` around the old one."""
    held = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (held - returns).square()) / 2


def aggregate(losses: Tensor, mask: Tensor, how: str = "sequence", length: int = 0) -> Tensor:
    """One number of a table ``(B, T)`` of losses.

    Args:
        how: ``"sequence"``: the mean of completions' means (GRPO, eq. 3); ``"token"``: the mean over all tokens (DAPO,
            eq. 8), so that long completions are not weaker; ``"constant"``: the sum over ``B length`` (Dr. GRPO,
            section 3.2), so that a token weighs the same in every batch.
        length: of ``"constant"``, the longest completion there can be.
    """
    held = torch.where(mask.bool(), losses, 0.0)
    if how == "sequence":
        return (held.sum(1) / mask.sum(1).clamp(min=1)).mean()
    if how == "token":
        return held.sum() / mask.sum().clamp(min=1)
    if how == "constant":
        if length < 1:
            raise ValueError(f"length: got {length}, expected the longest completion, 1 or more")
        return held.sum() / (len(losses) * length)
    raise ValueError(f"how: got {how!r}, expected one of {', '.join(AGGREGATIONS)}")


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct preference optimisation, for each pair.

    Args:
        chosen, rejected, reference_chosen, reference_rejected: ``(B,)``, log-probabilities of whole completions under
            the policy and the reference; for ``"ipo"`` their means over the tokens, as TRL has it.
        beta: how much the reference holds back.
        label_smoothing: share of pairs that are taken to be the wrong way round (conservative DPO).
        kind: ``"sigmoid"``, or ``"ipo"``, the square of the distance to 1 / (2 beta).

    Returns:
        (losses, rewards of the chosen, rewards of the rejected), ``(B,)``; a reward is beta log(policy / reference).
    """
    rewards_chosen, rewards_rejected = beta * (chosen - reference_chosen), beta * (rejected - reference_rejected)
    margin = rewards_chosen - rewards_rejected
    if kind == "sigmoid":
        losses = -F.logsigmoid(margin) * (1 - label_smoothing) - F.logsigmoid(-margin) * label_smoothing
    elif kind == "ipo":
        losses = (margin / beta - 1 / (2 * beta)).square()
    else:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(PREFERENCE_LOSSES)}")
    return losses, rewards_chosen.detach(), rewards_rejected.detach()


def pairwise_reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) for each pair of scores ``(B,)`` (Bradley & Terry 1952; with a margin,
    Llama 2, arXiv:2307.09288, eq. 2)."""
    return -F.logsigmoid(chosen - rejected - margin)
