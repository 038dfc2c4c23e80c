"""What all recipes share: a configuration from YAML, flags and ``--smoke``, one training run, and its report.

``python -m examples.NAME`` reads ``config.yaml`` beside the recipe; ``--smoke`` then ``smoke.yaml``, the size at which
the recipe is tested in seconds; and ``--section.key value`` changes any of it.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from fastformer.data import EvaluationLoader, Loader, load_tokenizer
from fastformer.evaluation import Evaluation, write_report
from fastformer.extras import MissingPackageError, require
from fastformer.models import from_pretrained
from fastformer.training import Objective, OptimizerConfig, Result, RunConfig, ScheduleConfig, Trainer
from fastformer.training.checkpoint import has_checkpoint, load_state, restore_checkpoint
from fastformer.training.config import load_config
from fastformer.training.logs import read_metrics
from fastformer.training.plots import plot_loss

Config = TypeVar("Config", bound="Recipe")


@dataclass(frozen=True)
class Phase:
    """One training run of a recipe."""

    batch_size: int = 32
    """Examples in a batch (times optimizer.accumulate in a step), of about the same length."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class Recipe:
    """What every recipe can be told."""

    out: str = ""
    """Directory for checkpoints, logs, plots, report.md and results.json."""
    seed: int = 0
    """Seeds weights, batches and dropout."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1 …"""
    resume: bool = False
    """Continue from the checkpoints in out."""
    examples: int = 0
    """Use so many training examples; 0: all."""
    held_out: int = 0
    """Use so many examples for validation, and as many for the test; 0: all."""

    def phase(self, name: str, folder: str = "") -> Phase:
        """The phase ``name``, told what the recipe was told; it writes to ``folder`` (or its name) in ``out``."""
        phase = getattr(self, name)
        told = {
            "out": str(Path(self.out, folder or name)),
            "seed": self.seed,
            "device": self.device,
            "resume": self.resume,
        }
        return replace(phase, run=replace(phase.run, **told))


def configure(cls: type[Config], folder: Path, arguments: Sequence[str] | None = None) -> Config:
    """The recipe's configuration: ``config.yaml``, with ``--smoke`` also ``smoke.yaml``, then flags.

    Raises:
        ValueError: a key that does not exist in a file; the message names the nearest.
        SystemExit: a flag that does not exist, or ``--help``.
    """
    tyro = require("tyro", "the recipes")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config = load_config(folder / "config.yaml", cls)
    if "--smoke" in arguments:
        arguments.remove("--smoke")
        config = load_config(folder / "smoke.yaml", cls, config)
    about = f"{cls.__doc__}\n\n--smoke: the size of the tests, in seconds."
    return tyro.cli(cls, args=arguments, default=config, prog=f"python -m examples.{folder.name}", description=about)


def start(run: Callable[[Any], Any], cls: type[Recipe], file: str) -> None:
    """Runs the recipe whose ``__main__.py`` is ``file``; what is wrong with data or settings is one line."""
    try:
        run(configure(cls, Path(file).parent))
    except (ValueError, OSError, MissingPackageError) as error:
        if os.environ.get("FASTFORMER_TRACEBACK"):
            raise
        sys.exit(f"{Path(file).parent.name}: {error}")


def train(
    model: nn.Module,
    samples: Sequence[Mapping[str, Any]],
    collator: Any,
    phase: Phase,
    *,
    objective: Objective,
    held_out: Sequence[Mapping[str, Any]],
    metrics: Callable[[nn.Module], dict[str, float]] | None = None,
    tokenizer: Any = None,
    title: str = "",
) -> tuple[nn.Module, Result]:
    """Trains on ``samples``, which are sorted into batches by length; the model returned is the best, or the average,
    where ``phase.run`` and ``phase.optimizer`` say so."""
    out = Path(phase.run.out)
    resuming = phase.run.resume and has_checkpoint(out)
    checkpoint = restore_checkpoint(out) if resuming else None
    if checkpoint is not None:
        model = from_pretrained(checkpoint)
    loader = Loader(
        samples,
        collator,
        phase.batch_size,
        seed=phase.run.seed,
        pool=50 * phase.batch_size,
        lengths=np.array([len(sample["input_ids"]) for sample in samples]),
    )
    validation = EvaluationLoader(held_out, collator, phase.batch_size)
    trainer = Trainer(
        model, loader, phase, objective=objective, validation=validation, metrics=metrics, tokenizer=tokenizer
    )
    if checkpoint is not None:
        trainer.load_state_dict(load_state(checkpoint))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{title}: {parameters / 1e6:.2f} M parameters, {len(samples):,} examples, {trainer.device}")
    result = trainer.fit()
    plot_loss(read_metrics(out), out / "loss.png", title=title)
    print(f"{result.steps} steps in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s")
    kept = "best" if phase.run.keep_best else "ema" if phase.optimizer.ema_decay else ""
    return (from_pretrained(out / kept, device=trainer.device) if kept else trainer.model.eval()), result


def conclude(
    evaluation: Evaluation,
    recipe: Recipe,
    *,
    title: str,
    baselines: Mapping[str, Evaluation | Mapping[str, float]],
    more: Mapping[str, Any],
    name: str = "",
) -> dict[str, Any]:
    """Writes ``report.md`` and ``results.json`` into ``recipe.out`` (or its directory ``name``), prints the scores."""
    out = Path(recipe.out, name)
    report = write_report(evaluation, out, title=title, baselines=baselines, command=_command())
    scores = {"this": evaluation.scores()}
    for baseline, found in baselines.items():
        scores[baseline] = found.scores() if isinstance(found, Evaluation) else dict(found)
    results = {**more, "examples": len(evaluation), "scores": scores}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    shown = [metric.headline for metric in evaluation.metrics]
    shown += [score for found in baselines.values() if isinstance(found, Mapping) for score in found]
    for who, values in scores.items():
        named = "  ".join(f"{score} {values[score]:.4g}" for score in dict.fromkeys(shown) if score in values)
        print(f"{who:34s}{named}")
    print(f"{len(evaluation):,} test examples; {report}")
    return results


def tokenizer_of(recipe: Recipe, make: Callable[[], Any]) -> Any:
    """A new tokenizer, kept in ``recipe.out``; a run that is continued takes that one."""
    folder = Path(recipe.out, "tokenizer")
    if recipe.resume and folder.is_dir():
        return load_tokenizer(folder)
    tokenizer = make()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    return tokenizer


def seeded(recipe: Recipe, make: Callable[[], nn.Module]) -> nn.Module:
    """A model whose weights are drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return make()


def _command() -> str:
    module = sys.modules["__main__"].__spec__
    name = module.name.removesuffix(".__main__") if module is not None else Path(sys.argv[0]).name
    return shlex.join(["python", "-m", name, *sys.argv[1:]])
