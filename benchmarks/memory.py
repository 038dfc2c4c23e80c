"""Peak memory of one forward and backward pass, ours beside PyTorch's.

    python -m benchmarks.memory

Attention with T5's relative bias at 4096 tokens: PyTorch computes the bias as a (H, S, S) tensor, as T5 in transformers
does, and its gradient as another; ours looks it up in the kernel. linear_cross_entropy at GPT-2's size: PyTorch holds
tables of rows x classes. Each provider runs in a process of its own, on a CPU, and what counts is how far the process's
largest resident size rises over what it was with the inputs in place (Linux's VmHWM).
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FORGET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
AVAILABLE = _FORGET.exists()


@dataclass(frozen=True)
class Job:
    """What is measured.

    Attributes:
        op: the benchmark file that sets it up.
        small: a shape that loads what is loaded at the first call.
        goal: PyTorch's bytes over ours, at least.
        gradients: whether the gradients count. As large as the inputs, they say nothing about a pass over large ones.
    """

    op: str
    shape: tuple[int, ...]
    small: tuple[int, ...]
    goal: float
    text: str
    gradients: bool = True
    dtype: str = "float32"
    variant: str = ""
    options: dict[str, Any] = field(default_factory=dict)


JOBS = {
    "attention": Job(
        "attention", (1, 12, 4096, 64), (1, 4, 16, 64), 8, "with T5's bias", variant="T5 bias", options={"bias": "T5"}
    ),
    "linear_cross_entropy": Job(
        "linear_cross_entropy", (1024, 768, 50257), (8, 768, 64), 4, "beside its gradients", gradients=False
    ),
}


def peak_bytes(provider: str, name: str, shape: tuple[int, ...] | None = None) -> int:
    """What one forward and backward pass of ``provider`` ("ours" or "eager") takes beside its inputs, in bytes."""
    sizes = [str(n) for n in shape or JOBS[name].shape]
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", provider, name, *sizes]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure(provider: str, name: str, shape: tuple[int, ...]) -> int:
    from benchmarks.runner import Case

    job = JOBS[name]
    module = importlib.import_module(f"benchmarks.{job.op}")
    for size in (job.small, shape):
        case = Case(size, job.dtype, True, job.variant, job.options)
        problem = module.setup(case, "cpu")
        call = module.timed(getattr(module, provider))(case, problem)
        before = _largest(forget=True)
        call()
    peak = _largest() - before
    return peak if job.gradients else peak - sum(t.nbytes for t in problem.wrt)


def _largest(forget: bool = False) -> int:
    """The largest resident size of this process so far, in bytes; with ``forget``, since now."""
    if forget:
        _FORGET.write_text("5")
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def report() -> str:
    """Both providers' peaks, a line for each job."""
    return "\n".join(map(_line, JOBS)) if AVAILABLE else "peak memory: measured on Linux only"


def _line(name: str) -> str:
    job = JOBS[name]
    ours, eager = (peak_bytes(provider, name) for provider in ("ours", "eager"))
    return (
        f"{name} {'×'.join(map(str, job.shape))} fp32 fwd+bwd {job.text}: {ours / 1e6:,.0f} MB, PyTorch"
        f" {eager / 1e6:,.0f} MB, {eager / ours:.1f} times as much {'✓' if eager >= job.goal * ours else '✗ missed'}"
        f" (goal: {job.goal:g})"
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs="+", metavar="PROVIDER JOB SIZE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.measure:
        return print(report())
    provider, name, *sizes = args.measure
    print(_measure(provider, name, tuple(map(int, sizes))))


if __name__ == "__main__":
    main()
