"""The training loop.

One step: ``accumulate`` batches forward and backward, the gradient's norm clipped, one fused AdamW update at the
schedule's learning rate. With accumulation each batch's mean loss is weighted by its share of the step's scored
targets, so the step's loss and gradient are those of the one large batch whatever the padding. In float16 the loss is
scaled up before backward, so that small gradients are not rounded to zero (Micikevicius et al., arXiv:1710.03740).

Losses stay on the device until they are logged: nothing waits for a GPU in between. The state of a run is its weights
and :meth:`Trainer.state_dict`; a run that continues from them repeats the losses of one that never stopped, to the bit.
"""

from __future__ import annotations

import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..data import Batch, EvaluationWindows, Tokenizer, Windows, to_device
from .checkpoint import NEWEST, random_state, restore_random_state, save_checkpoint
from .config import decisive, resolve_device, resolve_dtype, to_dict
from .ema import Ema
from .evaluate import evaluate
from .logs import MetricsLog, Progress
from .monitor import SpikeDetector, flops_per_token, length_in, name_batch, peak_flops, peak_memory, tokens_in
from .objectives import Objective, causal_lm
from .optimizer import make_optimizer
from .parallel import Parallel
from .recompute import recompute_blocks
from .schedule import learning_rate_factor

MOST_SKIPPED = 10  # in a row; a model that is lost does not come back by leaving batches out


class Loader(Protocol):
    """Batches without end, the n-th a function of the seed and n alone. With ``describe(sample)``, messages have its
    words for an entry of a batch's ``_ids``."""

    def next_batch(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class BadLossError(RuntimeError):
    """The loss or the gradient is not finite, or jumped; the message names the step and the batch."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        steps, tokens: done in all, those before a resume included; padding is no token.
        seconds: wall time of training, evaluations included.
        tokens_per_second: training steps only.
        train_loss: mean of the last logged steps.
        validation_loss: after the last step; NaN without validation batches.
        stopped: why: "steps", "minutes", "patience", "interrupted", or what a subclass stops for.
        best: value of ``run.best_metric`` of the best measured model; NaN where there is none.
        skipped: steps left out.
        metrics: of the last measurement.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    train_loss: float
    validation_loss: float
    stopped: str
    best: float = math.nan
    skipped: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


class Step(NamedTuple):
    """One update; ``loss`` and ``norm`` (of the gradient before clipping) are still on the device."""

    number: int
    loss: Tensor
    norm: Tensor
    learning_rate: float
    tokens: int
    batch: list[Any]
    skipped: str = ""


@contextmanager
def long_lived_objects_frozen() -> Iterator[None]:
    """Inside, the garbage collector leaves alone what exists now (modules, libraries).

    Every step makes thousands of Python objects, so it runs often, and would walk through all of those each time.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Trainer:
    """Trains ``model`` on the batches of ``loader`` until the steps or the minutes of ``config.run`` are over.

    Args:
        model: on any device; moved to the one ``config.run`` asks for. Called by ``objective``, saved by its
            ``save_pretrained``.
        loader: batches, without end.
        config: a :class:`TrainConfig`, or any dataclass with its sections ``optimizer``, ``schedule`` and ``run``.
        objective: what is minimised.
        validation: finite batches, the same at every iteration, for the validation loss.
        metrics: ``metrics(model)``, further numbers by name, measured beside the validation loss, in evaluation mode,
            by every process.
        tokenizer: saved with every checkpoint.
        parallel: the other processes of the job.
        quiet: no progress line.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        config: Any,
        *,
        objective: Objective = causal_lm,
        validation: Iterable[Batch] | None = None,
        metrics: Callable[[nn.Module], dict[str, float]] | None = None,
        tokenizer: Tokenizer | None = None,
        parallel: Parallel | None = None,
        quiet: bool = False,
    ) -> None:
        if not isinstance(objective, Objective):
            raise TypeError(f"objective: expected an Objective(loss, count), got {type(objective).__name__}")
        run = config.run
        if (run.patience or run.keep_best) and validation is None and metrics is None:
            raise ValueError("run.patience and run.keep_best: there are no validation batches and no metrics to go by")
        self.config = config
        self.parallel = parallel or Parallel()
        self.device = resolve_device(run.device)
        self.dtype = resolve_dtype(run.dtype, self.device)
        self.model = model
        if run.recompute:
            recompute_blocks(self.model)
        self.called = self.parallel.prepare(self.model, self.device)
        self.loader = loader
        self.objective = objective
        self.validation = validation
        self.metrics = metrics
        self.tokenizer = tokenizer
        self.quiet = quiet
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.scaler = self.parallel.scaler(self.device.type, self.dtype == torch.float16)
        self.ema = Ema(self.model, config.optimizer.ema_decay) if config.optimizer.ema_decay else None
        self.spikes = SpikeDetector(run.spike_zscore, run.spike_window)
        self.out = Path(run.out)
        self.step = self.tokens = self.skipped = 0
        self.seconds_before = 0.0  # of the runs this one resumes
        self.stopped = ""
        self.best, self.measured_since_best = math.nan, 0
        self._skipped_in_a_row = 0
        self._pending: list[Step] = []
        self._begin = self._mark = time.monotonic()
        self._seconds_timed, self._tokens_timed, self._length = 0.0, 0, 0
        self._train_loss = math.nan
        self._measured: dict[str, float] = {}
        self._validated = self._saved = -1  # steps of the latest

    @classmethod
    def on_tokens(
        cls, model: nn.Module, train: Tensor, validation: Tensor | None, config: Any, **options: Any
    ) -> Trainer:
        """Trains on windows of the (N,) ids ``train``; the windows of the (M,) ids ``validation`` do not overlap."""
        data, parallel = config.data, options.get("parallel") or Parallel()
        sizes, ranks = (data.block_size, data.batch_size), {"rank": parallel.rank, "world_size": parallel.world_size}
        loader = Windows(train, *sizes, seed=config.run.seed, **ranks)
        if validation is not None:
            options["validation"] = EvaluationWindows(validation, *sizes, config.run.eval_windows, **ranks)
        return cls(model, loader, config, **options)

    def fit(self) -> Result:
        """Runs to the end, leaving the checkpoints and the logs in ``config.run.out``.

        Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint.

        Raises:
            BadLossError: the loss or the gradient is not finite, or jumped; checkpoints stay as they were before.
            CheckpointError: a checkpoint could not be written; those before it stay.
        """
        run = self.config.run
        self.log = MetricsLog(run.out, self.step, run.tensorboard) if self.parallel.writes else None
        self.progress = Progress(run.max_steps, quiet=self.quiet or not self.parallel.writes)
        self.peak, self.peak_source = peak_flops(self.device, self.dtype)
        self.model.train()
        self._begin = self._mark = time.monotonic()
        try:
            with self._stop_on_interrupt(), long_lived_objects_frozen():
                while not self._finished():
                    self._pending.append(self.train_step())
                    if self.step % run.log_every == 0:
                        self._record()
                    if run.eval_every and self.step % run.eval_every == 0:
                        self._validate()
                    if run.save_every and self.step % run.save_every == 0:
                        self.save()
                self._record()
                seconds = self.elapsed()
                if self._validated != self.step:
                    self._validate()
                if self._saved != self.step:
                    self.save()
                if self.ema is not None:
                    with self.ema.applied():
                        self._save_weights("ema")
        finally:
            self.progress.close()
            if self.log is not None:
                self.log.close()
        return Result(
            self.step,
            self.tokens,
            seconds,
            self._tokens_timed / self._seconds_timed if self._seconds_timed else math.nan,
            self._train_loss,
            self._measured.get("validation_loss", math.nan),
            self.stopped,
            self.best,
            self.skipped,
            self._measured,
        )

    def train_step(self) -> Step:
        """One update, or, where ``run.on_bad_loss`` skips, none."""
        optimizer = self.config.optimizer
        rate = optimizer.learning_rate * self._learning_rate_factor()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("multiple", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        batches = [self.loader.next_batch() for _ in range(optimizer.accumulate)]
        named = [sample for batch in batches for sample in batch.get("_ids", ())]
        counts = [self.objective.count(batch) for batch in batches]
        targets = max(1, self.parallel.total(sum(counts)))
        alone = self.parallel.world_size == 1
        total = torch.zeros((), device=self.device)
        for index, (batch, count) in enumerate(zip(batches, counts)):
            if not count and sum(counts) and alone:
                continue  # the mean over no target is not a number
            inputs = to_device(batch, self.device)
            with self.parallel.accumulating(self.called, last=index == len(batches) - 1):
                with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                    loss = self.objective.loss(self.called, inputs)
                    # A rank without targets has its part in the others' backward all the same.
                    loss = loss * (count / targets) if count or alone else loss.nan_to_num() * 0.0
                self.scaler.scale(loss * self.parallel.gradient_scale).backward()
            total += loss.detach()
        total = self.parallel.sum(total)
        self.scaler.unscale_(self.optimizer)
        norm = self.parallel.clip(list(self.model.parameters()), optimizer.clip_norm or math.inf)
        self.step += 1
        tokens = sum(map(tokens_in, batches))
        self._length = length_in(batches[0])
        done = Step(self.step, total, norm, rate, tokens, named)
        run = self.config.run
        if run.on_bad_loss == "skip" or run.spike_zscore:
            done = done._replace(skipped=self._problem(done, float(total), float(norm)))
        if not done.skipped:
            self.scaler.step(self.optimizer)
            if self.ema is not None:
                self.ema.update(self.step)
        self.scaler.update()
        return done

    @property
    def flops_per_token(self) -> float:
        """Of training, in the last batch; NaN where the model does not say."""
        return flops_per_token(self.model, self._length)

    def elapsed(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.parallel.same(self.seconds_before + time.monotonic() - self._begin)

    def save(self) -> Path:
        """Writes the checkpoint, whole or not at all, and returns its directory."""
        self._record()
        # Whatever an earlier run left there goes with the first checkpoint of this one.
        keep = self.config.run.keep if self._saved >= 0 else 1
        path = self._save_weights(NEWEST, self.state_dict(), keep)
        self._saved = self.step
        self._mark = time.monotonic()
        return path

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to go on exactly, besides the weights."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "skipped": [self.skipped, self._skipped_in_a_row],
            "seconds": self.elapsed(),
            "optimizer": self.parallel.optimizer_state(self.model, self.optimizer),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(self.parallel),
            "spikes": self.spikes.state_dict(),
            "best": [self.best, self.measured_since_best],
            "data": self.loader.state_dict(),
            "random": self.parallel.gather(random_state()),
            "config": to_dict(self.config),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues a saved run. The weights are the caller's to load, before.

        Raises:
            ValueError: a setting that decides the losses is not that of the saved run; the message names them all.
        """
        mine, theirs = decisive(to_dict(self.config)), decisive(state["config"])
        changed = [
            f"{name}: {theirs.get(name)!r} there, {value!r} here"
            for name, value in mine.items()
            if theirs.get(name) != value
        ]
        if changed:
            raise ValueError("cannot resume exactly with other settings: " + "; ".join(changed))
        self.step, self.tokens, self.seconds_before = state["step"], state["tokens"], state["seconds"]
        self.skipped, self._skipped_in_a_row = state["skipped"]
        self.best, self.measured_since_best = state["best"]
        self._saved = self.step
        parts = state.get("parts")
        self.parallel.load_optimizer_state(self.model, self.optimizer, state["optimizer"], parts)
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"], self.parallel, parts)
        self.spikes.load_state_dict(state["spikes"])
        self.loader.load_state_dict(state["data"])
        if len(state["random"]) == self.parallel.world_size:
            restore_random_state(state["random"][self.parallel.rank])
        else:  # other numbers than some rank had before, at this step or at the first
            place = self.step * self.parallel.world_size + self.parallel.rank
            torch.manual_seed(self.config.run.seed + 1_000_003 * (place + 1))

    def _position(self) -> float:
        """Steps done, or what the clock makes of them where a time limit is closer to its end than the steps are."""
        run = self.config.run
        clock = self.elapsed() / (60.0 * run.max_minutes) if run.max_minutes else 0.0
        return max(self.step, min(1.0, clock) * run.max_steps)

    def _learning_rate_factor(self) -> float:
        schedule, total = self.config.schedule, self.config.run.max_steps
        # The clock may hurry the decay, not the warm-up.
        position = self.step if self.step < schedule.warmup_steps else self._position()
        return learning_rate_factor(
            schedule.kind,
            position,
            total,
            warmup=min(schedule.warmup_steps, total // 2),
            final_ratio=schedule.final_ratio,
            decay_fraction=schedule.decay_fraction,
        )

    def _finished(self) -> bool:
        run = self.config.run
        if not self.stopped and self.step >= run.max_steps:
            self.stopped = "steps"
        if not self.stopped and run.max_minutes and self.elapsed() >= 60.0 * run.max_minutes:
            self.stopped = "minutes"
        if not self.stopped and run.patience and self.measured_since_best >= run.patience:
            self.stopped = "patience"
        if self.parallel.any(bool(self.stopped)):
            self.stopped = self.stopped or "interrupted"  # another rank was
        return bool(self.stopped)

    def _problem(self, step: Step, loss: float, norm: float) -> str:
        """What is wrong with a step, in words, or ""; raises where that is to stop the run."""
        # A float16 gradient beyond the largest number is no accident: the scaler looks for the largest scale.
        finite = math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())
        problem = self.spikes.check(loss) if finite else f"the loss is {loss} and the norm of the gradient {norm}"
        if not problem:
            self._skipped_in_a_row = 0
            return ""
        self._skipped_in_a_row += 1
        self.skipped += 1
        if self.config.run.on_bad_loss == "skip" and self._skipped_in_a_row < MOST_SKIPPED:
            return problem
        samples = [sample for samples in self.parallel.gather(step.batch) for sample in samples]
        batch = name_batch(samples, getattr(self.loader, "describe", str))
        raise BadLossError(
            f"{problem}, at step {step.number} (learning rate {step.learning_rate:.2e}), on {batch}. "
            "The last checkpoint is from before it. Usual remedies: a look at that batch, a lower "
            "optimizer.learning_rate, a longer schedule.warmup_steps, run.dtype float32, run.on_bad_loss skip"
        )

    def _record(self) -> None:
        """Reads the pending losses from the device, checks and logs them."""
        if not self._pending:
            return
        steps, self._pending = self._pending, []
        losses = torch.stack([step.loss for step in steps]).tolist()  # waits for the device
        norms = torch.stack([step.norm for step in steps]).tolist()
        seconds = time.monotonic() - self._mark
        tokens = self.parallel.total(sum(step.tokens for step in steps))
        self._seconds_timed += seconds
        self._tokens_timed += tokens
        self.tokens += tokens
        speed = tokens / max(seconds, 1e-9)
        run = self.config.run
        if run.on_bad_loss == "stop" and not run.spike_zscore:  # else each step has been looked at
            for step, loss, norm in zip(steps, losses, norms):
                self._problem(step, loss, norm)
        mfu = speed * self.flops_per_token / (self.peak * self.parallel.world_size)
        memory = peak_memory(self.device)
        records: list[dict[str, Any]] = []
        for step, loss, norm in zip(steps, losses, norms):
            record = {"step": step.number, "loss": loss, "gradient_norm": norm, "learning_rate": step.learning_rate}
            record |= {"tokens_per_second": speed, "mfu": mfu, "peak_memory": memory}
            records.append(record | ({"skipped": step.skipped, "batch": step.batch} if step.skipped else {}))
        used = [loss for step, loss in zip(steps, losses) if not step.skipped]
        self._train_loss = sum(used) / len(used) if used else self._train_loss
        if self.log is not None:
            self.log.write(records)
        share = self._position() / run.max_steps
        left = self.elapsed() * (1.0 - share) / max(share, 1e-9)
        self.progress.update(self.step, share, self._train_loss, speed, left, mfu)
        self._mark = time.monotonic()

    def _validate(self) -> None:
        """Measures the model, or the average of its weights, and keeps it where it is the best so far."""
        self._record()
        self._validated = self.step
        if self.validation is None and self.metrics is None:
            return
        run = self.config.run
        # Metrics may draw random numbers; those of the training steps are not to depend on how often one measures.
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.ema.applied() if self.ema is not None else nullcontext():
            self._measured = self._measure()
            if self.log is not None:
                self.log.write([{"step": self.step, **self._measured}])
            self.progress.validation(self._measured.get("validation_loss", math.nan))
            if run.best_metric not in self._measured:
                raise ValueError(f"run.best_metric: {run.best_metric!r} is none of {', '.join(self._measured)}")
            value = self._measured[run.best_metric]
            better = value > self.best if run.best_is == "highest" else value < self.best
            self.measured_since_best += 1
            if better or (math.isnan(self.best) and not math.isnan(value)):
                self.best, self.measured_since_best = value, 0
                if run.keep_best:
                    self._save_weights("best")
        self._mark = time.monotonic()

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        measured = {}
        self.model.eval()
        if self.validation is not None:
            options = {"objective": self.objective, "dtype": self.dtype, "parallel": self.parallel}
            measured["validation_loss"] = evaluate(self.called, self.validation, **options)
        if self.metrics is not None:
            measured |= {name: float(value) for name, value in self.metrics(self.model).items()}
        self.model.train()
        return measured

    def _save_weights(self, name: str, state: dict[str, Any] | None = None, keep: int = 1) -> Path:
        options: dict[str, Any] = {"keep": keep, "weights": self.parallel.weights(self.model)}
        if state is not None and self.parallel.holds_part():
            options["parts"] = self.parallel.optimizer_parts(self.model, self.optimizer)
            options["parts"] |= {} if self.ema is None else self.ema.parts(self.parallel)
        return save_checkpoint(self.out / name, self.model, self.tokenizer, state, parallel=self.parallel, **options)

    @contextmanager
    def _stop_on_interrupt(self) -> Iterator[None]:
        """Ctrl-C asks the loop to end after this step; pressed again, it interrupts at once. So does SIGTERM, by which
        a cluster announces the end of a job's time."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number, _frame) -> None:
            self.stopped = "interrupted"
            signal.signal(number, before[number])

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
