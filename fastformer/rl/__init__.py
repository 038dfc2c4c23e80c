"""Reinforcement learning: vectorised environments, policies of numbers and of texts, DQN, REINFORCE, A2C, PPO."""

from typing import TYPE_CHECKING, Any

from .a2c import A2C, A2CConfig
from .agent import Agent, BadUpdateError, Iteration, OnPolicyAgent
from .buffers import ReplayBuffer, Rollout, SumTree, Transitions
from .config import AgentConfig, RunConfig, preset
from .dqn import DQN, DQNConfig
from .environments import EnvironmentFailed, Environments, Episode, Step, make_environment
from .evaluate import Evaluation, actions_of, evaluate, random_actions
from .exploration import CountBonus, epsilon_greedy, linear_schedule
from .generated import GeneratedTextPolicy
from .losses import (
    approximate_kl,
    clipped_policy_loss,
    policy_gradient_loss,
    q_loss,
    td_targets,
    value_loss,
)
from .observations import Observations, TextTable
from .plots import plot_returns
from .policies import ActorCritic, Policy, PolicyConfig, QNetwork
from .ppo import PPO, PPOConfig
from .reinforce import Reinforce, ReinforceConfig
from .returns import discounted_returns, generalised_advantages, n_step_returns
from .run import Result, load_policy, make_agent, train
from .text_encoders import EncodedTexts, LanguageModelEncoder, WordHashes

if TYPE_CHECKING:
    from .text_environments import MiniGridText, TextWorldGame

__all__ = [
    "A2C",
    "DQN",
    "PPO",
    "A2CConfig",
    "ActorCritic",
    "Agent",
    "AgentConfig",
    "BadUpdateError",
    "CountBonus",
    "DQNConfig",
    "EncodedTexts",
    "EnvironmentFailed",
    "Environments",
    "Episode",
    "Evaluation",
    "GeneratedTextPolicy",
    "Iteration",
    "LanguageModelEncoder",
    "MiniGridText",
    "Observations",
    "OnPolicyAgent",
    "PPOConfig",
    "Policy",
    "PolicyConfig",
    "QNetwork",
    "Reinforce",
    "ReinforceConfig",
    "ReplayBuffer",
    "Result",
    "Rollout",
    "RunConfig",
    "Step",
    "SumTree",
    "TextTable",
    "TextWorldGame",
    "Transitions",
    "WordHashes",
    "actions_of",
    "approximate_kl",
    "clipped_policy_loss",
    "discounted_returns",
    "epsilon_greedy",
    "evaluate",
    "generalised_advantages",
    "linear_schedule",
    "load_policy",
    "make_agent",
    "make_environment",
    "n_step_returns",
    "plot_returns",
    "policy_gradient_loss",
    "preset",
    "q_loss",
    "random_actions",
    "td_targets",
    "train",
    "value_loss",
]


def __getattr__(name: str) -> Any:
    if name in ("MiniGridText", "TextWorldGame"):  # subclasses of Gymnasium's, which need not be there
        from . import text_environments

        return getattr(text_environments, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
