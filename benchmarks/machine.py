"""What a number was measured on: the machine's name, versions, commit, and its ceilings.

The ceilings are measured, in the same process and just before the operations they are set beside: bytes per second of
``clone()`` (fresh memory, page faults included, which every operation that returns a new tensor also pays) and of
``copy_`` into memory already mapped, counting bytes read plus bytes written; and the matmul rate per dtype, counting
2 m n k operations.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

# Bytes of the tensor that is copied, and (m, n, k) of the matmuls. A CPU copies what an 8192 x 1024 float32 operation
# reads; on a GPU both are far larger than its caches.
COPY_BYTES = {"cpu": 32 << 20, "cuda": 2 << 30}
MATMULS = {"cpu": ((1024, 1024, 1024), (2048, 3072, 768)), "cuda": ((8192, 8192, 8192),)}
SEEN_PACKAGES = ("torch", "triton", "numpy", "pytest-benchmark", "transformers", "liger-kernel")


# ---- clocks ----------------------------------------------------------------------------------------------------------


class CudaClock:
    """Seconds on the device's own clock. Two readings around some calls differ by the time the device took over them.

    A reading waits for the device, so the first call after it starts on an idle one; its launch latency (some
    microseconds) is part of the result, which is why a round repeats short calls.
    """

    def __init__(self) -> None:
        self.last: torch.cuda.Event | None = None
        self.seconds = 0.0

    def __call__(self) -> float:
        torch.cuda.synchronize()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self.last is not None:  # between neighbours only: elapsed_time is a float32 number of milliseconds
            self.seconds += self.last.elapsed_time(event) / 1e3
        self.last = event
        return self.seconds


cuda_seconds = CudaClock()
CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.perf_counter, "cuda": cuda_seconds}


def median_seconds(calls: list[Callable[[], object]], device: str, seconds: float) -> list[float]:
    """Median time of each call, the calls taking turns for about ``seconds`` in all (at least three rounds)."""
    clock, samples = CLOCKS[device], [[] for _ in calls]
    for call in calls:
        call()
    deadline = time.perf_counter() + seconds
    while len(samples[0]) < 3 or time.perf_counter() < deadline:
        for call, times in zip(calls, samples):
            start = clock()
            call()
            times.append(clock() - start)
    return [statistics.median(times) for times in samples]


# ---- ceilings --------------------------------------------------------------------------------------------------------


def ceilings(device: str, quick: bool = False) -> dict[str, float]:
    """The machine's measured limits: ``clone`` and ``copy`` in bytes/s, ``matmul_<dtype>`` in operations/s."""
    seconds = 0.05 if quick else 1.0
    size = (1 << 20) if quick else COPY_BYTES[device]
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device).view(torch.float32)
    target = torch.empty_like(source).fill_(0)
    times = median_seconds([source.clone, partial(target.copy_, source)], device, seconds)
    limits = {"clone": 2 * size / times[0], "copy": 2 * size / times[1]}
    for dtype in (torch.float32, torch.bfloat16):
        best = 0.0
        for m, n, k in ((64, 64, 64),) if quick else MATMULS[device]:
            a = torch.randn(m, k, device=device).to(dtype)
            b = torch.randn(n, k, device=device).to(dtype).t()
            (t,) = median_seconds([partial(torch.matmul, a, b)], device, seconds / 2)
            best = max(best, 2 * m * n * k / t)
        limits[f"matmul_{str(dtype).removeprefix('torch.')}"] = best
    return limits


# ---- names -----------------------------------------------------------------------------------------------------------


def describe(device: str) -> dict[str, object]:
    """Machine, versions, commit and date of this run, as it goes into every results file."""
    return {
        "machine": machine_name(device),
        "machine_details": machine_details(device),
        "device": device,
        "versions": versions(device),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def machine_name(device: str) -> str:
    """A folder name: the card, or the processor, our kernels' instruction set and the number of cores we may use.

    The instruction set, because a rented machine's processor often has the same name in every generation.
    """
    if device == "cuda":
        return _slug(torch.cuda.get_device_name())
    return _slug(f"{_processor()} {_instruction_set()} {_cores()} core{'s' * (_cores() > 1)}")


def machine_details(device: str) -> str:
    """One line for people."""
    text = (
        f"{_processor()}, {_cores()} cores, {torch.get_num_threads()} threads, {platform.system()} {platform.machine()}"
    )
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        text = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} SMs; {text}"
    else:
        text += f", {_instruction_set()} kernels"
    return text


def versions(device: str) -> dict[str, str]:
    """Python, fastformer and every installed package a number may depend on."""
    from fastformer.version import __version__

    found = {"python": platform.python_version(), "fastformer": __version__}
    for name in SEEN_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    if device == "cuda":
        found["cuda"] = torch.version.cuda or "none"
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["driver"] = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
    return found


def keep(name: str, text: str, command: str) -> Path:
    """Writes ``results/<machine>/<name>.md``: what a script printed, with the machine, the versions and the command.

    For measurements that are no table of operations: whole processes, or rates with a quality beside them.
    """
    about = describe("cpu")
    path = ROOT / "benchmarks" / "results" / str(about["machine"]) / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    packages = ", ".join(f"{package} {version}" for package, version in versions("cpu").items())
    lines = [f"# {name.replace('_', ' ').capitalize()}", "", f"- {about['machine_details']}; {about['date']}"]
    lines += [f"- commit {about['commit']}; {packages}", f"- `{command}`", "", "```", text.strip(), "```", ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def commit() -> str:
    """The commit: from git, else $FASTFORMER_COMMIT, else a COMMIT file, else a hash of the sources."""
    revision = _run("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if revision:
        changed = _run(
            "git", "-C", str(ROOT), "status", "--porcelain", "--", "csrc", "fastformer", "benchmarks", "setup.py"
        )
        sources = [line for line in changed.splitlines() if "benchmarks/results/" not in line]
        return revision + ("+changes" if sources else "")
    named = os.environ.get("FASTFORMER_COMMIT", "").strip()
    if not named and (ROOT / "COMMIT").is_file():
        named = (ROOT / "COMMIT").read_text().strip()
    return named or f"sources-{_source_hash()}"


def _source_hash() -> str:
    digest = hashlib.sha1()
    for folder in ("csrc", "fastformer", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name.group(1).strip() if name else platform.machine()


def _instruction_set() -> str:
    if importlib.util.find_spec("fastformer._C") is None:
        return "no"
    from fastformer import _C

    return _C.cpu_isa()


def _slug(text: str) -> str:
    text = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*$", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-") or "unknown"


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
