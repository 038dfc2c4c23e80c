"""What the trainer does beside the step: average, best model, early stopping, spikes and NaN, float16, any loader."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch

from fastformer.data import EvaluationWindows
from fastformer.models import BertConfig, BertForMaskedLM, GPT2LMHeadModel
from fastformer.training import (
    BadLossError,
    OptimizerConfig,
    Parallel,
    RunConfig,
    ScheduleConfig,
    Trainer,
    evaluate,
    masked_lm,
    model_loss,
)
from fastformer.training.checkpoint import load_state
from fastformer.training.logs import MetricsLog, read_metrics
from tests.training.runs import TOKENS, losses, make_config, make_model, make_trainer, scored_by


def test_the_average_is_what_is_measured_and_saved(tmp_path):
    config = make_config(tmp_path, optimizer=OptimizerConfig(learning_rate=1e-2, ema_decay=0.8), eval_windows=62)
    trainer = make_trainer(config)
    result = trainer.fit()
    average = GPT2LMHeadModel.from_pretrained(tmp_path / "ema")
    raw = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint")
    saved = load_state(tmp_path / "checkpoint")["ema"]
    for name, parameter in average.named_parameters():
        assert torch.equal(parameter, saved[name])
        assert torch.equal(raw.get_parameter(name), trainer.model.get_parameter(name))
        assert not torch.equal(raw.get_parameter(name), parameter)
    held_out = EvaluationWindows(TOKENS[:500], 8, 4)
    assert evaluate(average, held_out) == pytest.approx(result.validation_loss, rel=1e-6)
    assert evaluate(raw, held_out) != pytest.approx(result.validation_loss, rel=1e-6)


def script(values):
    """A metric that takes these values in turn, and draws random numbers."""
    values = iter(values)

    def metrics(model):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)
        return {"accuracy": next(values)}

    return metrics


def test_the_best_model_is_kept_and_patience_ends_the_run(tmp_path):
    config = make_config(
        tmp_path, max_steps=40, eval_every=2, keep_best=True, best_metric="accuracy", best_is="highest", patience=3
    )
    seen = {}
    metrics = script([0.5, 0.7, 0.6, 0.8, 0.8, math.nan, 0.7, 1.0])

    def watched(model):
        seen[trainer.step] = [p.clone() for p in model.parameters()]
        return metrics(model)

    trainer = make_trainer(config, metrics=watched)
    result = trainer.fit()
    assert result.stopped == "patience" and result.steps == 14  # three measurements after the best, of step 8
    assert result.best == 0.8 and result.metrics["accuracy"] == 0.7
    best = GPT2LMHeadModel.from_pretrained(tmp_path / "best")
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), seen[8], strict=True))
    records = [r for r in read_metrics(tmp_path) if "accuracy" in r]
    assert [r["step"] for r in records] == [2, 4, 6, 8, 10, 12, 14] and records[5]["accuracy"] is None
    assert all(math.isfinite(r["validation_loss"]) for r in records)


def test_how_often_one_measures_does_not_change_the_training(tmp_path):
    for name, every in (("often", 1), ("never", 0)):
        config = make_config(tmp_path / name, dropout=0.3, eval_every=every)
        make_trainer(config, metrics=script([1.0] * 20)).fit()
    assert losses(tmp_path / "often") == losses(tmp_path / "never")


def test_nothing_to_measure_by_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"run.patience and run.keep_best: there are no validation batches"):
        Trainer.on_tokens(make_model(make_config(tmp_path)), TOKENS, None, make_config(tmp_path, patience=1))
    with pytest.raises(ValueError, match=r"run.best_metric: 'f1' is none of validation_loss"):
        make_trainer(make_config(tmp_path, best_metric="f1")).fit()
    with pytest.raises(TypeError, match=r"objective: expected an Objective\(loss, count\), got function"):
        make_trainer(make_config(tmp_path), objective=model_loss)


def poisoned(trainer_of, factors):
    """An objective whose loss, in the steps of ``factors`` (from 1), is multiplied."""

    def loss(model, batch):
        return model_loss(model, batch) * factors.get(trainer_of().step + 1, 1.0)

    return scored_by(loss)


@pytest.mark.parametrize("factor", [math.nan, math.inf, 50.0], ids=["nan", "inf", "spike"])
def test_a_bad_batch_is_skipped_by_name(tmp_path, factor):
    config = make_config(tmp_path, max_steps=16, on_bad_loss="skip", spike_zscore=8.0)
    before = {}

    def remember(trainer, step):
        if step == 12:
            before.update({name: p.clone() for name, p in trainer.model.named_parameters()})

    trainer = make_trainer(config, objective=poisoned(lambda: trainer, {12: factor}))
    train_step = trainer.train_step

    def watched():
        remember(trainer, trainer.step + 1)
        done = train_step()
        if done.number == 12:
            assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
        return done

    trainer.train_step = watched
    result = trainer.fit()
    assert result.steps == 16 and result.skipped == 1 and math.isfinite(result.train_loss)
    skipped = [r for r in read_metrics(tmp_path) if r.get("skipped")]
    assert [r["step"] for r in skipped] == [12] and skipped[0]["batch"] == [44, 45, 46, 47]
    assert ("jumped" if factor == 50.0 else "norm of the gradient") in skipped[0]["skipped"]
    assert load_state(tmp_path / "checkpoint")["skipped"] == [1, 0]


def test_a_spike_stops_the_run_by_name(tmp_path):
    config = make_config(tmp_path, max_steps=16, spike_zscore=8.0, save_every=4)
    trainer = make_trainer(config, objective=poisoned(lambda: trainer, {12: 50.0}))
    with pytest.raises(BadLossError, match=r"jumped to .* at step 12 .* on samples 44 \(from token \d+\), 45"):
        trainer.fit()
    assert load_state(tmp_path / "checkpoint")["step"] == 8


def test_a_gradient_that_is_not_finite_stops_before_a_checkpoint_of_it(tmp_path):
    """The loss is fine, and the weights it would leave are not."""

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.nan

    def loss(model, batch):
        value = model_loss(model, batch)
        return Poison.apply(value) if trainer.step == 5 else value

    trainer = make_trainer(make_config(tmp_path, save_every=2, log_every=100), objective=scored_by(loss))
    with pytest.raises(BadLossError, match=r"norm of the gradient nan, at step 6 "):
        trainer.fit()
    assert load_state(tmp_path / "checkpoint")["step"] == 4


def test_a_model_that_is_lost_does_not_skip_for_ever(tmp_path):
    config = make_config(tmp_path, max_steps=100, on_bad_loss="skip")
    trainer = make_trainer(config, objective=poisoned(lambda: trainer, dict.fromkeys(range(5, 100), math.nan)))
    with pytest.raises(BadLossError, match="at step 14 "):
        trainer.fit()


def test_batches_without_targets(tmp_path):
    """One among others adds nothing; a step that has no other is a bad one, by name."""
    config = make_config(tmp_path, optimizer=OptimizerConfig(accumulate=2))
    alone, beside = make_trainer(config), make_trainer(config)
    batch = alone.loader.next_batch()
    empty = batch | {"shift_labels": torch.full_like(batch["shift_labels"], -100)}
    steps = []
    for trainer, batches in ((alone, [batch, batch]), (beside, [empty, batch])):
        trainer.loader.next_batch = iter(batches).__next__
        steps.append(trainer.train_step())
    assert float(steps[0].loss) == pytest.approx(float(steps[1].loss), rel=1e-6)
    assert float(steps[0].norm) == pytest.approx(float(steps[1].norm), rel=1e-5)
    trainer = make_trainer(config)
    trainer.loader.next_batch = lambda: empty
    with pytest.raises(BadLossError, match=r"the loss is nan .* at step 1 .* on samples 0 "):
        trainer.fit()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains(tmp_path, dtype):
    tokens = torch.arange(2000, dtype=torch.int32) % 11
    config = make_config(tmp_path, max_steps=40, dtype=dtype, optimizer=OptimizerConfig(learning_rate=1e-2))
    trainer = Trainer.on_tokens(make_model(config), tokens, tokens[:200], config, quiet=True)
    seen = set()
    forward = trainer.model.transformer.h[0].mlp.forward
    trainer.model.transformer.h[0].mlp.forward = lambda x: seen.add((out := forward(x)).dtype) or out
    result = trainer.fit()
    assert seen == {getattr(torch, dtype)} and all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert trainer.scaler.is_enabled() == (dtype == "float16")
    assert result.validation_loss < 0.7 * losses(tmp_path)[0]


def test_a_scale_that_overflows_leaves_the_weights_and_shrinks(tmp_path):
    trainer = make_trainer(make_config(tmp_path, dtype="float16"))
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**40})
    before = [p.clone() for p in trainer.model.parameters()]
    step = trainer.train_step()
    assert math.isfinite(step.loss) and not math.isfinite(step.norm)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.scaler.get_scale() == 2.0**39


@dataclass(frozen=True)
class TaskConfig:
    """Another job's configuration: the sections the trainer reads, and one of its own."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)


class MaskedText:
    """Rows of 2 to 8 tokens, padded; every other token masked."""

    def __init__(self):
        self.position = 0

    def next_batch(self):
        generator = torch.Generator().manual_seed(self.position)
        lengths = torch.randint(2, 9, (4,), generator=generator)
        self.position += 1
        ids = 2 + (torch.arange(8) + torch.randint(5, (4, 1), generator=generator)) % 5
        mask = torch.arange(8) < lengths[:, None]
        hidden = (torch.arange(8) % 2 == 0) & mask
        labels = torch.where(hidden, ids, -100)
        ids = torch.where(hidden, 1, ids) * mask
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels, "_ids": [f"text {self.position}"]}

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_any_loader_objective_and_model(tmp_path):
    run = RunConfig(out=str(tmp_path), device="cpu", max_steps=60, log_every=5, save_every=20, tensorboard=False)
    config = TaskConfig(OptimizerConfig(learning_rate=1e-2, accumulate=2), ScheduleConfig(warmup_steps=5), run)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForMaskedLM(BertConfig(vocab_size=8, max_position_embeddings=8, **shape))
    result = Trainer(model, MaskedText(), config, objective=masked_lm, quiet=True).fit()
    values = losses(tmp_path)
    assert sum(values[-5:]) < 0.85 * sum(values[:5])
    # Tokens are those that are not padding, of all batches.
    texts = MaskedText()
    assert result.tokens == sum(int(texts.next_batch()["attention_mask"].sum()) for _ in range(120))
    assert math.isnan(result.validation_loss)


def test_the_log_has_speed_and_memory(tmp_path):
    make_trainer(make_config(tmp_path, log_every=3)).fit()
    for record in read_metrics(tmp_path)[:-1]:
        assert record["tokens_per_second"] > 0 and record["mfu"] > 0 and record["peak_memory"] > 2**20


def test_the_log_survives_a_process_that_died_in_a_line(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write([{"step": 1, "loss": 1.5}, {"step": 2, "loss": math.inf}])
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.5}, {"step": 2, "loss": None}]
    again = MetricsLog(tmp_path, first_step=2, tensorboard=False)
    again.write([{"step": 3, "loss": 1.0}])
    again.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]


def test_ranks_weigh_by_their_targets(tmp_path):
    """A rank's loss counts by its share of all targets, times the ranks that an average of gradients divides by."""

    class SecondOfTwo(Parallel):
        rank, world_size, gradient_scale = 1, 2, 2.0

        def total(self, number):
            return 4 * number  # the other rank scores three times as many

    alone, shared = (make_trainer(make_config(tmp_path), parallel=p) for p in (None, SecondOfTwo()))
    assert shared.loader.rank == 1 and len(shared.loader.next_batch()["input_ids"]) == 2
    batch = alone.loader.next_batch()
    for trainer in (alone, shared):
        trainer.model.load_state_dict(alone.model.state_dict())
        trainer.loader.next_batch = lambda: batch
        trainer.config = replace(trainer.config, optimizer=replace(trainer.config.optimizer, clip_norm=0.0))
    steps = [trainer.train_step() for trainer in (alone, shared)]
    assert float(steps[1].loss) == pytest.approx(float(steps[0].loss) / 4, rel=1e-6)
    assert float(steps[1].norm) == pytest.approx(float(steps[0].norm) / 2, rel=1e-5)
