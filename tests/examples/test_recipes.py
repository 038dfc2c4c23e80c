"""Every recipe from data to report, at its smoke size, on a few lines in the formats of the real packages."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

for package in ("jiwer", "matplotlib", "peft", "rouge_score", "sacrebleu", "sklearn", "tokenizers", "tyro", "yaml"):
    pytest.importorskip(package, reason="the recipes need fastformer[train,eval,finetune]")

from examples.common import Recipe, check_out, configure, told
from fastformer.cli import main
from fastformer.training import TrainConfig, load_config
from fastformer.training.logs import read_metrics
from tests.examples.small_data import fill_cache

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = sorted(path.parent.name for path in EXAMPLES.glob("*/__main__.py"))
TUNED = [name for name in RECIPES if name != "generative"]  # that has a test of its own


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache with the data of all recipes."""
    place = tmp_path_factory.mktemp("data") / "cache"
    before = os.environ.get("FASTFORMER_DATA")
    os.environ["FASTFORMER_DATA"] = str(place)
    fill_cache()
    if before is None:
        del os.environ["FASTFORMER_DATA"]
    else:
        os.environ["FASTFORMER_DATA"] = before
    return place


@pytest.fixture
def data(filled, monkeypatch):
    monkeypatch.setenv("FASTFORMER_DATA", str(filled))


def recipe_of(name):
    """The recipe's module and its configuration class."""
    module = import_module(f"examples.{name}.__main__")
    (cls,) = (c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Recipe) and c.__module__ == module.__name__)  # fmt: skip  # noqa: E501
    return module, cls


def smoke(name, out, *flags):
    """Runs the recipe as ``--smoke`` does; returns its results."""
    module, cls = recipe_of(name)
    return module.run(configure(cls, EXAMPLES / name, ["--smoke", "--out", str(out), *flags]))


@pytest.mark.parametrize("name", TUNED)
def test_recipe_runs_and_reports(name, data, tmp_path, capsys):
    results = smoke(name, tmp_path / "out")
    assert json.loads((tmp_path / "out/results.json").read_text()) == json.loads(json.dumps(results))
    assert results["examples"] >= 8 and len(results["scores"]) >= 2  # ours, and a baseline at least
    report = (tmp_path / "out/report.md").read_text()
    assert all(baseline in report for baseline in results["scores"] if baseline != "this")
    assert (tmp_path / "out/finetune/loss.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert all(who in printed for who in results["scores"])


@pytest.mark.parametrize("name", TUNED)
def test_full_configuration_is_read_and_takes_flags(name, tmp_path):
    _, cls = recipe_of(name)
    config = configure(cls, EXAMPLES / name, ["--out", "elsewhere", "--seed", "7", "--finetune.data.batch-size", "17"])
    assert config.out == "elsewhere" and config.finetune.data.batch_size == 17
    run = told(config.finetune, config, "finetune").run
    assert (run.out, run.seed, run.resume) == (os.path.join("elsewhere", "finetune"), 7, False)
    reduced = configure(cls, EXAMPLES / name, ["--smoke"])
    assert 0 < reduced.examples < (config.examples or 1_000_000) and (
        reduced.finetune.epochs,
        reduced.finetune.run.max_steps,
    ) < (0, 10)


def test_generative_models_stand_beside_baselines(tmp_path, capsys):
    results = smoke("generative", tmp_path / "out")
    assert json.loads((tmp_path / "out/results.json").read_text()) == results
    report, printed = (tmp_path / "out/report.md").read_text(), capsys.readouterr().out
    for who, scores in results["scores"].items():
        assert who in report and who in printed and scores["frechet_distance"] > 0
    assert len(results["scores"]) == 6 and {"vae", "vae-convolutional", "gan"} < set(os.listdir(tmp_path / "out"))
    for sheet in ("vae/samples.png", "vae/interpolations.png", "gan/samples.png", "gaussian.png"):
        assert (tmp_path / "out" / sheet).stat().st_size > 1000
    _, cls = recipe_of("generative")
    config = configure(cls, EXAMPLES / "generative", ["--gan.optimizer.learning-rate", "1e-4"])
    assert config.gan.optimizer.learning_rate == 1e-4 and config.gan.optimizer.beta1 == 0.0
    assert config.vae.run.max_steps > 100


def test_every_recipe_says_what_it_shows_and_how_to_run_it():
    folders = {path.parent.name for path in EXAMPLES.glob("*/config.yaml")}
    assert set(RECIPES) < folders
    overview = (EXAMPLES / "README.md").read_text()
    for name in folders:
        text = (EXAMPLES / name / "README.md").read_text()
        assert f"examples.{name}" in text or f"examples/{name}" in text
        assert "GPU" in text and f"({name}/README.md)" in overview


COMMAND = re.compile(r"python -m examples\.(?P<name>\w+)(?P<flags>[^\n]*)|`(?P<alone>--[^`]+)`")


@pytest.mark.parametrize("name", RECIPES)
def test_commands_in_the_readmes_are_understood(name):
    _, cls = recipe_of(name)
    text = (EXAMPLES / name / "README.md").read_text()
    found = [shlex.split(match["alone"] or match["flags"]) for match in COMMAND.finditer(text)]
    assert len(found) >= 2 and [] in found  # the plain command, and what a GPU is given
    for flags in found:
        assert configure(cls, EXAMPLES / name, flags) is not None


def test_gpt_shakespeare_is_nanogpts_setting_and_trains(tmp_path, monkeypatch):
    file = EXAMPLES / "gpt_shakespeare/config.yaml"
    config = load_config(file, TrainConfig)
    assert (config.data.block_size, config.data.batch_size, config.run.max_steps) == (64, 12, 2000)
    assert (config.model.n_layer, config.model.n_head, config.model.n_embd) == (4, 4, 128)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("To be, or not to be: that is the question.\n" * 60)
    flags = "--data.path text.txt --data.block-size 16 --model.n-layer 1 --model.n-embd 32 --run.eval-windows 4"
    assert main(["pretrain", "--config", str(file), *flags.split(), "--run.max-steps", "3"]) == 0
    assert Path("runs/gpt-shakespeare/checkpoint/model.safetensors").is_file()


def test_a_tiny_t5_learns_regular_spelling(data, tmp_path):
    """What the recipe is for, at a size that takes seconds: words that it has not seen, after a few hundred steps."""
    flags = "--examples 0 --held-out 0 --no-pretraining --num-beams 1 --model.width 48 --finetune.data.batch-size 64"
    flags += " --finetune.run.max-steps 160 --finetune.run.eval-every 40 --finetune.optimizer.ema-decay 0.9"
    flags += " --finetune.schedule.warmup-steps 20 --finetune.optimizer.learning-rate 4e-3"
    results = smoke("t5_g2p", tmp_path / "out", *flags.split())
    ours, gru = (results["scores"][who]["PER"] for who in ("this", "GRU of g2p-en"))
    assert ours < 0.6 < gru  # always the same sounds score 0.75; the GRU's weights are random here
    first, last = results["curve"][0], results["curve"][-1]
    assert last["word_error"] < first["word_error"] and last["flops"] == pytest.approx(4 * first["flops"])


def test_a_recipe_resumes(data, tmp_path):
    whole = smoke("translate_en_de", tmp_path / "out")
    (tmp_path / "out/report.md").unlink()
    again = smoke("translate_en_de", tmp_path / "out", "--resume")  # nothing is left to train
    assert again["steps"] == whole["steps"] and again["scores"] == whole["scores"]
    longer = smoke("translate_en_de", tmp_path / "out", "--resume", "--finetune.run.max-steps", "8")
    assert longer["steps"] == 8
    assert len(read_metrics(tmp_path / "out/finetune")) > 8


def test_an_earlier_run_is_not_replaced(data, tmp_path):
    smoke("translate_en_de", tmp_path / "out")
    recipe = configure(recipe_of("translate_en_de")[1], EXAMPLES / "translate_en_de", ["--out", str(tmp_path / "out")])
    with pytest.raises(FileExistsError, match="finetune holds a checkpoint; continue it with --resume"):
        check_out(recipe)
    check_out(replace(recipe, resume=True))
    check_out(replace(recipe, out=str(tmp_path / "elsewhere")))


def test_missing_data_is_one_line(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "FASTFORMER_DATA": str(tmp_path), "PIP_NO_INDEX": "1"}
    command = [sys.executable, "-m", "examples.summarise_packages", "--smoke", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=EXAMPLES.parent)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "needs apt-get" in done.stderr.splitlines()[-1]
