"""The training loop.

One step: ``accumulate`` batches forward and backward, the gradient's norm clipped, one fused AdamW update
(arXiv:1711.05101) at the schedule's learning rate. With accumulation each batch's mean loss is weighted by its share of
the step's scored targets, so the step's loss and gradient are those of the one large batch whatever the padding.

Losses stay on the device until they are logged: nothing waits for a GPU in between. The state of a run is its weights
and :meth:`Trainer.state_dict`; a run that continues from them repeats the losses of one that never stopped, to the bit.
"""

from __future__ import annotations

import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch, Tokenizer, Windows, evaluation_batches, to_device
from .checkpoint import random_state, restore_random_state, save_checkpoint
from .config import OptimizerConfig, TrainConfig, resolve_device, resolve_dtype, to_dict
from .logs import MetricsLog, Progress
from .schedule import learning_rate_factor

Loss = Callable[[nn.Module, Batch], Tensor]


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


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the step."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        steps, tokens: done in all, those before a resume included.
        seconds: wall time of training, evaluations included.
        tokens_per_second: training steps only.
        train_loss: mean of the last logged steps.
        validation_loss: after the last step; NaN without validation tokens.
        stopped: why: "steps", "minutes" or "interrupted".
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    train_loss: float
    validation_loss: float
    stopped: str


def causal_lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next token over the targets that are not -100, in float32."""
    inputs = {name: value for name, value in batch.items() if name != "_ids"}
    return model(**inputs, use_cache=False).loss


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW in two groups: matrices and embeddings with weight decay; biases and norm weights without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: Tensor,
    block_size: int,
    batch_size: int,
    max_windows: int | None = None,
    *,
    loss: Loss = causal_lm_loss,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Mean loss over windows of ``tokens`` that do not overlap, in evaluation mode; keeps no logits.

    Args:
        tokens: (N,) held-out ids.
        max_windows: how many, evenly spaced; None for all of them.
        dtype: of the forward pass; float32, or bfloat16 by autocast.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, windows = torch.zeros((), device=device, dtype=torch.float64), 0
    for batch in evaluation_batches(tokens, block_size, batch_size, max_windows):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            total += loss(model, to_device(batch, device)).double() * len(batch["input_ids"])
        windows += len(batch["input_ids"])
    model.train(was_training)
    return float(total) / windows


class Trainer:
    """Trains ``model`` on windows of ``train`` until the steps or the minutes of ``config.run`` are over.

    Args:
        model: on any device; moved to the one ``config.run`` asks for. Called by ``loss``, saved by its
            ``save_pretrained``.
        train: (N,) training ids.
        validation: (M,) held-out ids, or None.
        config: the run.
        tokenizer: saved with every checkpoint.
        loss: ``loss(model, batch)``, the mean over the batch's targets that are not -100.
        quiet: no progress line.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Tensor,
        validation: Tensor | None,
        config: TrainConfig,
        *,
        tokenizer: Tokenizer | None = None,
        loss: Loss = causal_lm_loss,
        quiet: bool = False,
    ) -> None:
        self.config = config
        self.device = resolve_device(config.run.device)
        self.dtype = resolve_dtype(config.run.dtype, self.device)
        self.model = model.to(self.device)
        self.batches = Windows(train, config.data.block_size, config.data.batch_size, seed=config.run.seed)
        self.validation = validation
        self.tokenizer = tokenizer
        self.loss = loss
        self.quiet = quiet
        self.optimizer = make_optimizer(model, config.optimizer)
        self.checkpoint = Path(config.run.out) / "checkpoint"
        self.step = 0
        self.seconds_before = 0.0  # of the runs this one resumes
        self.stopped = ""
        self._pending: list[tuple[int, Tensor, Tensor, float]] = []
        self._begin = self._mark = time.monotonic()
        self._step_seconds, self._steps_timed = 0.0, 0
        self._train_loss = self._validation_loss = math.nan
        self._validated = self._saved = -1  # steps of the latest

    def fit(self) -> Result:
        """Runs to the end, leaving the checkpoint and the logs in ``config.run.out``.

        Ctrl-C ends the run after the current step, with a checkpoint.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; checkpoints stay as they were before.
        """
        run = self.config.run
        self.log = MetricsLog(run.out, first_step=self.step, tensorboard=run.tensorboard)
        self.progress = Progress(run.max_steps, quiet=self.quiet)
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
        finally:
            self.progress.close()
            self.log.close()
        tokens = self.step * self.tokens_per_step
        return Result(self.step, tokens, seconds, self._speed(), self._train_loss, self._validation_loss, self.stopped)

    def train_step(self) -> tuple[int, Tensor, Tensor, float]:
        """One update; returns (step, loss, gradient norm, learning rate) with the tensors still on the device."""
        optimizer = self.config.optimizer
        rate = optimizer.learning_rate * self._learning_rate_factor()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        batches = [self.batches.next_batch() for _ in range(optimizer.accumulate)]
        targets = [int((batch["shift_labels"] != -100).sum()) for batch in batches]
        total = torch.zeros((), device=self.device)
        for batch, count in zip(batches, targets):
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                loss = self.loss(self.model, to_device(batch, self.device)) * (count / max(1, sum(targets)))
            loss.backward()
            total += loss.detach()
        largest = optimizer.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), largest)
        self.optimizer.step()
        self.step += 1
        return self.step, total, norm.detach(), rate

    @property
    def tokens_per_step(self) -> int:
        """Targets scored in a step."""
        return self.config.data.block_size * self.config.data.batch_size * self.config.optimizer.accumulate

    def elapsed(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.seconds_before + time.monotonic() - self._begin

    def save(self) -> Path:
        """Writes the checkpoint, whole or not at all, and returns its directory."""
        self._record()
        path = save_checkpoint(self.checkpoint, self.model, self.tokenizer, self.state_dict())
        self._saved = self.step
        self._mark = time.monotonic()
        return path

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to go on exactly, besides the weights."""
        return {
            "step": self.step,
            "seconds": self.elapsed(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.batches.state_dict(),
            "random": random_state(),
            "config": to_dict(self.config),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues a saved run. The weights are the caller's to load, before.

        Raises:
            ValueError: a setting that decides the losses is not that of the saved run; the message names them all.
        """
        mine = to_dict(self.config)
        changed = [
            f"{section}.{key}: {state['config'][section].get(key)!r} there, {value!r} here"
            for section in ("model", "data", "optimizer")
            for key, value in mine[section].items()
            if state["config"][section].get(key) != value
        ]
        if changed:
            raise ValueError("cannot resume exactly with other settings: " + "; ".join(changed))
        self.step = state["step"]
        self.seconds_before = state["seconds"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["data"])
        restore_random_state(state["random"])

    def _position(self) -> float:
        """Steps done, or what the clock makes of them where a time limit is closer to its end than the steps are."""
        run = self.config.run
        clock = self.elapsed() / (60.0 * run.max_minutes) if run.max_minutes else 0.0
        return max(self.step, min(1.0, clock) * run.max_steps)

    def _learning_rate_factor(self) -> float:
        schedule, total = self.config.schedule, self.config.run.max_steps
        # The clock may hurry the decay, not the warm-up.
        position = self.step if self.step < schedule.warmup_steps else self._position()
        warmup = min(schedule.warmup_steps, total // 2)
        return learning_rate_factor(schedule.kind, position, total, warmup=warmup, final_ratio=schedule.final_ratio)

    def _finished(self) -> bool:
        run = self.config.run
        if not self.stopped and self.step >= run.max_steps:
            self.stopped = "steps"
        if not self.stopped and run.max_minutes and self.elapsed() >= 60.0 * run.max_minutes:
            self.stopped = "minutes"
        return bool(self.stopped)

    def _record(self) -> None:
        """Reads the pending losses from the device, checks and logs them."""
        if not self._pending:
            return
        losses = torch.stack([loss for _, loss, _, _ in self._pending]).tolist()  # waits for the device
        norms = torch.stack([norm for _, _, norm, _ in self._pending]).tolist()
        now = time.monotonic()
        speed = len(losses) * self.tokens_per_step / (now - self._mark)
        self._step_seconds += now - self._mark
        self._steps_timed += len(losses)
        records = [
            {"step": step, "loss": loss, "gradient_norm": norm, "learning_rate": rate, "tokens_per_second": speed}
            for (step, _, _, rate), loss, norm in zip(self._pending, losses, norms)
        ]
        self._pending.clear()
        for record in records:
            if not math.isfinite(record["loss"]):
                raise NonFiniteLossError(
                    f"the loss is {record['loss']} at step {record['step']} (learning rate "
                    f"{record['learning_rate']:.2e}, gradient norm {record['gradient_norm']:.3g}). The last checkpoint "
                    "is from before it. Usual remedies: a lower optimizer.learning_rate, a longer "
                    "schedule.warmup_steps, run.dtype float32"
                )
        self._train_loss = sum(losses) / len(losses)
        self.log.write(records)
        share = self._position() / self.config.run.max_steps
        left = self.elapsed() * (1.0 - share) / max(share, 1e-9)
        self.progress.update(self.step, share, self._train_loss, speed, left)
        self._mark = time.monotonic()

    def _validate(self) -> None:
        self._record()
        if self.validation is not None:
            data = self.config.data
            self._validation_loss = evaluate(
                self.model,
                self.validation,
                data.block_size,
                data.batch_size,
                self.config.run.eval_windows,
                loss=self.loss,
                dtype=self.dtype,
            )
            self.log.write([{"step": self.step, "validation_loss": self._validation_loss}])
            self.progress.validation(self._validation_loss)
        self._validated = self.step
        self._mark = time.monotonic()

    def _speed(self) -> float:
        return self._steps_timed * self.tokens_per_step / self._step_seconds if self._step_seconds else math.nan

    @contextmanager
    def _stop_on_interrupt(self) -> Iterator[None]:
        """Ctrl-C asks the loop to end after this step; pressed again, it interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(_signal, _frame) -> None:
            self.stopped = "interrupted"
            signal.signal(signal.SIGINT, before)

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
