"""Tiny runs for the tests of training: a GPT-2 of two layers on eleven characters."""

import torch

from fastformer.data import CharTokenizer
from fastformer.models import GPT2Config, GPT2LMHeadModel
from fastformer.training import (
    DataConfig,
    ModelConfig,
    Objective,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    Trainer,
    causal_lm,
)
from fastformer.training.checkpoint import load_state, restore_checkpoint
from fastformer.training.logs import read_metrics

VOCABULARY = 11
TOKENS = torch.randint(VOCABULARY, (4000,), generator=torch.Generator().manual_seed(7), dtype=torch.int32)
TOKENIZER = CharTokenizer("abcdefghijk")


def make_config(out, *, dropout=0.0, batch_size=4, optimizer=None, schedule=None, **run):
    run = {"max_steps": 12, "log_every": 1, "eval_every": 0, "save_every": 0, "tensorboard": False, **run}
    return TrainConfig(
        model=ModelConfig(n_layer=2, n_head=2, n_embd=16, dropout=dropout),
        data=DataConfig(block_size=8, batch_size=batch_size),
        optimizer=optimizer or OptimizerConfig(learning_rate=3e-3),
        schedule=schedule or ScheduleConfig(warmup_steps=3),
        run=RunConfig(out=str(out), device="cpu", **run),
    )


def make_model(config, seed=0):
    torch.manual_seed(seed)
    shape, p = config.model, config.model.dropout
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=config.data.block_size,
            n_embd=shape.n_embd,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            resid_pdrop=p,
            embd_pdrop=p,
            attn_pdrop=p,
        )
    )


def make_trainer(config, model=None, **options):
    return Trainer.on_tokens(
        model or make_model(config), TOKENS, TOKENS[:500], config, tokenizer=TOKENIZER, quiet=True, **options
    )


def resumed(config, out, **options):
    """A trainer that goes on from the newest whole checkpoint of ``out``."""
    checkpoint = restore_checkpoint(out)
    trainer = make_trainer(config, GPT2LMHeadModel.from_pretrained(checkpoint), **options)
    trainer.load_state_dict(load_state(checkpoint))
    return trainer


def scored_by(loss):
    """An objective for next tokens with another loss."""
    return Objective(loss, causal_lm.count)


def losses(out):
    return [r["loss"] for r in read_metrics(out) if "loss" in r]
