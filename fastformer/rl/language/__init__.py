"""Policy optimisation for language models: rewards, rollouts, reward models, PPO, GRPO, RLOO and DPO."""

from .config import AlignConfig, AlignDataConfig, PolicyConfig, RewardConfig, RolloutConfig
from .estimators import (
    clipped_policy_loss,
    dpo_loss,
    generalised_advantages,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    pairwise_reward_loss,
)
from .policy import token_log_probs
from .rewards import ModelReward, RewardError, Rewards
from .rollouts import Rollouts, roll_out
from .run import align, prepare
from .tasks import Task, reasoning_gym_task

__all__ = [
    "AlignConfig",
    "AlignDataConfig",
    "ModelReward",
    "PolicyConfig",
    "RewardConfig",
    "RewardError",
    "Rewards",
    "RolloutConfig",
    "Rollouts",
    "Task",
    "align",
    "clipped_policy_loss",
    "dpo_loss",
    "generalised_advantages",
    "group_advantages",
    "kl_estimate",
    "leave_one_out_advantages",
    "pairwise_reward_loss",
    "prepare",
    "reasoning_gym_task",
    "roll_out",
    "token_log_probs",
]
