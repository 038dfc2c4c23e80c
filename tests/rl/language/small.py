"""A small untrained GPT-2 over characters in a directory, and tasks and settings for it."""

from __future__ import annotations

from pathlib import Path

import torch

from fastformer.data import CharTokenizer
from fastformer.models import GPT2Config, GPT2LMHeadModel
from fastformer.rl.language import AlignConfig, AlignDataConfig, PolicyConfig, RolloutConfig, Task
from fastformer.training import LoraConfig, OptimizerConfig, RunConfig, ScheduleConfig

CHARACTERS = "\n0123456789+= ab"


def save_base(directory: Path, deviation: float = 0.02) -> Path:
    """A directory with the model, its weights of this standard deviation, and its tokenizer; "\\n" ends a text."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer(CHARACTERS)
    config = GPT2Config(
        tokenizer.vocab_size, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=deviation
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    tokenizer.save(directory)
    return directory


def copying(verifier=None) -> Task:
    """Questions "7=", answer "7"."""

    def correct(prompts, completions, answer, **columns):
        return [float(c == a) for c, a in zip(completions, answer)]

    examples = [{"prompt": f"{n}=", "answer": str(n)} for n in range(10)]
    return Task(examples[:8], examples[8:], verifier or correct)


def share_of(character: str):
    """A dense reward: how much of a completion is one character."""

    def reward(prompts, completions, **columns):
        return [c.count(character) / max(len(c), 1) for c in completions]

    return {"share": reward}


def config_for(
    algorithm: str, model: Path, out: Path, *, steps: int = 4, rate: float = 3e-3, lora: int = 0, **changes
) -> AlignConfig:
    """Rollouts of 4 prompts x 4, in batches of 8 of which two make a step."""
    run = {"max_steps": steps, "eval_every": 0, "save_every": 0, "tensorboard": False, "device": "cpu", "log_every": 1}
    sections = {
        "data": {"batch_size": 8, **changes.pop("data", {})},
        "rollout": {"prompts": 4, "group_size": 4, "max_new_tokens": 6, "end": "\n", **changes.pop("rollout", {})},
        "policy": changes.pop("policy", {}),
        "optimizer": {"learning_rate": rate, "weight_decay": 0.0, "accumulate": 2, **changes.pop("optimizer", {})},
        "run": {**run, "out": str(out), **changes.pop("run", {})},
    }
    kinds = {
        "data": AlignDataConfig,
        "rollout": RolloutConfig,
        "policy": PolicyConfig,
        "optimizer": OptimizerConfig,
        "run": RunConfig,
    }
    return AlignConfig(
        algorithm=algorithm,
        model=str(model),
        lora=LoraConfig(rank=lora, targets=("all",)),
        schedule=ScheduleConfig(kind="constant", warmup_steps=0),
        **{name: kinds[name](**values) for name, values in sections.items()},
        **changes,
    )
