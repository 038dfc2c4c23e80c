"""Every benchmark file runs: tiny shapes, all providers there are on a CPU, results that agree, files written."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.run import main
from benchmarks.runner import OPS

ROOT = Path(__file__).resolve().parents[2]


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        # Inside a test worker pytest-benchmark would refuse to time anything.
        env={k: v for k, v in os.environ.items() if "XDIST" not in k} | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run of everything: (the process, what it stored)."""
    folder = tmp_path_factory.mktemp("results")
    done = run("benchmarks/run.py", "--quick", "--device", "cpu", "--out", str(folder))
    path = folder / "results.json"
    return done, json.loads(path.read_text()) if path.exists() else None, folder


def test_the_run_succeeds(quick):
    done, stored, folder = quick
    assert done.returncode == 0, done.stdout + done.stderr
    assert stored is not None and (folder / "results.md").exists()
    assert "clone()" in done.stdout and "matmul" in done.stdout, "limits first"


@pytest.mark.parametrize("op", OPS)
def test_every_operation_has_our_time_and_its_peers(quick, op):
    done, stored, _ = quick
    cases = {}
    for row in stored["rows"]:
        if row["op"] == op:
            cases.setdefault((row["shape"], row["dtype"], row["pass"], row["variant"]), set()).add(row["provider"])
            assert row["median_s"] > 0
    assert cases and all({"ours", "eager"} <= providers for providers in cases.values()), done.stdout
    (about,) = stored["runs"].values()
    bad = [n for n in about["notes"] if n["op"] == op and n["kind"] in ("failed", "wrong", "skipped")]
    assert not bad, bad


def test_pytest_collects_and_runs_a_file_by_itself():
    done = run("-m", "pytest", "benchmarks/activation.py", "--benchmark-only", "-q", FASTFORMER_BENCH_QUICK="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_speed[4x48-float32-forward+backward-gelu]" in done.stdout, "pytest-benchmark's own table"
    assert "in brackets our speed over that peer's" in done.stdout, "and the comparison"


def test_an_unknown_operation_is_an_error(capsys):
    with pytest.raises(SystemExit) as error:
        main(["layernorm"])
    told = capsys.readouterr().err
    assert error.value.code == 2 and "layernorm" in told and "layer_norm" in told


def test_cases_have_unique_names():
    for op in OPS:
        for device, cases in importlib.import_module(f"benchmarks.{op}").CASES.items():
            ids = [case.id for case in cases]
            assert len(ids) == len(set(ids)), (op, device)
