"""Every collator through the trainer: packed, masked and corrupted text train, and resume to the bit."""

import copy

import numpy as np
import pytest
import torch

from fastformer.data import Loader, MaskedLM, PackedCausalLM, PackedRows, SpanCorruption, TokenDeletion
from fastformer.models import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from fastformer.training import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig, Trainer
from fastformer.training.objectives import causal_lm, masked_lm, seq2seq

VOCABULARY = 40
TEXTS = [np.random.default_rng(i).integers(5, 25, 4 + i % 17) for i in range(60)]


def gpt2():
    shape = {"n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **shape))


def bert():
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=24, **shape))


def t5():
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **shape))


CASES = {
    "packed": (gpt2, PackedRows(TEXTS, 24), PackedCausalLM(), {"batch_size": 2}, causal_lm),
    "masked": (bert, TEXTS, MaskedLM(4, VOCABULARY), {"batch_size": 8}, masked_lm),
    "spans": (t5, TEXTS, SpanCorruption(list(range(39, 29, -1))), {"max_tokens": 120}, seq2seq),
    "deletion": (t5, TEXTS, TokenDeletion(0.3), {"batch_size": 8, "pool": 16}, seq2seq),
}


def make(case, tmp_path, state=None):
    build, dataset, collator, options, objective = CASES[case]
    torch.manual_seed(0)
    model = build()
    if state is not None:
        model.load_state_dict(state[0])
    lengths = np.array([len(text) for text in TEXTS]) if dataset is TEXTS else None
    loader = Loader(dataset, collator, seed=1, lengths=lengths, **options)
    config = TrainConfig(
        optimizer=OptimizerConfig(learning_rate=1e-2, accumulate=2),
        schedule=ScheduleConfig(warmup_steps=2),
        run=RunConfig(out=str(tmp_path), device="cpu", max_steps=200, tensorboard=False),
    )
    trainer = Trainer(model.train(), loader, config, objective=objective, quiet=True)
    if state is not None:
        trainer.load_state_dict(state[1])
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_trains_and_resumes_to_the_bit(case, tmp_path):
    whole = make(case, tmp_path)
    losses = [whole.train_step().loss.item() for _ in range(24)]
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])

    part = make(case, tmp_path)
    for _ in range(13):
        part.train_step()
    state = copy.deepcopy((part.model.state_dict(), part.state_dict()))
    resumed = make(case, tmp_path, state)
    assert [resumed.train_step().loss.item() for _ in range(11)] == losses[13:]
