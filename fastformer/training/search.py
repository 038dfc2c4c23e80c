"""Hyper-parameter search: many short fine-tunings, each with settings that ``optuna`` draws from those before it.

The tree-structured Parzen estimator (Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization") draws where
good trials are denser than bad ones; a trial that is worse than the others were at the same step is stopped, by their
median or by Hyperband (Li et al. 2016, arXiv:1603.06560). The study is a file beside the trials, which a search that
was ended goes on from.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..data.examples import Example
from ..extras import require
from ..models.pretrained import replaced
from .config import _check, to_dict
from .finetune import FinetuneConfig, Metrics, prepare
from .trainer import BadLossError, Trainer

STUDY_FILE = "study.journal"


@dataclass(frozen=True)
class SearchSettings:
    """What is drawn, how often, and when a trial is stopped. A range of two equal numbers is not searched."""

    trials: int = 20
    """Trials in all, those of an earlier run of the same study included."""
    max_minutes: float = 0.0
    """No new trial after this long; 0: no limit."""
    learning_rate: tuple[float, float] = (1e-5, 5e-4)
    """Least and largest optimizer.learning_rate, drawn on a logarithmic scale."""
    batch_size: tuple[int, ...] = (8, 16, 32)
    """Values of data.batch_size."""
    dropout: tuple[float, float] = (0.0, 0.2)
    """Least and largest dropout of the model."""
    pruning: Literal["median", "hyperband", "none"] = "median"
    """How trials that fall behind are stopped."""
    startup: int = 5
    """Trials drawn at random, and not stopped, before the others are compared with them."""
    storage: str = ""
    """Another place for the study: a URL such as sqlite:///study.db. Empty: a journal file in run.out."""

    def __post_init__(self) -> None:
        _check(
            "search",
            self,
            ("trials", "at least 1", self.trials >= 1),
            ("max_minutes", "at least 0", self.max_minutes >= 0),
            ("learning_rate", "0 < least <= largest", _range(self.learning_rate) and self.learning_rate[0] > 0),
            ("batch_size", "one or more of at least 1", bool(self.batch_size) and min(self.batch_size) >= 1),
            (
                "dropout",
                "0 <= least <= largest < 1",
                _range(self.dropout) and 0 <= min(self.dropout) <= max(self.dropout) < 1,
            ),
            ("pruning", "median, hyperband or none", self.pruning in ("median", "hyperband", "none")),
            ("startup", "at least 1", self.startup >= 1),
        )


@dataclass(frozen=True)
class SearchConfig(FinetuneConfig):
    """Find learning rate, batch size and dropout for a fine-tuning."""

    search: SearchSettings = field(default_factory=SearchSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parallel.strategy != "none":
            raise ValueError(f"parallel.strategy: got {self.parallel.strategy!r}, expected none (one process a trial)")


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        settings: of the best trial, by full name.
        value: its ``run.best_metric``.
        config: with these settings, as ``fastformer finetune --config`` takes it; in ``best.yaml``.
        trials: finished and stopped ones, in order: number, state, value, settings.
        checkpoint: the best trial's directory.
    """

    settings: dict[str, Any]
    value: float
    config: FinetuneConfig
    trials: list[dict[str, Any]]
    checkpoint: Path


def search(
    config: SearchConfig,
    *,
    train: Iterable[Example] | None = None,
    validation: Iterable[Example] | None = None,
    metrics: Metrics | None = None,
    quiet: bool = False,
) -> Found:
    """Runs trials until there are ``config.search.trials``, and keeps the best one's model.

    In ``run.out`` are then the study, ``best.yaml``, ``trials.json``, ``search.png`` and ``trial-<n>/`` of the best.
    Examples and metrics as in :func:`.finetune.finetune`. One process at a time.

    Raises:
        ValueError: as there; or a study of another metric; or no trial came to its end.
    """
    optuna = require("optuna", "hyper-parameter search", "finetune")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    given = {
        name: None if rows is None else list(rows) for name, rows in (("train", train), ("validation", validation))
    }
    out = Path(config.run.out)
    out.mkdir(parents=True, exist_ok=True)
    study = _study(optuna, config, out)
    for left_over in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(left_over.number, state=optuna.trial.TrialState.FAIL)  # its process was ended
    begin = time.monotonic()

    def objective(trial: Any) -> float:
        drawn = draw(trial, config)
        directory = out / f"trial-{trial.number}"
        shutil.rmtree(directory, ignore_errors=True)
        trainer = prepare(
            with_settings(config, drawn, directory),
            **given,
            metrics=metrics,
            quiet=True,
            trainer_class=_reporting(optuna, trial),
        )
        try:
            return trainer.fit().best
        except BadLossError as error:  # this learning rate is too high
            raise optuna.TrialPruned(str(error)) from error

    while _ended(optuna, study) < config.search.trials:
        if config.search.max_minutes and time.monotonic() - begin > 60 * config.search.max_minutes:
            break
        study.optimize(objective, n_trials=1)
        _keep_best(study, out)
        if not quiet:
            last = study.trials[-1]
            value = "stopped" if last.state.name == "PRUNED" else f"{config.run.best_metric} {last.value:.4g}"
            print(f"trial {last.number}: {value}; {_listed(last.params)}", flush=True)
    found = _found(optuna, study, config, out)
    _write(found, out)
    from .plots import plot_search

    plot_search(found.trials, config.run.best_metric, config.run.best_is, out / "search.png")
    if not quiet:
        print(f"best: {config.run.best_metric} {found.value:.4g} with {_listed(found.settings)}\n{out / 'best.yaml'}")
    return found


def draw(trial: Any, config: SearchConfig) -> dict[str, Any]:
    """Settings for a trial of optuna's, by full name."""
    ranges = config.search
    drawn: dict[str, Any] = {}
    least, largest = ranges.learning_rate
    drawn["optimizer.learning_rate"] = trial.suggest_float("optimizer.learning_rate", least, largest, log=True)
    drawn["data.batch_size"] = trial.suggest_categorical("data.batch_size", list(ranges.batch_size))
    drawn["dropout"] = trial.suggest_float("dropout", *ranges.dropout)
    return drawn


def with_settings(config: SearchConfig, settings: dict[str, Any], out: Path) -> FinetuneConfig:
    """The fine-tuning of one trial."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(FinetuneConfig)}
    changed = FinetuneConfig(**values)
    for name, value in settings.items():
        section, _, key = name.rpartition(".")
        if section:
            change = {section: dataclasses.replace(getattr(changed, section), **{key: value})}
        else:
            change = {key: value}
        changed = dataclasses.replace(changed, **change)
    run = dataclasses.replace(config.run, out=str(out), resume=False, keep_best=True, tensorboard=False)
    return dataclasses.replace(changed, run=run)


def _range(values: tuple[float, ...]) -> bool:
    return len(values) == 2 and values[0] <= values[1]


def _study(optuna: Any, config: SearchConfig, out: Path) -> Any:
    settings, run = config.search, config.run
    storage: Any = settings.storage
    if not storage:
        journal = optuna.storages.journal
        storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(out / STUDY_FILE)))
    pruners = optuna.pruners
    pruner = {
        "median": lambda: pruners.MedianPruner(n_startup_trials=settings.startup),
        "hyperband": lambda: pruners.HyperbandPruner(),
        "none": lambda: pruners.NopPruner(),
    }[settings.pruning]()
    direction = "maximize" if run.best_is == "highest" else "minimize"
    study = optuna.create_study(
        storage=storage, study_name="fastformer", direction=direction, load_if_exists=True, pruner=pruner
    )
    metric = study.user_attrs.get("metric", run.best_metric)
    if metric != run.best_metric or study.direction.name.lower() != direction:
        raise ValueError(
            f"run.best_metric: the study in {settings.storage or out} is of {metric}, {study.direction.name.lower()}d; "
            "choose another run.out"
        )
    study.set_user_attr("metric", run.best_metric)
    # Seeded by what has been drawn already, or a study that goes on would draw the same again.
    study.sampler = optuna.samplers.TPESampler(seed=run.seed + len(study.trials), n_startup_trials=settings.startup)
    return study


def _reporting(optuna: Any, trial: Any) -> type[Trainer]:
    """A trainer that tells the study each measurement, and stops where that says so."""

    class Reporting(Trainer):
        def _measure(self) -> dict[str, float]:
            measured = super()._measure()
            value = measured.get(self.config.run.best_metric, math.nan)
            if not math.isnan(value):
                trial.report(value, self.step)
                if trial.should_prune():
                    raise optuna.TrialPruned()
            return measured

    return Reporting


def _ended(optuna: Any, study: Any) -> int:
    states = optuna.trial.TrialState
    return len(study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED)))


def _keep_best(study: Any, out: Path) -> None:
    """Leaves the directory of the best trial and no other's."""
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    best = study.best_trial.number if complete else -1
    for path in out.glob("trial-*"):
        if path.name != f"trial-{best}":
            shutil.rmtree(path, ignore_errors=True)


def _found(optuna: Any, study: Any, config: SearchConfig, out: Path) -> Found:
    ended = [t for t in study.trials if t.state.name in ("COMPLETE", "PRUNED")]
    if not any(t.state.name == "COMPLETE" for t in ended):
        raise ValueError(f"search: none of {len(study.trials)} trials came to its end; try lower learning rates")
    best = study.best_trial
    trials = [
        {"number": t.number, "state": t.state.name.lower(), "value": t.value, "settings": t.params} for t in ended
    ]
    directory = out / f"trial-{best.number}"
    chosen = with_settings(config, best.params, out / "best")
    return Found(dict(best.params), float(best.value), chosen, trials, directory)


def _write(found: Found, out: Path) -> None:
    yaml = require("yaml", "best.yaml", "train")
    content = json.loads(json.dumps(to_dict(found.config)))  # tuples as lists
    with replaced(out / "best.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    with replaced(out / "trials.json") as temporary:
        temporary.write_text(json.dumps(found.trials, indent=2) + "\n", encoding="utf-8")


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())
