"""Speed relative to PyTorch eager as pictures: ``results.png``, every operation, and ``charts/<op>.png``, its cases.

    python -m benchmarks.charts benchmarks/results/<machine>    draws them, and results.md, from what results.json has

A bar of the summary is the geometric mean over an operation's cases, a dot one case. The sweeps of small and odd shapes
are left to the tables."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import report
from benchmarks.goals import SWEEP

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUMMARY, FOLDER = "results.png", "charts"
# One colour per provider, in every chart.
COLORS = {"ours": "#c0392b", "compile": "C0", "clone": "C2", "matmuls": "C2", "bare": "C2", "transformers": "C1"}
COLORS["float32 matmuls"] = COLORS["matmuls"]
OTHERS = "C4"
DPI = 110

Cases = Mapping[Any, Mapping[str, Mapping[str, Any]]]


def draw(stored: Mapping[str, Any], folder: Path, ops: Collection[str] | None = None) -> bool:
    """Draws the newest runs in ``stored`` into ``folder``: the summary, and the charts of ``ops`` (default all).

    Returns False without matplotlib.
    """
    try:
        import matplotlib.backends.backend_agg  # noqa: F401
    except ImportError:
        return False
    shown = {}
    for op, cases in report.grouped(report.newest_rows(stored)).items():
        kept = {c: p for c, p in cases.items() if "eager" in p and "ours" in p and c.variant != SWEEP}
        shown.update({op: kept} if kept else {})
    if not shown:
        return False
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    _picture(folder / SUMMARY, 1.0 + 0.34 * len(shown), lambda axes: _summary(axes, shown))
    for op, cases in shown.items():
        if ops is None or op in ops:
            bars = sum(len(p) - 1 for p in cases.values())
            height = 1.3 + 0.14 * bars + 0.16 * len(cases)
            _picture(folder / FOLDER / f"{op}.png", height, lambda axes, op=op, cases=cases: _cases(axes, op, cases))
    return True


def drawn(folder: Path) -> dict[str, str]:
    """Operation -> its chart's address from ``folder``; "" -> the summary's. Only what is there."""
    found = {path.stem: f"{FOLDER}/{path.name}" for path in sorted((folder / FOLDER).glob("*.png"))}
    return {**({"": SUMMARY} if (folder / SUMMARY).exists() else {}), **found}


def _picture(path: Path, height: float, fill) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    fill(axes)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=DPI)


def _summary(axes: Axes, shown: Mapping[str, Cases]) -> None:
    for y, cases in enumerate(shown.values()):
        speeds = [p["eager"]["median_s"] / p["ours"]["median_s"] for p in cases.values()]
        mean = statistics.geometric_mean(speeds)
        # From 1 on, because the length of a bar from zero means nothing on a logarithmic axis.
        axes.barh(y, mean - 1.0, 0.6, left=1.0, color=COLORS["ours"], alpha=0.75)
        axes.plot(speeds, [y] * len(speeds), "o", color="black", markersize=2.5, alpha=0.5)
        axes.text(1.01, y, f"{mean:.2f}×", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [f"{op} ({len(cases)})" for op, cases in shown.items()])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [t for t in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", linewidth=0.3)
    axes.set_title("Speed relative to PyTorch eager: geometric mean of each operation's cases (dots)", fontsize=10)


def _cases(axes: Axes, op: str, cases: Cases) -> None:
    providers = list(dict.fromkeys(name for by_provider in cases.values() for name in by_provider if name != "eager"))
    named: set[str] = set()
    y, ticks = 0.0, []
    for by_provider in cases.values():
        present = [name for name in providers if name in by_provider]
        ticks.append(y + (len(present) - 1) / 2)
        for name in present:
            speed = by_provider["eager"]["median_s"] / by_provider[name]["median_s"]
            label = None if name in named else name
            named.add(name)
            axes.barh(y, speed, 0.9, color=COLORS.get(name, OTHERS), label=label)
            axes.text(speed, y, f" {speed:.2f}×", va="center", fontsize=7)
            y += 1
        y += 1.2
    axes.set_yticks(ticks, [report.case_text(case) for case in cases])
    axes.set_ylim(-0.8, y - 1.4)
    axes.margins(x=0.08)
    axes.set_title(f"{op}: speed relative to PyTorch eager", fontsize=10)
    axes.figure.legend(fontsize=7, loc="outside lower center", ncols=len(providers))


def main(argv: list[str]) -> int:
    """Draws the charts of a folder of results again, and writes its results.md."""
    if len(argv) != 1 or not (Path(argv[0]) / report.JSON).exists():
        print(f"usage: python -m benchmarks.charts FOLDER (one with a {report.JSON})", file=sys.stderr)
        return 2
    folder = Path(argv[0])
    stored = json.loads((folder / report.JSON).read_text())
    if not draw(stored, folder):
        print("nothing to draw, or no matplotlib", file=sys.stderr)
        return 1
    (folder / report.MARKDOWN).write_text(report.markdown(stored, drawn(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
