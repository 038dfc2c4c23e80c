"""What all recipes share: a configuration from YAML, flags and ``--smoke``, training runs, and the report.

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

import torch
from torch import nn

from fastformer.data import EvaluationLoader, Loader, load_tokenizer
from fastformer.data.tasks import lengths_of
from fastformer.evaluation import Evaluation, write_report
from fastformer.extras import MissingPackageError, require
from fastformer.models import from_pretrained
from fastformer.training import Objective, OptimizerConfig, Result, RunConfig, ScheduleConfig, Trainer
from fastformer.training.checkpoint import has_checkpoint, load_state, restore_checkpoint, save_checkpoint
from fastformer.training.config import load_config, resolve_device
from fastformer.training.finetune import FinetuneConfig, finetune
from fastformer.training.logs import read_metrics
from fastformer.training.plots import plot_loss

Config = TypeVar("Config", bound="Recipe")


@dataclass(frozen=True)
class Phase:
    """Training on samples without labels."""

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


Settings = TypeVar("Settings", Phase, FinetuneConfig)


def told(settings: Settings, recipe: Recipe, folder: str) -> Settings:
    """The settings of a training run, with what the recipe was told; it writes to ``folder`` in ``recipe.out``."""
    out = Path(recipe.out, folder)
    resume = recipe.resume and has_checkpoint(out)  # the recipe may have been stopped in an earlier run of it
    options = {"out": str(out), "seed": recipe.seed, "device": recipe.device, "resume": resume}
    return replace(settings, run=replace(settings.run, **options))


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


def main(run: Callable[[Any], Any], cls: type[Recipe], file: str) -> None:
    """Runs the recipe whose ``__main__.py`` is ``file``; what is wrong with data or settings is one line."""
    try:
        recipe = configure(cls, Path(file).parent)
        check_out(recipe)
        run(recipe)
    except (ValueError, OSError, MissingPackageError) as error:
        if os.environ.get("FASTFORMER_TRACEBACK"):
            raise
        sys.exit(f"{Path(file).parent.name}: {error}")


def check_out(recipe: Recipe) -> None:
    """Raises FileExistsError where an earlier run is that is not to be continued."""
    out = Path(recipe.out)
    there = [run for run in out.iterdir() if has_checkpoint(run)] if out.is_dir() else []
    if there and not recipe.resume:
        raise FileExistsError(f"out: {there[0]} holds a checkpoint; continue it with --resume, or choose another --out")


def fresh(recipe: Recipe, tokenizer: Callable[[], Any], model: Callable[[Any], nn.Module]) -> Path:
    """A directory with a new tokenizer and a model for it, its weights drawn from the recipe's seed.

    A recipe that is continued takes those it began with.
    """
    folder = Path(recipe.out, "start")
    if not (recipe.resume and folder.is_dir()):
        made = tokenizer()
        torch.manual_seed(recipe.seed)
        save_checkpoint(folder, model(made), made)
    return folder


def pretrain(
    recipe: Recipe,
    phase: Phase,
    start: Path,
    samples: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    collator: Any,
    objective: Objective,
    title: str,
) -> tuple[Path, Result]:
    """Trains the model in ``start`` on unlabelled samples; returns where the result is."""
    phase = told(phase, recipe, "pretrain")
    out = Path(phase.run.out)
    checkpoint = restore_checkpoint(out) if phase.run.resume else None
    loader = Loader(
        samples,
        collator,
        phase.batch_size,
        seed=phase.run.seed,
        pool=50 * phase.batch_size,
        lengths=lengths_of(samples),
    )
    trainer = Trainer(
        from_pretrained(checkpoint or start),
        loader,
        phase,
        objective=objective,
        validation=EvaluationLoader(held_out, collator, phase.batch_size),
        tokenizer=load_tokenizer(start),
    )
    if checkpoint is not None:
        trainer.load_state_dict(load_state(checkpoint))
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{title}: {parameters / 1e6:.2f} M parameters, {len(samples):,} samples, {trainer.device}")
    result = trainer.fit()
    plot_loss(read_metrics(out), out / "loss.png", title=title)
    print(f"{result.steps} steps in {result.seconds:.0f} s; loss on held-out samples {result.validation_loss:.3f}")
    return out / "checkpoint", result


def tune(
    recipe: Recipe,
    settings: FinetuneConfig,
    start: Path,
    train: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    measure: Callable[[nn.Module], dict[str, float]] | None = None,
    folder: str = "finetune",
) -> tuple[Any, Result]:
    """Fine-tunes the model in ``start``; the model returned is the best one, where the settings keep that."""
    settings = replace(told(settings, recipe, folder), model=str(start))
    metrics = None if measure is None else lambda data, batch_size: measure
    result = finetune(settings, train=train, validation=validation, metrics=metrics)
    kept = "merged" if settings.lora.rank else "best" if settings.run.keep_best else "checkpoint"
    return from_pretrained(Path(settings.run.out, kept), device=resolve_device(recipe.device)), result


def conclude(
    evaluation: Evaluation,
    recipe: Recipe,
    *,
    title: str,
    baselines: Mapping[str, Evaluation | Mapping[str, float]],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes ``report.md`` and ``results.json`` into ``recipe.out`` and prints the scores."""
    out = Path(recipe.out)
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


def _command() -> str:
    module = sys.modules["__main__"].__spec__
    name = module.name.removesuffix(".__main__") if module is not None else Path(sys.argv[0]).name
    return shlex.join(["python", "-m", name, *sys.argv[1:]])
