"""Small untrained models in directories, and examples that they can learn in a few steps."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from fastformer.data import BPETokenizer, train_unigram, train_wordpiece
from fastformer.models import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from fastformer.training import OptimizerConfig, RunConfig, ScheduleConfig
from fastformer.training.finetune import ExamplesConfig, FinetuneConfig

WORDS = "the cat sat on a mat good bad fine awful film who where".split()
SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "hidden_size": 32}
CONTEXT = 48


def save_base(kind: str, directory: Path) -> Path:
    """A directory with an untrained model of ``kind`` and its tokenizer."""
    torch.manual_seed(0)
    texts = [" ".join(WORDS)] * 3
    if kind == "bert":
        tokenizer = train_wordpiece(texts, 96)
        # Wide initial weights, or so small a model takes long to leave the mean.
        model = BertModel(
            BertConfig(tokenizer.vocab_size, max_position_embeddings=CONTEXT, initializer_range=0.2, **SHAPE)
        )
    elif kind == "gpt2":
        tokenizer = BPETokenizer.train(texts, 300)
        model = GPT2LMHeadModel(GPT2Config(tokenizer.vocab_size, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2))
    elif kind == "llama":
        tokenizer = BPETokenizer.train(texts, 300)
        model = LlamaForCausalLM(
            LlamaConfig(tokenizer.vocab_size, max_position_embeddings=CONTEXT, initializer_range=0.2, **SHAPE)
        )
    else:
        tokenizer = train_unigram(texts, 400, sentinels=4)
        shape = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(tokenizer.vocab_size, decoder_start_token_id=0, **shape))
    model.save_pretrained(directory)
    tokenizer.save(directory)
    return directory


def reviews(count: int = 64, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    texts = (" ".join(draw.choices(WORDS[:6], k=draw.randint(2, 7))) for _ in range(count))
    return [{"text": f"{t} {('bad', 'good')[i % 2]}", "label": ("neg", "pos")[i % 2]} for i, t in enumerate(texts)]


def config_for(task: str, model: Path, out: Path, *, steps: int = 30, rate: float = 5e-3, **changes) -> FinetuneConfig:
    run = {"max_steps": steps, "eval_every": 0, "save_every": 0, "tensorboard": False, "device": "cpu"}
    sections = {
        "data": ExamplesConfig(batch_size=8),
        "optimizer": OptimizerConfig(learning_rate=rate),
        "schedule": ScheduleConfig(kind="linear", warmup_steps=3),
        "run": RunConfig(out=str(out), **{**run, **changes.pop("run", {})}),
    }
    return FinetuneConfig(task=task, model=str(model), **{"epochs": 0, **sections, **changes})
