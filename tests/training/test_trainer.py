"""The training loop: accumulation is the large batch, resuming is exact, what goes wrong is named, saves are whole."""

import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastformer.data import EvaluationWindows
from fastformer.models import GPT2LMHeadModel
from fastformer.training import (
    BadLossError,
    OptimizerConfig,
    Trainer,
    evaluate,
    learning_rate_factor,
    make_optimizer,
    model_loss,
)
from fastformer.training import trainer as trainer_module
from fastformer.training.checkpoint import find_checkpoint, load_state
from fastformer.training.config import decisive
from fastformer.training.logs import read_metrics
from tests.training.runs import (
    TOKENIZER,
    TOKENS,
    VOCABULARY,
    losses,
    make_config,
    make_model,
    make_trainer,
    resumed,
    scored_by,
)


def make_batch(inputs, targets):
    return {"input_ids": inputs, "shift_labels": targets}


def test_a_run_lowers_the_loss_and_leaves_its_files(tmp_path):
    config = make_config(tmp_path / "run", max_steps=40, eval_every=20, tensorboard=True)
    # A stream that repeats can be learned; random tokens could not.
    tokens = torch.arange(4000, dtype=torch.int32) % VOCABULARY
    trainer = Trainer.on_tokens(make_model(config), tokens, tokens[:500], config, tokenizer=TOKENIZER, quiet=True)
    result = trainer.fit()
    values = losses(tmp_path / "run")
    assert len(values) == 40 and values[-1] < 0.7 * values[0]
    assert result.steps == 40 and result.stopped == "steps" and result.tokens == 40 * 4 * 8
    assert result.tokens_per_second > 0 and result.validation_loss < 0.7 * values[0]
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "validation_loss" in r] == [20, 40]
    files = {p.name for p in (tmp_path / "run" / "checkpoint").iterdir()}
    assert files == {"config.json", "model.safetensors", "characters.json", "training_state.pt", "manifest.json"}
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "run" / "checkpoint")
    assert evaluate(again, EvaluationWindows(tokens[:500], 8, 4)) == pytest.approx(result.validation_loss)


def test_the_learning_rate_follows_the_schedule(tmp_path):
    config = make_config(tmp_path)
    make_trainer(config).fit()
    rates = [r["learning_rate"] for r in read_metrics(tmp_path) if "loss" in r]
    expected = [3e-3 * learning_rate_factor("cosine", s, 12, warmup=3) for s in range(12)]
    assert rates == pytest.approx(expected)


def test_accumulated_steps_are_the_large_batch(tmp_path):
    large = make_config(tmp_path / "large", batch_size=12)
    small = make_config(tmp_path / "small", batch_size=4, optimizer=replace(large.optimizer, accumulate=3))
    trainers = [make_trainer(large), make_trainer(small)]
    for trainer in trainers:
        trainer.fit()
    assert large.tokens_per_step == small.tokens_per_step and trainers[0].tokens == trainers[1].tokens
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "large"), rel=2e-5)
    for a, b in zip(trainers[0].model.parameters(), trainers[1].model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_accumulation_weighs_batches_by_the_targets_they_score(tmp_path):
    """With padding the mean of means is not the mean: a batch with one target may not count as much as a full one."""
    config = make_config(tmp_path, optimizer=OptimizerConfig(accumulate=2, clip_norm=0.0))
    inputs = TOKENS[:64].long().view(8, 8)
    targets = TOKENS[1:65].long().view(8, 8).clone()
    targets[:4, 1:] = -100  # 4 targets against 32
    trainer = make_trainer(config)
    expected = model_loss(trainer.model, make_batch(inputs, targets)).item()
    queue = [make_batch(inputs[:4], targets[:4]), make_batch(inputs[4:], targets[4:])]
    trainer.loader.next_batch = lambda: queue.pop(0)
    assert float(trainer.train_step().loss) == pytest.approx(expected, rel=1e-6)


def test_resuming_continues_bit_for_bit(tmp_path):
    # Dropout, so that the random generators matter; a save that is not at the end of an epoch.
    whole = make_config(tmp_path / "whole", dropout=0.2)
    make_trainer(whole).fit()
    part = make_config(tmp_path / "part", dropout=0.2, save_every=5)

    class Killed(BaseException):
        pass

    calls = iter(range(1000))

    def dies_in_step_8(model, batch):
        if next(calls) == 7:
            raise Killed
        return model_loss(model, batch)

    with pytest.raises(Killed):
        make_trainer(part, objective=scored_by(dies_in_step_8)).fit()
    assert len(losses(tmp_path / "part")) == 7
    torch.manual_seed(12345)  # what a new process would have
    trainer = resumed(part, tmp_path / "part")
    assert trainer.step == 5
    trainer.fit()
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    ends = [load_state(tmp_path / name / "checkpoint") for name in ("whole", "part")]
    for a, b in zip(*(end["optimizer"]["state"].values() for end in ends)):
        assert all(torch.equal(a[key], b[key]) for key in a)
    models = [GPT2LMHeadModel.from_pretrained(tmp_path / name / "checkpoint") for name in ("whole", "part")]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models)))


def test_resuming_refuses_other_settings(tmp_path):
    config = make_config(tmp_path)
    make_trainer(config).fit()
    other = replace(config, optimizer=replace(config.optimizer, learning_rate=1.0), run=replace(config.run, seed=3))
    with pytest.raises(ValueError, match=r"optimizer.learning_rate: 0.003 there, 1.0 here; run.seed: 0 there, 3 here"):
        resumed(other, tmp_path)
    # How long it runs, and what it writes, may change.
    longer = replace(config, run=replace(config.run, max_steps=14, log_every=7, keep=3))
    assert resumed(longer, tmp_path).fit().steps == 14


def test_settings_of_other_configs_decide_too():
    config = {"task": {"head": {"bias": True}, "name": "ner"}, "run": {"seed": 1, "out": "x"}, "parallel": {"size": 2}}
    assert decisive(config) == {"task.head.bias": True, "task.name": "ner", "run.seed": 1}


def test_a_loss_that_is_not_finite_names_the_step(tmp_path):
    config = make_config(tmp_path, log_every=4, save_every=2)

    def poisoned(model, batch):
        loss = model_loss(model, batch)
        return loss * float("nan") if trainer.step == 6 else loss  # the seventh step

    trainer = make_trainer(config, objective=scored_by(poisoned))
    with pytest.raises(
        BadLossError,
        match=r"loss is nan .* at step 7 .* on samples 24 \(from token \d+\), 25 ",
    ):
        trainer.fit()
    assert load_state(find_checkpoint(tmp_path))["step"] == 6
    assert all(torch.isfinite(p).all() for p in GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint").parameters())


def test_time_ends_a_run_with_the_schedule_done(tmp_path, monkeypatch):
    """A clock that runs ahead of the steps: 1 s a step, 10 s in all, 1000 steps planned."""
    clock = {"now": 0.0}
    monkeypatch.setattr(trainer_module.time, "monotonic", lambda: clock["now"])

    def one_second(model, batch):
        clock["now"] += 1.0
        return model_loss(model, batch)

    config = make_config(tmp_path, max_steps=1000, max_minutes=10 / 60)
    result = make_trainer(config, objective=scored_by(one_second)).fit()
    assert result.steps == 10 and result.stopped == "minutes"
    rates = [r["learning_rate"] for r in read_metrics(tmp_path) if "loss" in r]
    assert rates[-1] < 0.2 * max(rates) and rates[3:] == sorted(rates[3:], reverse=True)


def test_decay_groups():
    model = make_model(make_config("unused"))
    decayed, plain = make_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and all(p.dim() >= 2 for p in decayed["params"])
    assert plain["weight_decay"] == 0.0 and all(p.dim() == 1 for p in plain["params"])
    # The tied embedding is there once.
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_clipping(tmp_path):
    config = make_config(tmp_path, optimizer=OptimizerConfig(clip_norm=1e-3, learning_rate=3e-3))
    trainer = make_trainer(config)
    assert float(trainer.train_step().norm) > 1e-3  # what is logged is the norm before
    after = torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()
    assert float(after) == pytest.approx(1e-3, rel=1e-3)


def test_evaluation_is_the_mean_over_windows_and_leaves_the_mode():
    config = make_config("unused", dropout=0.5)
    model = make_model(config).train()
    value = evaluate(model, EvaluationWindows(TOKENS[:100], 8, 5))
    assert model.training
    model.eval()
    with torch.no_grad():
        rows = [
            float(model_loss(model, make_batch(TOKENS[i : i + 8].long()[None], TOKENS[i + 1 : i + 9].long()[None])))
            for i in range(0, 96, 8)
        ]
    assert value == pytest.approx(sum(rows) / len(rows), rel=1e-5)


def test_a_cluster_that_ends_the_job_gets_a_checkpoint(tmp_path):
    handled = []
    before = signal.signal(signal.SIGTERM, lambda *_: handled.append("by the caller"))

    def told_to_end(model, batch):
        if trainer.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return model_loss(model, batch)

    try:
        trainer = make_trainer(make_config(tmp_path), objective=scored_by(told_to_end))
        assert trainer.fit().stopped == "interrupted" and not handled
        signal.raise_signal(signal.SIGTERM)
        assert handled == ["by the caller"]  # the handler from before is back
    finally:
        signal.signal(signal.SIGTERM, before)
    assert load_state(find_checkpoint(tmp_path))["step"] == 4


def test_ctrl_c_ends_the_run_with_a_checkpoint(tmp_path):
    """In a process of its own, with the real signal."""
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        import torch
        from fastformer.training import *
        from fastformer.models import GPT2Config, GPT2LMHeadModel
        def loss(model, batch):
            if trainer.step == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return model_loss(model, batch)
        config = TrainConfig(
            model=ModelConfig(n_layer=1, n_head=1, n_embd=8), data=DataConfig(block_size=8, batch_size=2),
            run=RunConfig(out={str(tmp_path)!r}, device="cpu", max_steps=100000, save_every=0, tensorboard=False))
        model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=1))
        objective = Objective(loss, causal_lm.count)
        tokens = torch.arange(500, dtype=torch.int32) % 11
        trainer = Trainer.on_tokens(model, tokens, None, config, objective=objective, quiet=True)
        print(trainer.fit().stopped)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.split() == ["interrupted"], done.stderr
    assert load_state(find_checkpoint(tmp_path))["step"] == 4
