"""Peak memory of attention with T5's relative bias, forward and backward, at 4096 tokens: ours beside PyTorch's.

    python -m benchmarks.memory

PyTorch computes the bias as a (H, S, S) tensor, as T5 in transformers does, and its gradient as another; ours looks it
up in the kernel. Each provider runs in a process of its own, on a CPU, and what counts is how far the process's largest
resident size rises over what it was with the inputs in place (Linux's VmHWM).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

SHAPE = (1, 12, 4096, 64)
GOAL = 8
"""PyTorch's bytes over ours, at least."""
_FORGET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
AVAILABLE = _FORGET.exists()


def peak_bytes(provider: str, shape: tuple[int, int, int, int] = SHAPE) -> int:
    """What one forward and backward pass of ``provider`` ("ours" or "eager") takes beside its inputs, in bytes."""
    sizes = [str(n) for n in shape]
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", provider, *sizes]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure(provider: str, shape: tuple[int, ...]) -> int:
    from benchmarks import attention
    from benchmarks.runner import Case

    make = {"ours": attention.ours, "eager": attention.eager}[provider]
    small, large = (
        Case((*shape[:2], length, shape[3]), "float32", True, "T5 bias", {"bias": "T5"}) for length in (16, shape[2])
    )
    for case in (small, large):  # the small one loads what is loaded at the first call
        problem = attention.setup(case, "cpu")
        call = attention.timed(make)(case, problem)
        before = _largest(forget=True)
        call()
    return _largest() - before


def _largest(forget: bool = False) -> int:
    """The largest resident size of this process so far, in bytes; with ``forget``, since now."""
    if forget:
        _FORGET.write_text("5")
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def report() -> str:
    """Both providers' peaks in one line."""
    if not AVAILABLE:
        return "peak memory: measured on Linux only"
    ours, eager = peak_bytes("ours"), peak_bytes("eager")
    return (
        f"attention {'×'.join(map(str, SHAPE))} fp32 fwd+bwd with T5's bias: {ours / 1e6:,.0f} MB, PyTorch"
        f" {eager / 1e6:,.0f} MB, {eager / ours:.1f} times as much {'✓' if eager >= GOAL * ours else '✗ missed'}"
        f" (goal: {GOAL})"
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=5, metavar=("PROVIDER", "B", "H", "S", "D"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    print(_measure(args.measure[0], tuple(map(int, args.measure[1:]))) if args.measure else report())


if __name__ == "__main__":
    main()
