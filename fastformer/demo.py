"""``fastformer demo``: read Shakespeare, train a GPT on it in minutes, write with it, race it against ``torch.nn``.

The schedule's length comes from a speed measurement of a few seconds, so that the learning rate reaches its end when
the time does. The race trains the same network from the same weights on the same batches in both libraries, the two
taking turns step by step in one process, and compares losses and medians of the step times; then both write the same
text from the trained weights, each with a KV cache.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from .data import EvaluationWindows, Windows
from .demo_race import Race, race_generation, race_training
from .models.gpt2 import GPT2LMHeadModel
from .training.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    resolve_device,
    resolve_dtype,
)
from .training.evaluate import evaluate
from .training.logs import read_metrics
from .training.plots import plot_loss, plot_speed
from .training.pretrain import PreparedData, build_model, count, cpu_threads, describe, prepare_data
from .training.trainer import Result, Trainer
from .writing import write

# nanoGPT's README, "I only have a macbook": 4 layers, 4 heads, 128 wide, context 64, batch 12, 2000 steps.
YARDSTICK = 1.88
YARDSTICK_TEXT = "nanoGPT's published CPU setting: 0.8 M parameters, about 3 minutes, tiny Shakespeare"


@dataclass(frozen=True)
class DemoConfig:
    """Train a small GPT on Shakespeare, write with it, and compare it with the same model on torch.nn."""

    minutes: float = 3.0
    """Longest time to train, in minutes; the rest of the demo takes about one more."""
    tokenizer: Literal["char", "bpe"] = "char"
    """Characters, from which words come out after minutes, or byte pairs learned from the text."""
    out: str = "runs/demo"
    """Directory for the checkpoint, logs, plots and report; an earlier demo there is replaced."""
    seed: int = 0
    """Seeds weights, batches and the text written."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1 …"""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes: got {self.minutes}, expected more than 0")


@dataclass(frozen=True)
class Size:
    """A network and how to train it."""

    model: ModelConfig
    block_size: int
    batch_size: int
    learning_rate: float


# The CPU's: small steps, many of them. Short runs of this network, loss on held-out plays: context 128, batch 8, rate
# 3e-3, 1.0 M tokens 2.01; the same with rate 6e-3, 0.6 M tokens 2.34; nanoGPT's own setting (context 64, batch 12, rate
# 1e-3), 0.6 M tokens 2.17. Token counts differ, so these rule the highest rate out and rank no more than that. The
# whole three minutes, 2.5 M tokens on two cores: 1.72. The GPU's sizes are nanoGPT's, not yet run.
SIZES = {
    "cpu": Size(ModelConfig(n_layer=4, n_head=4, n_embd=128), block_size=128, batch_size=8, learning_rate=3e-3),
    # A GPU reads the text dozens of times over in that time, so its network is larger and drops out.
    "cuda": Size(
        ModelConfig(n_layer=6, n_head=6, n_embd=384, dropout=0.2), block_size=256, batch_size=64, learning_rate=1e-3
    ),
}


def run(config: DemoConfig) -> Race:
    """The whole demo; prints as it goes and leaves its files in ``config.out``."""
    begin = time.monotonic()
    out = Path(config.out)
    device = resolve_device(config.device)
    _heading("1/4", "Reading")
    train_config = configure(config, device)
    data = prepare_data(train_config.data)
    speed = measure_speed(train_config, data, seconds=min(4.0, 6.0 * config.minutes))
    steps = max(2, int(60.0 * config.minutes * speed))
    every = max(1, steps // 12)
    schedule = replace(train_config.schedule, warmup_steps=min(100, steps // 10))
    run_config = replace(train_config.run, max_steps=steps, eval_every=every, log_every=max(1, min(20, every // 4)))
    train_config = replace(train_config, schedule=schedule, run=run_config)
    trainer = Trainer.on_tokens(
        build_model(train_config, data.tokenizer), data.train, data.validation, train_config, tokenizer=data.tokenizer
    )
    print(describe(data, trainer))
    print(f"speed  {speed:.1f} steps/s measured: a schedule of {steps} steps, hurried where the clock is ahead of it")

    _heading("2/4", f"Training for {_duration(60 * config.minutes)} (Ctrl-C ends it early and goes on)")
    result = trainer.fit()
    model = trainer.model
    windows = int(min(1024, 64 + 320 * config.minutes))
    held_out = evaluate(
        model, EvaluationWindows(data.validation, train_config.data.block_size, 32, windows), dtype=trainer.dtype
    )
    result = replace(result, validation_loss=held_out)
    print(_training_summary(result, data))
    # The last point is the loss just printed, from more windows than the ones before it.
    records = [r for r in read_metrics(out) if "loss" in r or r["step"] < result.steps]
    plot_loss(
        [*records, {"step": result.steps, "validation_loss": held_out}],
        out / "loss.png",
        title=f"GPT on {data.corpus.name}, {_duration(result.seconds)}, {device}",
        reference=("nanoGPT, CPU setting", YARDSTICK) if _comparable(data) else None,
    )

    _heading("3/4", "Writing")
    prompt = first_words(data)
    print(prompt, end="", flush=True)
    length = 600 if config.tokenizer == "char" else 200
    written = write(
        model,
        data.tokenizer,
        prompt,
        max_new_tokens=length,
        temperature=0.8,
        top_k=40,
        seed=config.seed,
        emit=lambda piece: print(piece, end="", flush=True),
    )
    print()

    _heading("4/4", "The same model on torch.nn: same weights, same batches, taking turns")
    race = compare(train_config, data, model, seconds=min(30.0, 10.0 * config.minutes))
    print(race.table())
    plot_speed(
        [
            ("training", race.training_speed[0], race.training_speed[1]),
            ("generation", race.generation_speed[0], race.generation_speed[1]),
        ],
        out / "speed.png",
        title=f"Tokens per second, {_machine(device)}",
        names=("fastformer", "torch.nn"),
    )
    (out / "results.json").write_text(
        json.dumps({"training": asdict(result), "race": asdict(race)}, indent=2) + "\n", encoding="utf-8"
    )
    (out / "report.md").write_text(
        report(config, train_config, data, trainer, result, race, prompt + written.text), encoding="utf-8"
    )
    print(
        f"\n{_duration(time.monotonic() - begin)} in all. In {out}/: report.md, loss.png, speed.png, checkpoint/, "
        f"tensorboard/\nMore text:  fastformer generate --model {out} --prompt {json.dumps(prompt.strip())}"
    )
    return race


def configure(config: DemoConfig, device: torch.device) -> TrainConfig:
    """The run for this machine, its number of steps not yet known."""
    size = SIZES[device.type if device.type in SIZES else "cpu"]
    return TrainConfig(
        model=size.model,
        data=DataConfig(tokenizer=config.tokenizer, block_size=size.block_size, batch_size=size.batch_size),
        optimizer=OptimizerConfig(learning_rate=size.learning_rate),
        schedule=ScheduleConfig(final_ratio=0.0),
        run=RunConfig(
            out=config.out,
            seed=config.seed,
            device=config.device,
            max_minutes=config.minutes,
            eval_windows=64,
            keep=1,
            save_every=0,
        ),
    )


def measure_speed(config: TrainConfig, data: PreparedData, seconds: float) -> float:
    """Training steps per second over about ``seconds``, on a model that is thrown away.

    The upper quartile: a schedule too long for the time is hurried along by the trainer's clock, one too short would
    leave time unused.
    """
    trainer = Trainer.on_tokens(build_model(config, data.tokenizer), data.train, None, config, quiet=True)
    trainer.model.train()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        trainer.train_step().loss.item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 1.0 / statistics.quantiles(times[2:], n=4)[0]


def first_words(data: PreparedData) -> str:
    """What to begin writing from: a speaker's name, or in other text the first line held out."""
    if data.corpus.name == "Shakespeare":
        return "ROMEO:\n"
    text = data.tokenizer.decode(data.validation[:200].tolist()).lstrip()
    return (text.splitlines() or [""])[0][:40] + "\n"


def compare(config: TrainConfig, data: PreparedData, trained: GPT2LMHeadModel, seconds: float) -> Race:
    """Both libraries side by side: training from the initial weights, then generation from the trained ones.

    On a GPU the losses are compared in float32 and the speeds in the precision of the run.
    """
    device = resolve_device(config.run.device)
    dtype = resolve_dtype(config.run.dtype, device)

    def batches() -> Windows:
        return Windows(data.train, config.data.block_size, config.data.batch_size, seed=config.run.seed + 1)

    def start() -> GPT2LMHeadModel:
        # Without dropout: two libraries cannot drop the same elements.
        return build_model(replace(config, model=replace(config.model, dropout=0.0)), data.tokenizer).to(device)

    race = race_training(start(), batches(), config, seconds=seconds)
    if dtype != torch.float32:
        race = replace(race, training=race_training(start(), batches(), config, seconds=seconds, dtype=dtype).training)
    prompt = data.validation[:16].long()[None].to(device)
    return race_generation(race, trained, prompt, seconds=seconds / 2)


def report(
    config: DemoConfig,
    train_config: TrainConfig,
    data: PreparedData,
    trainer: Trainer,
    result: Result,
    race: Race,
    text: str,
) -> str:
    """report.md."""
    indented = "\n".join("    " + line for line in text.splitlines())
    command = f"fastformer demo --minutes {config.minutes:g} --tokenizer {config.tokenizer} --seed {config.seed}"
    return f"""# fastformer demo

    {command}

Machine: {_machine(trainer.device)}; PyTorch {torch.__version__}.

```
{describe(data, trainer)}
```

## Training

```
{_training_summary(result, data)}
```

![loss](loss.png)

## What it writes

{indented}

## The same model on torch.nn

Same weights, same batches, in one process, taking turns; medians. Training from the initial weights, generation from
the trained ones (greedy, one sequence, a KV cache in both).

```
{race.table()}
```

![speed](speed.png)

## Again, with other text

    fastformer generate --model {config.out} --prompt "ROMEO:" --temperature 0.8 --top-k 40
    tensorboard --logdir {config.out}
"""


def _training_summary(result: Result, data: PreparedData) -> str:
    ended = {"steps": "", "minutes": " (time was up)", "interrupted": " (stopped by Ctrl-C)"}[result.stopped]
    lines = [
        f"{result.steps} steps, {count(result.tokens)} tokens in {_duration(result.seconds)}{ended}, "
        f"{result.tokens_per_second:,.0f} tokens/s",
        f"validation loss {result.validation_loss:.3f}   on text it has never seen",
    ]
    if _comparable(data):
        lines.append(f"yardstick       {YARDSTICK:.2f}    {YARDSTICK_TEXT}")
    return "\n".join(lines)


def _comparable(data: PreparedData) -> bool:
    """Whether the loss is per character of Shakespeare, as the yardstick's is."""
    return data.corpus.name == "Shakespeare" and data.tokenizer.eos_token_id is None


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {cpu_threads()}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{int(seconds) // 60} min {int(seconds) % 60} s"


def _heading(number: str, text: str) -> None:
    print(f"\n── {number}  {text} " + "─" * max(4, 92 - len(text)), flush=True)
