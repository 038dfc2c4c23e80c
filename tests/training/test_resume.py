"""Killed at any moment and resumed, a run repeats to the bit the losses of one that never stopped."""

import subprocess
import sys
from pathlib import Path

import torch

from fastformer.models import GPT2LMHeadModel
from fastformer.training.checkpoint import load_state
from fastformer.training.logs import read_metrics

ROOT = Path(__file__).parents[2]
COMPARED = ("step", "loss", "gradient_norm", "learning_rate", "validation_loss")


def test_kill_9_at_any_moment_changes_nothing(tmp_path):
    """With dropout, accumulation, an average of the weights, a validation loss, and in float16 the loss's scale."""
    script = [sys.executable, "-m", "tests.training.kills", str(tmp_path), "1"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for dtype, line in zip(("float32", "float16"), done.stdout.splitlines(), strict=True):
        kills, during_saves = map(int, line.split())
        assert kills >= 4 and during_saves >= 1  # else it has finished too soon to say anything
        compare(tmp_path / dtype / "whole", tmp_path / dtype / "killed")
    norms = [r["gradient_norm"] for r in read_metrics(tmp_path / "float16" / "whole") if "loss" in r]
    assert norms[0] is None and norms.count(None) < 20  # the scale was too large at first, and grew too large again


def compare(whole, killed):
    records = [
        [{name: r[name] for name in COMPARED if name in r} for r in read_metrics(out)] for out in (whole, killed)
    ]
    assert len(records[0]) == 32 + 8
    assert records[0] == records[1]
    for name in ("checkpoint", "ema", "best"):
        a, b = (GPT2LMHeadModel.from_pretrained(out / name).state_dict() for out in (whole, killed))
        assert all(torch.equal(a[key], b[key]) for key in a), name
    a, b = (load_state(out / "checkpoint") for out in (whole, killed))
    for part in ("scaler", "data", "best", "spikes", "tokens", "skipped"):
        assert a[part] == b[part], part
    assert torch.equal(a["random"][0]["cpu"], b["random"][0]["cpu"])
    for mine, theirs in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
