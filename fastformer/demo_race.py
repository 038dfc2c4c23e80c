"""Two implementations of one network in turns: losses step for step, and median speeds, in one process.

Taking turns, and swapping who goes first, gives both the same machine: a neighbour that slows one step down slows the
next one, too, and the medians leave outliers out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .backends.registry import select
from .data import Batch, Windows, to_device
from .demo_torch import TorchGPT2
from .models.gpt2 import GPT2LMHeadModel
from .training.config import TrainConfig
from .training.objectives import model_loss
from .training.optimizer import make_optimizer
from .training.schedule import learning_rate_factor
from .training.trainer import long_lived_objects_frozen

# What the network is made of, besides its matrix products, and the optional part of each that it uses.
OPS: dict[str, tuple[str, ...]] = {
    "layer_norm": (),
    "add_layer_norm": (),
    "attention": ("causal",),
    "activation": ("bias",),
    "cross_entropy": (),
}
SHOWN_STEPS = (1, 2, 3, 5, 10, 20, 40, 60, 80, 100)
MOST_STEPS = 100


@dataclass(frozen=True)
class Race:
    """Results, each pair fastformer's first.

    Attributes:
        losses: of every step.
        training: median seconds of a training step, tokens in it.
        generation: median seconds to write a text, tokens in it.
        same_text: both wrote the same tokens.
        kernels: operation -> backend that ran it.
    """

    losses: tuple[tuple[float, float], ...] = ()
    training: tuple[float, float, int] = (0.0, 0.0, 0)
    generation: tuple[float, float, int] = (0.0, 0.0, 0)
    same_text: bool = False
    kernels: dict[str, str] = field(default_factory=dict)

    @property
    def training_speed(self) -> tuple[float, float]:
        """Tokens per second."""
        return self.training[2] / self.training[0], self.training[2] / self.training[1]

    @property
    def generation_speed(self) -> tuple[float, float]:
        """Tokens per second."""
        return self.generation[2] / self.generation[0], self.generation[2] / self.generation[1]

    @property
    def largest_difference(self) -> float:
        """Between the losses of a step."""
        return max(abs(ours - theirs) for ours, theirs in self.losses)

    def table(self) -> str:
        """Both tables, to print."""
        lines = [f"{'loss at step':>22s} {'fastformer':>12s} {'torch.nn':>12s} {'difference':>12s}"]
        shown = [step for step in SHOWN_STEPS if step <= len(self.losses)]
        if shown[-1] != len(self.losses):
            shown.append(len(self.losses))
        for step in shown:
            ours, theirs = self.losses[step - 1]
            lines.append(f"{step:22d} {ours:12.5f} {theirs:12.5f} {abs(ours - theirs):12.1e}")
        lines.append(
            f"{'largest of all steps':>22s} {'':12s} {'':12s} {self.largest_difference:12.1e}   "
            + ("(they agree to 1e-3)" if self.largest_difference <= 1e-3 else "(MORE than 1e-3)")
        )
        lines += ["", f"{'tokens per second':>22s} {'fastformer':>12s} {'torch.nn':>12s} {'ratio':>12s}"]
        for name, (ours, theirs) in (("training", self.training_speed), ("generation", self.generation_speed)):
            lines.append(f"{name:>22s} {ours:12,.0f} {theirs:12,.0f} {ours / theirs:11.2f}×")
        lines.append(f"{'same text':>22s} {'yes' if self.same_text else 'NO':>12s}")
        lines += ["", "kernels: " + ", ".join(f"{op} {backend}" for op, backend in self.kernels.items())]
        return "\n".join(lines)


def race_training(
    model: GPT2LMHeadModel, batches: Windows, config: TrainConfig, *, seconds: float, dtype: torch.dtype = torch.float32
) -> Race:
    """Trains ``model`` and a torch.nn copy of it on the same batches for ``seconds`` or 100 steps."""
    device = model.device
    twin = TorchGPT2.like(model)

    def torch_loss(network: nn.Module, batch: Batch) -> Tensor:
        return network.loss(batch["input_ids"], batch["shift_labels"])

    runners = [
        _stepper(model.train(), model_loss, config, dtype),
        _stepper(twin.train(), torch_loss, config, dtype),
    ]
    losses: list[tuple[float, float]] = []
    times: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    with long_lived_objects_frozen():
        while len(losses) < 3 or (len(losses) < MOST_STEPS and time.perf_counter() - begin < seconds):
            batch = to_device(batches.next_batch(), device)
            loss = [0.0, 0.0]
            for index in (0, 1) if len(losses) % 2 == 0 else (1, 0):
                _wait(device)
                start = time.perf_counter()
                loss[index] = runners[index](batch, len(losses))
                times[index].append(time.perf_counter() - start)
            losses.append((loss[0], loss[1]))
    skip = min(5, len(losses) // 3)  # the first steps allocate
    ours, theirs = (statistics.median(t[skip:]) for t in times)
    kernels = {op: select(op, device.type, dtype, features).__name__.split(".")[-2] for op, features in OPS.items()}
    return Race(losses=tuple(losses), training=(ours, theirs, batches.block_size * batches.batch_size), kernels=kernels)


def race_generation(race: Race, model: GPT2LMHeadModel, prompt: Tensor, *, seconds: float) -> Race:
    """Adds to ``race``: both continue ``prompt`` (1, S) greedily until the context is full, in turns."""
    twin = TorchGPT2.like(model).eval()
    model.eval()
    new_tokens = model.config.n_positions - prompt.shape[1]
    writers: list[Callable[[], Tensor]] = [
        lambda: model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=[]),
        lambda: twin.generate(prompt, new_tokens),
    ]
    texts = [write() for write in writers]  # also the warm-up
    times: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    while len(times[0]) < 3 or (len(times[0]) < 40 and time.perf_counter() - begin < seconds):
        for index in (0, 1) if len(times[0]) % 2 == 0 else (1, 0):
            _wait(model.device)
            start = time.perf_counter()
            writers[index]()
            _wait(model.device)
            times[index].append(time.perf_counter() - start)
    ours, theirs = (statistics.median(t) for t in times)
    return replace(race, generation=(ours, theirs, new_tokens), same_text=bool(torch.equal(*texts)))


def _stepper(
    model: nn.Module, loss_of: Callable[[nn.Module, Batch], Tensor], config: TrainConfig, dtype: torch.dtype
) -> Callable[[Batch, int], float]:
    """One training step, as the trainer's, that returns the loss."""
    optimizer = make_optimizer(model, config.optimizer)
    device = next(model.parameters()).device

    def step(batch: Batch, number: int) -> float:
        factor = learning_rate_factor("constant", number, config.run.max_steps, warmup=config.schedule.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.learning_rate * factor
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        return loss.item()  # waits for the device

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
