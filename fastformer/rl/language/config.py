"""What an alignment run is: sections of settings, as those of the other verbs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...training.config import OptimizerConfig, RunConfig, ScheduleConfig, _check
from ...training.lora import LoraConfig
from .estimators import AGGREGATIONS, KL_ESTIMATORS, PREFERENCE_LOSSES

ALGORITHMS = ("sft", "reward", "dpo", "ppo", "grpo", "rloo")
ONLINE = ("ppo", "grpo", "rloo")  # those that sample


@dataclass(frozen=True)
class AlignDataConfig:
    """Prompts, answers or preferences."""

    path: str = ""
    """JSON Lines, CSV or TSV: prompt, and answer (sft; else for the verifier) or chosen and rejected (reward, dpo)."""
    validation: str = ""
    """The same to measure on; empty: a part of the former is held out."""
    validation_fraction: float = 0.1
    """That part."""
    task: str = ""
    """A task of reasoning-gym in place of files, such as chain_sum."""
    options: tuple[str, ...] = ()
    """The task's settings, such as max_digits=1."""
    size: int = 2000
    """Examples of the task to train on."""
    held_out: int = 100
    """And to measure on."""
    seed: int = 0
    """Seed of the task's generator."""
    prompt: str = "{}"
    """What the model reads, {} in the place of the prompt."""
    chat: bool = False
    """Ask by the tokenizer's chat template."""
    system: str = ""
    """The system's message in it."""
    max_length: int = 0
    """Tokens of prompt and completion at most; 0: the model's positions, 512 if it has no limit."""
    batch_size: int = 16
    """Completions (pairs, for reward and dpo) in a batch, times optimizer.accumulate in a step."""

    def __post_init__(self) -> None:
        _check(
            "data",
            self,
            ("validation_fraction", "in (0, 1)", 0 < self.validation_fraction < 1),
            ("size", "at least 1", self.size >= 1),
            ("held_out", "at least 1", self.held_out >= 1),
            ("prompt", "a text with {}", "{}" in self.prompt),
            ("max_length", "at least 0", self.max_length >= 0),
            ("batch_size", "at least 1", self.batch_size >= 1),
        )


@dataclass(frozen=True)
class RewardConfig:
    """What is rewarded: a weighted sum."""

    verifier: float = 1.0
    """Weight of a right answer, where the task or the examples have answers."""
    model: str = ""
    """Directory of a reward model."""
    model_weight: float = 1.0
    """Weight of its score."""
    pattern: str = ""
    """A regular expression for the whole completion."""
    pattern_weight: float = 0.1
    """Weight of matching it."""
    overlong: int = 0
    """Tokens before the limit from where on a completion is less and less welcome; 0: none."""
    overlong_weight: float = 1.0
    """Weight of that penalty, -1 at the limit."""

    def __post_init__(self) -> None:
        _check("reward", self, ("overlong", "at least 0", self.overlong >= 0))


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    prompts: int = 8
    """Prompts in a rollout."""
    group_size: int = 8
    """Completions of each."""
    max_new_tokens: int = 64
    """Tokens of a completion at most."""
    temperature: float = 1.0
    """Divides the logits, when sampling and when training."""
    end: str = ""
    """Text of one token that ends a completion; empty: the tokenizer's end of text."""
    batch_size: int = 0
    """Completions sampled together; 0: all of a rollout."""
    epochs: int = 1
    """Times that each completion is trained on."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the copy that samples, for a policy with adapters."""
    mask_truncated: bool = False
    """Do not train on completions that were cut off (DAPO, section 3.4)."""

    def __post_init__(self) -> None:
        _check(
            "rollout",
            self,
            ("prompts", "at least 1", self.prompts >= 1),
            ("group_size", "at least 1", self.group_size >= 1),
            ("max_new_tokens", "at least 1", self.max_new_tokens >= 1),
            ("temperature", "above 0", self.temperature > 0),
            ("batch_size", "at least 0", self.batch_size >= 0),
            ("epochs", "at least 1", self.epochs >= 1),
            ("dtype", "float32 or bfloat16", self.dtype in ("float32", "bfloat16")),
        )


@dataclass(frozen=True)
class PolicyConfig:
    """The policy's objective."""

    kl_coefficient: float = 0.0
    """Weight of the KL divergence to the reference, in grpo's loss, in the rewards of ppo and rloo; 0: none."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """The one in grpo's loss; ppo and rloo take k1, of which rewards may be made. All three are logged."""
    kl_limit: float = 0.0
    """The run ends where a rollout's k3, a token's mean, is above this; 0: no limit."""
    clip_low: float = 0.2
    """The ratio's bound below, 1 minus this."""
    clip_high: float = 0.2
    """And above, 1 plus this."""
    scale_advantages: bool = True
    """grpo: divide by the group's standard deviation."""
    aggregation: Literal["sequence", "token", "constant"] = "token"
    """grpo, ppo: mean of completions' means, mean of tokens, or the sum over a constant (Dr. GRPO)."""
    gamma: float = 1.0
    """ppo: discount."""
    lam: float = 0.95
    """ppo: weight of longer returns."""
    value_coefficient: float = 0.1
    """ppo: weight of the value's loss."""
    value_clip: float = 0.2
    """ppo: how far a value may move in one rollout."""
    beta: float = 0.1
    """dpo: how much the reference holds back."""
    label_smoothing: float = 0.0
    """dpo: share of pairs that are taken to be the wrong way round."""
    preference_loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """dpo: its own, or IPO's."""

    def __post_init__(self) -> None:
        _check(
            "policy",
            self,
            ("kl_coefficient", "at least 0", self.kl_coefficient >= 0),
            ("kl_estimator", f"one of {', '.join(KL_ESTIMATORS)}", self.kl_estimator in KL_ESTIMATORS),
            ("kl_limit", "at least 0", self.kl_limit >= 0),
            ("clip_low", "in (0, 1]", 0 < self.clip_low <= 1),
            ("clip_high", "above 0", self.clip_high > 0),
            ("aggregation", f"one of {', '.join(AGGREGATIONS)}", self.aggregation in AGGREGATIONS),
            ("gamma", "in [0, 1]", 0 <= self.gamma <= 1),
            ("lam", "in [0, 1]", 0 <= self.lam <= 1),
            ("value_coefficient", "at least 0", self.value_coefficient >= 0),
            ("value_clip", "above 0", self.value_clip > 0),
            ("beta", "above 0", self.beta > 0),
            ("label_smoothing", "in [0, 0.5)", 0 <= self.label_smoothing < 0.5),
            (
                "preference_loss",
                f"one of {', '.join(PREFERENCE_LOSSES)}",
                self.preference_loss in PREFERENCE_LOSSES,
            ),
        )


@dataclass(frozen=True)
class AlignConfig:
    """Align a language model: a supervised start, a reward model, preferences, or rewards."""

    algorithm: Literal["sft", "reward", "dpo", "ppo", "grpo", "rloo"] = "grpo"
    """sft: learn answers. reward: learn to score from preferences. dpo: learn from preferences. ppo, grpo, rloo: learn
    from rewards of what the model writes."""
    model: str = ""
    """A model directory, or a run that holds a checkpoint."""
    data: AlignDataConfig = field(default_factory=AlignDataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-5, weight_decay=0.0, beta2=0.999)
    )
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(kind="constant", warmup_steps=10, final_ratio=0.0)
    )
    run: RunConfig = field(default_factory=lambda: RunConfig(out="runs/align", max_steps=200, save_every=0))

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm: got {self.algorithm!r}, expected one of {', '.join(ALGORITHMS)}")
        if self.algorithm not in ONLINE:
            return
        rollout, rows = self.rollout, self.data.batch_size * self.optimizer.accumulate
        if self.algorithm != "ppo" and rollout.group_size < 2:
            raise ValueError(f"rollout.group_size: got {rollout.group_size}; {self.algorithm} compares 2 or more")
        if (rollout.prompts * rollout.group_size) % rows:
            raise ValueError(
                f"data.batch_size: {self.data.batch_size} times optimizer.accumulate {self.optimizer.accumulate} does "
                f"not divide the {rollout.prompts * rollout.group_size} completions of a rollout "
                "(rollout.prompts times rollout.group_size)"
            )

    @property
    def rows(self) -> int:
        """Completions in a rollout."""
        return self.rollout.prompts * self.rollout.group_size

    @property
    def updates(self) -> int:
        """Steps on one rollout."""
        return self.rollout.epochs * self.rows // (self.data.batch_size * self.optimizer.accumulate)
