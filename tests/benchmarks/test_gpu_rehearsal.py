"""``make gpu`` on the CPU: the whole run with tiny inputs, and that one bad section costs no other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import check, gpu, runner
from fastformer.backends import registry

ROOT = Path(__file__).resolve().parents[2]
ON_A_GPU = set(runner.OPS) - {"data_loading"}  # which is the host's work


@pytest.mark.slow
def test_rehearsal_exercises_every_section(tmp_path):
    pytest.importorskip("triton")
    out, copies = tmp_path / "results", tmp_path / "out"
    copies.mkdir()
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--rehearse", "--out", str(out)],
        cwd=ROOT,
        # Inside a test worker pytest-benchmark would refuse to time anything.
        env={k: v for k, v in os.environ.items() if "XDIST" not in k} | {"OUT": str(copies), "SECTION": ""},
        capture_output=True,
        text=True,
        timeout=1600,
    )
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()[-5000:]
    told = json.loads((out / "sections.json").read_text())
    kinds = {section["name"].split()[0] for section in told["sections"]}
    assert kinds == set(gpu.KINDS)
    assert all(section["status"].startswith("ok") for section in told["sections"])
    assert told["commit"] and told["command"].startswith("python benchmarks/gpu.py") and told["limits"]["clone"] > 0
    checked = {(c["backend"], c["op"]) for c in told["checks"]}
    assert {("triton", op) for op in gpu.OPS} <= checked
    # CUDA has no linear_cross_entropy, and no decode_attention in float32, which is its small case.
    assert {("cuda", op) for op in set(gpu.OPS) - {"linear_cross_entropy", "decode_attention"}} <= checked
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {row["op"] for row in rows} == ON_A_GPU
    assert {"triton", "cuda", "flash"} <= {row["provider"] for row in rows}, "a GPU's providers were tried, too"
    for name in gpu.OUTPUTS:
        assert (out / name).exists() and (copies / name).read_bytes() == (out / name).read_bytes()
    assert {path.name for path in (copies / "charts").iterdir()} >= {"attention.png", "training_step.png"}
    assert "layer_norm" in done.stdout.rpartition("checked against float64")[2], "the summary comes last"


def section(name, code, seconds=20.0, stage=0):
    return gpu.Section(name, "check", "", [sys.executable, "-c", code], seconds, stage)


def alive(pid):
    try:  # a killed process may stay as a zombie until its new parent looks
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_crash_and_a_hang_cost_only_themselves(monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0)
    sections = [
        section("crash", "import os, signal; print('before', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"),
        # Hangs, deaf to a polite end, with a child of its own.
        section(
            "hang",
            "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "child = subprocess.Popen(['sleep', '1000']); print(child.pid, flush=True); time.sleep(1000)",
        ),
        section("failure", "raise SystemExit(3)"),
        section("fine", "print('done')", seconds=560, stage=1),  # leaves 2 of the 60 seconds to the first stage
    ]
    started, stages = time.monotonic(), []
    gpu.run_all(sections, started + 60, workers=2, after=lambda: stages.append(len(stages)))
    crash, hang, failure, fine = sections
    assert crash.status == f"crashed: {signal.SIGSEGV.name}" and "before" in crash.log
    assert hang.status == "timed out after 2 s" and time.monotonic() - started < 30
    assert not alive(int(hang.log.split()[0])), "its child went with it"
    assert failure.status == "failed: exit code 3" and fine.status == "ok" and fine.log == "done\n"
    assert [s.ok for s in sections] == [False, False, False, True]
    assert stages == [0, 1], "what is there is written after every stage"


def test_nothing_starts_after_the_deadline():
    late = section("late", "print('no')")
    gpu.run_all([late], time.monotonic() + 1, workers=1, after=lambda: None)
    assert late.status == "skipped: no time left" and not late.log


def test_report_has_the_end_of_what_failed(tmp_path):
    (tmp_path / gpu.PARTS).mkdir()
    failed = section("check triton activation", "")
    failed.status, failed.log = "failed: exit code 1", "some line\nthe error itself\n"
    gpu.write([failed], tmp_path, {"card": "a card", "date": "today", "commit": "abc", "command": "make gpu"})
    text = (tmp_path / "report.md").read_text()
    assert "the error itself" in text and "make gpu" in text and "abc" in text


@pytest.mark.parametrize(
    ("wanted", "kinds", "ops"),
    [
        ("attention", {"machine", "build", "check", "bench"}, {"", "attention"}),
        ("generation", {"machine", "build", "bench"}, {"", "generation"}),
        ("softmax", {"machine", "build", "check", "bench"}, {"", "softmax"}),  # which shares a process otherwise
        ("bench softmax", {"machine", "build", "bench"}, {"", "softmax"}),
        ("bench", {"machine", "build", "bench"}, {"", "rows", *(ops[0] for _, ops in gpu.BENCHES if len(ops) == 1)}),
        ("sanitize", {"machine", "build", "sanitize"}, {""}),
        ("build", {"build"}, {""}),
    ],
)
def test_section_chooses_a_part_and_what_it_needs(tmp_path, wanted, kinds, ops):
    found = gpu.chosen(gpu.plan(tmp_path, False, "90a", wanted), wanted)
    assert {s.kind for s in found} == kinds and {s.op for s in found} == ops
    assert [s.stage for s in found] == sorted(s.stage for s in found)


def test_an_unknown_section_is_an_error(tmp_path, capsys):
    assert gpu.main(["attentoin", "--rehearse", "--out", str(tmp_path)]) == 2
    assert "attentoin" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "card", lambda: ("", ""))
    assert gpu.main([]) == 2
    assert "--rehearse" in capsys.readouterr().out


def test_the_real_plan_builds_for_the_card_and_measures_alone(tmp_path):
    sections = gpu.plan(tmp_path, False, "90a")
    (build,) = (s for s in sections if s.kind == "build")
    assert build.environment == {"FASTFORMER_CUDA": "1", "FASTFORMER_CUDA_ARCHS": "90a"} and build.seconds <= 120
    assert gpu.RUN_SECONDS < 540
    stages = [s.stage for s in sections if s.kind in ("machine", "bench")]
    assert len(stages) == len(set(stages)), "nothing runs beside a measurement"
    assert all("cuda" in s.command for s in sections if s.kind in ("machine", "bench", "check"))
    measured = [word for s in sections if s.kind == "bench" for word in s.command if word in runner.OPS]
    assert sorted(measured) == sorted(ON_A_GPU), "each once"


def test_shares_of_the_plan_are_all_of_its_time(tmp_path):
    sections = gpu.plan(tmp_path, False, "90a")
    shares = {s.stage: s.seconds for s in sections}
    assert all(s.seconds == shares[s.stage] for s in sections), "side by side, they end together"
    assert sum(shares.values()) == gpu.RUN_SECONDS <= 520
    jobs = [s.op for s in sections if s.kind == "bench"][:6]
    assert set(jobs) == {"training_step", "attention", "encoder_layer", "t5", "llama", "generation"}


def test_what_hangs_costs_no_more_than_its_share(monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0)
    hang = "import time; time.sleep(1000)"
    sections = [section("first", hang, 1.0, 0), section("second", hang, 1.0, 1), section("fine", "print(1)", 2.0, 2)]
    started = time.monotonic()
    gpu.run_all(sections, started + 4, workers=1, after=lambda: None)
    assert [s.status.split(" after")[0] for s in sections] == ["timed out", "timed out", "ok"]
    assert sections[0].took < 2 and time.monotonic() - started < 5
    late = [section("quick", "", 3.0, 0), section("later", hang, 3.0, 1)]
    gpu.run_all(late, time.monotonic() + 3, workers=1, after=lambda: None)
    assert late[0].status == "ok" and late[1].took > 1.6, "all that was left"


@pytest.mark.parametrize(("capability", "name"), [("9.0", "90a"), ("8.0", "80"), ("8.6", "86"), ("10.0", "100a")])
def test_architecture(capability, name):
    assert gpu.architecture_of(capability) == name


# ---- check.py --------------------------------------------------------------------------------------------------------


def test_check_covers_every_operation():
    assert set(check.CASES) == set(check.TINY) == set(gpu.OPS) >= set(registry.OPS)


def test_check_finds_a_wrong_gradient(monkeypatch, capsys):
    from fastformer.backends.reference import softmax

    right = softmax.backward
    monkeypatch.setattr(check, "TINY", {"softmax": check.TINY["softmax"][:1]})
    # The reference doubles as the backend under test; only its low-precision calls are tampered with.
    monkeypatch.setattr(
        softmax, "backward", lambda dout, *rest: right(dout, *rest) * (1.0 if dout.dtype.itemsize == 8 else 1.001)
    )
    module = __import__("benchmarks.softmax", fromlist=["softmax"])
    out, gradient = check.check_case(module, "softmax", check.TINY["softmax"][0], "reference", "cpu")
    assert out.ok and not gradient.ok and gradient.repeatable
    check.report([out, gradient])
    assert capsys.readouterr().out.startswith("WRONG softmax reference")


def test_nan_is_wrong():
    assert not check.Check("op", "triton", "case", "out0", float("nan"), 1.0).ok
