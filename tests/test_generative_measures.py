"""`fastformer generative`: each family from data to scores, plots and samples at tiny size, and its defaults."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("tyro", reason="the command needs fastformer[train]")
pytest.importorskip("matplotlib", reason="plots need fastformer[train]")

from fastformer import cli
from fastformer.training.generative import GenerativeConfig, defaults

TINY = "--model.d-model 16 --model.nhead 2 --model.num-layers 1 --model.latent-size 4 --samples 20 --run.device cpu"
TINY += " --run.max-steps 2 --run.eval-every 1 --run.log-every 1 --data.batch-size 16"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    generator, labels = np.random.default_rng(0), np.arange(90) % 3
    images = generator.integers(0, 90, (90, 8, 8), dtype=np.uint8) + (60 * labels[:, None, None]).astype(np.uint8)
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, images=images, labels=labels)
    return path


@pytest.mark.parametrize(
    "family, measures, sheets",
    [
        ("vae", {"bits_per_dim_bound", "bits_per_dim_importance_bound", "kl", "active_units"}, 3),
        ("gan", set(), 1),
        ("autoregressive", {"bits_per_dim", "bits_per_dim_any_class"}, 1),
    ],
)
def test_images(family, measures, sheets, file, tmp_path, capsys):
    out = tmp_path / family
    command = f"generative --family {family} --data.path {file} --data.levels 6 --run.out {out} {TINY}"
    assert cli.main(command.split()) == 0, capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    samples = {"frechet_distance", "precision", "recall", "density", "coverage", "classes_covered"}
    assert measures | samples <= set(results["scores"]) and results["steps"] == 2
    assert all(math.isfinite(value) for value in results["scores"].values())
    assert len(list(out.glob("*.png"))) == sheets + 1
    assert "held-out samples" in capsys.readouterr().out


def test_lines(tmp_path, capsys):
    text = tmp_path / "lines.txt"
    text.write_text(
        "".join(f"{a} {b}\n" for a in ("red", "blue", "green", "old", "new") for b in "abcdefghijklmnopqrst")
    )
    command = f"generative --data.path {text} --run.out {tmp_path / 'run'} {TINY}"
    assert cli.main(command.split()) == 0, capsys.readouterr().err
    scores = json.loads((tmp_path / "run/results.json").read_text())["scores"]
    assert {"perplexity_bound", "perplexity_importance_bound", "distinct_1", "self_bleu", "active_units"} <= set(scores)
    written = (tmp_path / "run/samples.txt").read_text()
    assert "Held out -> reconstructed" in written and "From one to another" in written


def test_the_family_decides_the_defaults(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("fastformer.generative_measures.run", seen.append)
    file = tmp_path / "run.yaml"
    file.write_text("family: gan\noptimizer: {learning_rate: 1e-4}\n")
    assert cli.main(["generative", "--family", "gan"]) == 0
    assert cli.main(["generative", "--config", str(file), "--gan.r1", "3"]) == 0
    assert cli.main(["generative"]) == 0
    gan, read, vae = seen
    assert gan == defaults("gan") and gan.optimizer.beta1 == 0.0
    assert vae == GenerativeConfig() == defaults("vae")
    assert (read.optimizer.learning_rate, read.optimizer.beta1, read.gan.r1) == (1e-4, 0.0, 3.0)
    assert cli.main(["generative", "--family", "flow"]) == 1
    assert "family: got 'flow'" in capsys.readouterr().err
