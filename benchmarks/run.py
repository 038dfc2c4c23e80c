"""``python benchmarks/run.py [op ...]``: measures the machine's limits, then every operation beside its peers.

    python benchmarks/run.py                         everything, some minutes
    python benchmarks/run.py layer_norm attention    two operations
    python benchmarks/run.py --quick                 tiny shapes: does it run? (numbers mean nothing, none are kept)

Prints one table per operation; results.json, results.md, results.png and charts/ go to benchmarks/results/<machine>/.
Ends with an error where our own code failed or disagreed with PyTorch, not where a goal was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# As a script, the folder of this file comes first on the path and its modules would hide others of the same name.
sys.path[:] = [str(ROOT), *(p for p in sys.path if p and Path(p).resolve() not in (ROOT, ROOT / "benchmarks"))]


def parse(argv: list[str] | None) -> argparse.Namespace:
    from benchmarks.runner import OPS

    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"which operations (default all): {', '.join(OPS)}")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds, nothing written without --out")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU if there is one"
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="timed seconds per case (default 1.5)")
    parser.add_argument("--cases", default="", help="only cases named so, as pytest's -k: 'bfloat16 and not sweep'")
    parser.add_argument("--limit", type=float, default=0.0, help="skip the cases not begun after so many seconds")
    parser.add_argument("--limits", type=Path, help="file of the machine's limits: read if it exists, else written")
    parser.add_argument("--limits-only", action="store_true", help="measure the limits and stop")
    parser.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results/<machine>)")
    args = parser.parse_args(argv)
    unknown = [op for op in args.ops if op not in OPS]
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such benchmark; there are {', '.join(OPS)}")
    args.ops = args.ops or list(OPS)
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmarks named on the command line; returns the exit code."""
    args = parse(argv)
    started = time.perf_counter()
    import pytest
    import torch

    from benchmarks import charts, machine, memory, report
    from benchmarks.recorder import Recorder

    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device", file=sys.stderr)
        return 2
    about = machine.describe(device)
    print(f"{about['machine_details']}\ncommit {about['commit']}", flush=True)
    if args.limits and args.limits.exists():
        ceilings = json.loads(args.limits.read_text())
    else:
        ceilings = machine.ceilings(device, args.quick)
        if args.limits:
            args.limits.write_text(json.dumps(ceilings, indent=1))
    print(f"Measured limits: {report.ceiling_text(ceilings)}", flush=True)
    if args.limits_only:
        print(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
        return 0

    if args.quick:
        about["device"] += " (tiny shapes)"  # which no goal is about
    words = sys.argv[1:] if argv is None else argv
    recorder = Recorder(
        device,
        args.quick,
        args.seconds,
        deadline=started + args.limit if args.limit else 0.0,
        ops=len(args.ops),
        results=report.Results(about, ceilings, " ".join(["python benchmarks/run.py", *words])),
        folder=args.out or (None if args.quick else ROOT / "benchmarks" / "results" / str(about["machine"])),
        live=True,
    )
    options = [
        "--benchmark-only",
        "--benchmark-quiet",
        "--benchmark-disable-gc",
        f"--benchmark-timer={'benchmarks.machine.cuda_seconds' if device == 'cuda' else 'time.perf_counter'}",
        "-qq",
        "--no-header",
        "--no-summary",
        "--capture=no",
        "--disable-warnings",
        "-pno:cacheprovider",
        "-pno:hypothesispytest",
        "-pno:xdist",
        f"-c{os.devnull}",
        f"--rootdir={ROOT}",
        f"--confcutdir={ROOT / 'benchmarks'}",
        *([f"-k={args.cases}"] if args.cases else []),
    ]
    code = pytest.main([*options, *(str(ROOT / "benchmarks" / f"{op}.py") for op in args.ops)], plugins=[recorder])
    results = recorder.results
    if "attention" in args.ops and device == "cpu" and not args.quick:
        print(f"\n{memory.report()}")
    goals = ["Tiny shapes: these times mean nothing."] if args.quick else report.goal_lines(results.rows, device)
    print("\n".join(["", *goals]))
    for note in results.broken:
        print(f"BROKEN: {note['op']} {note['case']}: {note['text']}")
    if recorder.folder:
        print(f"Written: {recorder.folder}/{{{report.JSON},{report.MARKDOWN},{charts.SUMMARY},{charts.FOLDER}}}")
    print(f"{time.perf_counter() - started:.0f} s")
    return 1 if results.broken or int(code) not in (0, 5) else 0


if __name__ == "__main__":
    sys.exit(main())
