"""Hyper-parameter search: it finds the better settings, stops bad trials, and goes on where it was ended."""

import dataclasses
import json

import pytest

from fastformer import cli
from fastformer.task_metrics import task_metrics
from fastformer.training.config import ParallelConfig, load_config
from fastformer.training.finetune import FinetuneConfig
from fastformer.training.search import STUDY_FILE, SearchConfig, SearchSettings, search
from tests.training.tuning import config_for, reviews, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base("bert", tmp_path_factory.mktemp("base"))


def config(base, out, run=None, **settings):
    run = {"eval_every": 5, **(run or {})}
    values = config_for("classification", base, out, steps=20, run=run)
    fields = {field.name: getattr(values, field.name) for field in dataclasses.fields(FinetuneConfig)}
    ranges = {"learning_rate": (1e-7, 2e-2), "batch_size": (8, 16), "dropout": (0.0, 0.1), "startup": 2}
    return SearchConfig(**fields, search=SearchSettings(**{**ranges, **settings}))


def test_a_trial_is_one_process(base, tmp_path):
    with pytest.raises(ValueError, match=r"parallel\.strategy: got 'ddp'"):
        dataclasses.replace(config(base, tmp_path), parallel=ParallelConfig("ddp"))


def test_a_search_that_was_ended_goes_on(base, tmp_path):
    first = search(config(base, tmp_path, trials=2), train=reviews(), quiet=True)
    assert len(first.trials) == 2 and (tmp_path / STUDY_FILE).is_file()
    found = search(config(base, tmp_path, trials=6), train=reviews(), quiet=True)
    assert found.trials[:2] == first.trials and len(found.trials) == 6
    values = {t["number"]: t["value"] for t in found.trials if t["state"] == "complete"}
    assert found.value == min(values.values()) <= first.value and found.value < 0.5
    assert any(t["state"] == "pruned" for t in found.trials), "a rate of 1e-7 learns nothing in twenty steps"
    assert len({json.dumps(t["settings"]) for t in found.trials}) == 6
    for t in found.trials:
        assert 1e-7 <= t["settings"]["optimizer.learning_rate"] <= 2e-2 and t["settings"]["data.batch_size"] in (8, 16)
    # The best model, its settings as a configuration, and a plot are there; the other trials' models are not.
    best = load_config(tmp_path / "best.yaml", FinetuneConfig)
    assert best == found.config and best.optimizer.learning_rate == found.settings["optimizer.learning_rate"]
    assert [path.name for path in tmp_path.glob("trial-*")] == [found.checkpoint.name]
    assert (found.checkpoint / "best" / "model.safetensors").is_file()
    assert (tmp_path / "search.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"run\.best_metric: the study in .* is of validation_loss, minimized"):
        run = {"best_metric": "accuracy", "best_is": "highest"}
        search(config(base, tmp_path, run, trials=9), train=reviews(), metrics=task_metrics, quiet=True)


def test_the_verb(base, tmp_path, capsys):
    data = tmp_path / "reviews.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in reviews(32)))
    command = ["search", "--model", str(base), "--data.path", str(data), "--run.out", str(tmp_path / "out")]
    command += ["--search.trials", "2", "--epochs", "1", "--search.pruning", "hyperband"]
    command += ["--search.storage", f"sqlite:///{tmp_path / 'study.db'}"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "trial 1: validation_loss" in shown and "best: validation_loss" in shown
    assert (tmp_path / "study.db").is_file() and not (tmp_path / "out" / STUDY_FILE).exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": (1e-3, 1e-4)}, r"search\.learning_rate: got \(0\.001, 0\.0001\)"),
        ({"dropout": (0.0, 1.0)}, r"search\.dropout"),
        ({"batch_size": ()}, r"search\.batch_size"),
        ({"trials": 0}, r"search\.trials: got 0"),
    ],
)
def test_ranges_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        SearchSettings(**settings)
