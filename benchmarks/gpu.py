"""``make gpu``: what these kernels are worth on the card in this machine, in one command of at most nine minutes.

    python benchmarks/gpu.py                      everything
    SECTION=attention python benchmarks/gpu.py    one operation: its checks and its benchmark; or one section by name
    python benchmarks/gpu.py --rehearse           every section with tiny inputs on the CPU, on Triton's interpreter and
                                                  the CUDA emulator, so that on the day only the hardware is new

Sections, in this order: ``machine`` (versions, copy bandwidth and matmul rate: the ceilings), ``build`` (for this
card), ``check`` (every operation on every backend against float64) and ``tests`` (the suite's GPU tests),
``sanitize`` (compute-sanitizer on small shapes), ``bench`` (every operation and model job beside every peer that
imports, the most valuable first). Each runs in a process of its own with its own share of the time (SECONDS, BENCHES):
one that crashes or hangs loses itself and nothing else, and what one leaves over goes to those after it.

Needs Python 3.10, torch with CUDA, triton, nvcc, ninja, pybind11 and pytest-benchmark; no network. Writes
benchmarks/results/<card>/<date>/: report.md, results.json, results.md, results.png, charts/, sections.json and log.txt;
the same files go to $OUT if that is set.

Tiles are measured as they are; ``python -m fastformer.backends.triton.tune --op attention`` looks for better ones.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(p for p in sys.path if p and Path(p).resolve() not in (ROOT, ROOT / "benchmarks"))]

from benchmarks import KERNELS, charts, machine, report  # noqa: E402

PYTHON = sys.executable

RUN_SECONDS = 520  # the whole run; nothing is started that could end later. The shares below add up to it
LEAST_SECONDS = 5  # less is not worth starting anything in
OPS = tuple(op for op in KERNELS if op != "linear")  # that is the vendor library's there
# Seconds for each kind of section but the benchmarks; the checks and the tests run side by side.
SECONDS = {"machine": 20, "build": 110, "check": 90, "sanitize": 30}
ROWS = ("cross_entropy", "layer_norm", "softmax", "rms_norm", "add_layer_norm", "add_rms_norm")
ROWS += ("rotary", "embedding", "activation", "overhead")
# What the rest of the time is for: seconds, and what one process measures with them. A training step's are the compiled
# peer's compiler, mostly. The row operations need little but a start, and share one.
BENCHES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (54, ("training_step",)),
    (32, ("attention",)),
    (24, ("encoder_layer",)),
    (24, ("t5",)),
    (20, ("llama",)),
    (16, ("generation",)),
    (12, ("decode_attention",)),
    (12, ("linear_cross_entropy",)),
    (12, ("feed_forward",)),
    (8, ("linear",)),
    (56, ROWS),
)
BACKENDS = ("triton", "cuda")
KINDS = ("machine", "build", "check", "tests", "sanitize", "bench")
PARTS = "parts"  # what sections leave for the report, removed at the end
LIMIT = "{limit}"  # in a command: the seconds after which it should begin nothing new
OUTPUTS = ("report.md", "results.json", "results.md", "results.png", "sections.json", "log.txt")


@dataclass
class Section:
    """One process: what it is for, its command, its share of the time in seconds, and afterwards how it went.

    Attributes:
        stage: sections of one stage run side by side; those that time anything have a stage of their own.
        done: exit codes that mean success.
    """

    name: str
    kind: str
    op: str
    command: list[str]
    seconds: float
    stage: int
    environment: dict[str, str] = field(default_factory=dict)
    done: tuple[int, ...] = (0,)
    absent: str = ""
    status: str = "not run"
    took: float = 0.0
    log: str = ""

    @property
    def ok(self) -> bool:
        return self.status.startswith(("ok", "absent"))


# ---- the plan --------------------------------------------------------------------------------------------------------


def plan(folder: Path, rehearse: bool, architecture: str, wanted: str = "") -> list[Section]:
    """Every section of a run that writes to ``folder``, in order; ``wanted`` (see :func:`chosen`) has one of its own.

    A rehearsal runs the same commands with tiny inputs on the CPU, several operations in a process to save its start.
    """
    device, parts = "cpu" if rehearse else "cuda", folder / PARTS
    limits = str(parts / "limits.json")
    run = [PYTHON, "benchmarks/run.py", "--device", device, "--limits", limits, "--out", str(folder)]
    small = ["--quick"] if rehearse else []
    sections = [
        Section("machine", "machine", "", [*run, *small, "--limits-only"], SECONDS["machine"], 0),
        _build(parts / "lib", rehearse, architecture),
    ]
    for backend in BACKENDS:
        for ops in [list(OPS)] if rehearse else [[op] for op in OPS]:
            name = f"check {backend}" + ("" if rehearse else f" {ops[0]}")
            command = [PYTHON, "benchmarks/check.py", *ops, "--backend", backend, "--device", device]
            command += ["--json", str(parts / f"{name.replace(' ', '-')}.json"), *(["--tiny"] if rehearse else [])]
            sections.append(Section(name, "check", "" if rehearse else ops[0], command, SECONDS["check"], 2))
    tests = [PYTHON, "-m", "pytest", "tests", "-m", "gpu", "-q", "--no-header", "--continue-on-collection-errors"]
    tests += ["--collect-only", "tests/triton", "tests/cuda"] if rehearse else ["-p", "no:cacheprovider"]
    if rehearse:
        tests.remove("tests")
    sections.append(Section("tests", "tests", "", tests, SECONDS["check"], 2, done=(0, 5)))
    sections += [_sanitize(tool, backend, rehearse) for tool, backend in (("memcheck", "cuda"), ("racecheck", "cuda"))]
    if not rehearse:
        sections.append(_sanitize("memcheck", "triton", rehearse))
    stage = 4
    benches = [(0, tuple(op for _, ops in BENCHES for op in ops))] if rehearse else BENCHES
    for seconds, ops in benches:
        if not rehearse and wanted.removeprefix("bench ") in ops:
            ops = (wanted.removeprefix("bench "),)
        op = "" if rehearse else ops[0] if len(ops) == 1 else "rows"
        command = [*run, *ops, *small, "--seconds", "0.4", "--limit", LIMIT]
        sections.append(Section(f"bench {op}".rstrip(), "bench", op, command, seconds, stage))
        stage += 1
    rehearsal = {"TRITON_INTERPRET": "1", "FASTFORMER_EMULATE": "1", "FASTFORMER_BENCH_REHEARSE": "1"}
    for section in sections if rehearse else ():
        section.environment = {**rehearsal, "OMP_NUM_THREADS": "1", **section.environment}
        # This machine may be busy, build from clean and emulate slowly; nothing is measured.
        section.seconds = {"machine": 60, "build": 500, "sanitize": 100}.get(section.kind, 400)
    return sections


def _build(library: Path, rehearse: bool, architecture: str) -> Section:
    command = [PYTHON, "setup.py", "-q", "build_ext"]
    # The rehearsal leaves the modules in place alone, and the CUDA part to the tests that compile it off-line.
    command += ["--build-lib", str(library)] if rehearse else ["--inplace"]
    cuda = {"FASTFORMER_CUDA": "0"} if rehearse else {"FASTFORMER_CUDA": "1", "FASTFORMER_CUDA_ARCHS": architecture}
    return Section("build", "build", "", command, SECONDS["build"], 1, environment=cuda)


def _sanitize(tool: str, backend: str, rehearse: bool) -> Section:
    checker = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    command = [PYTHON, "benchmarks/check.py", "layer_norm" if rehearse else "", "--backend", backend, "--tiny"]
    command = [word for word in command if word] + ["--device", "cpu" if rehearse else "cuda"]
    absent = ""
    if not rehearse:
        command = [str(checker), "--tool", tool, "--error-exitcode", "86", *command]
        absent = "" if checker else "compute-sanitizer is not installed"
    # Without the caching allocator, memory past a tensor's end is nobody's, and an access to it shows.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Section(
        f"sanitize {tool} {backend}", "sanitize", "", command, SECONDS["sanitize"], 3, environment, absent=absent
    )


def chosen(sections: list[Section], wanted: str) -> list[Section]:
    """The sections named by kind ("bench"), by full name ("check cuda softmax") or by op, with what those need."""
    if not wanted:
        return sections
    found = [s for s in sections if wanted in (s.kind, s.name, s.op)]
    if not found:
        names = (*KINDS, "rows", *(op for _, ops in BENCHES for op in ops))
        raise ValueError(f"SECTION: {wanted!r} is not one of {', '.join(names)}, or a section's full name")
    needed = [s for s in sections if s.kind in ("machine", "build") and s not in found]
    return sorted([*needed, *found], key=lambda s: s.stage) if found[0].kind not in ("machine", "build") else found


# ---- running it ------------------------------------------------------------------------------------------------------


_running: set[subprocess.Popen] = set()


def execute(section: Section, seconds: float) -> None:
    """Runs one section to its end or for ``seconds``, and records how it went."""
    if section.absent:
        section.status = f"absent: {section.absent}"
        return
    if seconds < LEAST_SECONDS:
        section.status = "skipped: no time left"
        return
    started = time.monotonic()
    process = subprocess.Popen(
        [str(int(0.8 * seconds)) if word == LIMIT else word for word in section.command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **section.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what it started ends with it
    )
    _running.add(process)
    try:
        section.log, _ = process.communicate(timeout=seconds)
        code = process.returncode
        section.status = "ok" if code in section.done else _failure(code)
        if code == 5 and section.kind == "tests":
            section.status = "ok: no tests selected"
    except subprocess.TimeoutExpired:
        section.log = _end(process)
        section.status = f"timed out after {seconds:.0f} s"
    finally:
        _running.discard(process)
        section.took = time.monotonic() - started


def _end(process: subprocess.Popen) -> str:
    """Ends a section's whole process group, politely first: a compiler then removes what it has half written."""
    for how, patience in ((signal.SIGTERM, 4), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, how)
            return process.communicate(timeout=patience)[0]
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    return "(its output is lost: it could not be ended)"


def _failure(code: int) -> str:
    if code < 0:
        return f"crashed: {signal.Signals(-code).name}"
    return "failed: the sanitizer found errors" if code == 86 else f"failed: exit code {code}"


def run_all(sections: list[Section], deadline: float, workers: int, after: Callable[[], object]) -> None:
    """Stage after stage, ``workers`` sections of it at once, until ``deadline`` (``time.monotonic``).

    Prints a line as each section ends and calls ``after`` at the end of each stage. A stage has its sections' share of
    the time that is left, so that one that takes all of its own takes nothing from those to come.
    """
    shares = {stage: max(s.seconds for s in sections if s.stage == stage) for stage in {s.stage for s in sections}}
    for stage in sorted(shares):
        together = [s for s in sections if s.stage == stage]
        now, to_come = time.monotonic(), sum(shares.values())
        end = now + (deadline - now) * shares.pop(stage) / to_come

        def run(section: Section, end: float = end) -> Section:
            execute(section, end - time.monotonic())
            return section

        with ThreadPoolExecutor(max_workers=workers) as pool:
            try:
                for section in pool.map(run, together):
                    print(f"  {section.name:32s} {section.took:5.0f} s  {section.status}", flush=True)
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(_running):
                    _end(process)
                raise
        after()


# ---- what comes out --------------------------------------------------------------------------------------------------


def gather(sections: list[Section], folder: Path, about: dict[str, str]) -> dict:
    """Everything the sections left in ``folder`` as one dictionary: statuses, checks and where each goal stands."""
    checks, failures, missing = [], [], []
    for path in sorted((folder / PARTS).glob("check-*.json")):
        found = json.loads(path.read_text())
        checks += found["checks"]
        failures += found["failures"]
        missing += found["missing"]
    limits, measured = folder / PARTS / "limits.json", folder / report.JSON
    stored = json.loads(measured.read_text()) if measured.exists() else {"rows": []}
    return {
        **about,
        "limits": json.loads(limits.read_text()) if limits.exists() else {},
        "sections": [
            {"name": s.name, "status": s.status, "seconds": round(s.took, 1), "command": " ".join(s.command)}
            for s in sections
        ],
        "checks": checks,
        "check_failures": failures,
        "not_implemented": missing,
        "benchmarks": report.goal_lines(stored["rows"], "cuda") if stored["rows"] else [],
    }


def write(sections: list[Section], folder: Path, about: dict[str, str]) -> str:
    """Writes every file of the run, as far as it has come, there and to $OUT, and returns the summary to print."""
    result = gather(sections, folder, about)
    (folder / "sections.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (folder / "log.txt").write_text("".join(f"==== {s.name}: {s.status}\n{s.log}\n" for s in sections))
    summary = summarise(result)
    tables = folder / "results.md"
    failed = [s for s in sections if not s.ok and s.status != "not run"]
    parts = [
        f"# {about['card']}, {about['date']}",
        "",
        f"- commit: {about['commit']}",
        f"- command: `{about['command']}`",
    ]
    parts += ["", "```", summary, "```", ""]
    for section in failed:
        tail = "\n".join(section.log.strip().splitlines()[-25:])
        parts += [f"## {section.name}: {section.status}", "", "```", tail, "```", ""]
    (folder / "report.md").write_text("\n".join(parts) + (tables.read_text() if tables.exists() else ""))
    if os.environ.get("OUT"):
        for output in OUTPUTS:
            if (folder / output).exists():
                shutil.copy2(folder / output, os.environ["OUT"])
        if (folder / charts.FOLDER).exists():
            shutil.copytree(folder / charts.FOLDER, Path(os.environ["OUT"]) / charts.FOLDER, dirs_exist_ok=True)
    return summary


def summarise(result: dict) -> str:
    """The short table printed last."""
    lines = [f"{result['card']}, commit {result['commit']}"]
    if result["limits"]:
        lines.append(report.ceiling_text(result["limits"]))
    lines += ["", f"{'section':34s} {'s':>5s}  result"]
    lines += [f"{s['name']:34s} {s['seconds']:5.0f}  {s['status']}" for s in result["sections"]]
    groups: dict[tuple[str, str], list[dict]] = {}
    for check in result["checks"]:
        groups.setdefault((check["backend"], check["op"]), []).append(check)
    if groups:
        lines += ["", f"{'checked against float64':34s} {'right':>9s}  worst, as a share of what is allowed"]
    for (backend, op), checks in groups.items():
        worst = max(checks, key=lambda c: c["error"] / c["allowed"] if c["error"] == c["error"] else float("inf"))
        right = sum(c["ok"] for c in checks)
        share = worst["error"] / worst["allowed"] if worst["allowed"] else float("nan")
        lines.append(
            f"{backend + ' ' + op:34s} {right:4d}/{len(checks):4d}  {share:.2f} ({worst['case']} {worst['result']})"
        )
    lines += [f"FAILED {line}" for line in result["check_failures"]]
    if result["benchmarks"]:
        lines += ["", *result["benchmarks"]]
    return "\n".join(lines)


def card() -> tuple[str, str]:
    """Name and compute capability of the first GPU, such as ("NVIDIA H200", "9.0"); empty without one."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "", ""
    name, _, capability = answer.stdout.partition("\n")[0].partition(",")
    return (name.strip(), capability.strip()) if answer.returncode == 0 else ("", "")


def architecture_of(capability: str) -> str:
    """nvcc's name of a compute capability: "9.0" -> "90a" (its own instructions from Hopper on), "8.6" -> "86"."""
    digits = capability.replace(".", "")
    return digits + "a" if digits.isdigit() and int(digits) >= 90 else digits


def main(argv: list[str] | None = None) -> int:
    """Runs the sections; returns 1 if any failed."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "section", nargs="?", default=os.environ.get("SECTION", ""), help="as $SECTION: a part of the run"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny inputs on the CPU; needs no GPU")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/<card>/<date>, or build/gpu-rehearsal")
    args = parser.parse_args(argv)
    started = time.monotonic()
    name, capability = ("rehearsal", "") if args.rehearse else card()
    if not name:
        print(
            "No GPU: nvidia-smi does not answer. `python benchmarks/gpu.py --rehearse` runs every section on the CPU."
        )
        return 2
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    date = time.strftime("%Y-%m-%d_%H%M", time.gmtime())
    usual = ROOT / "build" / "gpu-rehearsal" if args.rehearse else ROOT / "benchmarks" / "results" / slug / date
    folder = (args.out or usual).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in OUTPUTS:
        (folder / leftover).unlink(missing_ok=True)
    for leftover in (PARTS, charts.FOLDER):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    (folder / PARTS).mkdir()
    try:
        sections = plan(folder, args.rehearse, architecture_of(capability), args.section)
        sections = chosen(sections, args.section)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2

    words = " ".join(["python benchmarks/gpu.py", *(sys.argv[1:] if argv is None else argv)])
    prefix = f"SECTION={args.section} " if os.environ.get("SECTION") else ""
    about = {"card": name, "date": f"{date} UTC", "commit": machine.commit(), "command": prefix + words}
    print(f"{name}: {len(sections)} sections, results in {folder}", flush=True)
    workers = 2 if args.rehearse else max(2, min(7, (os.cpu_count() or 2) // 2))
    try:
        limit = 3 * RUN_SECONDS if args.rehearse else RUN_SECONDS
        run_all(sections, started + limit, workers, lambda: write(sections, folder, about))
    except KeyboardInterrupt:
        print("interrupted; writing what there is", flush=True)
    summary = write(sections, folder, about)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    print(f"\n{summary}\n\n{time.monotonic() - started:.0f} s; written: {folder}")
    return 0 if all(s.ok for s in sections) else 1


if __name__ == "__main__":
    sys.exit(main())
