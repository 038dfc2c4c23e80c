"""Returns over the steps of runs: the mean of the seeds, and their spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..training.plots import INK, OURS, _figure, _save

COLOURS = (OURS, "#d9622b", "#3d8c40", "#8257a8", "#a8812f")


def plot_returns(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    path: str | Path,
    *,
    title: str,
    references: Mapping[str, float] | None = None,
    metric: str = "evaluation_return",
) -> Path:
    """A line per name, the mean over its seeds where at least half of them have a measurement; the band is the lowest
    to the highest of them.

    Args:
        runs: name -> the records of ``metrics.jsonl`` of each seed.
        path: the PNG to write.
        title: above the plot.
        references: returns by name, as dotted lines: a random policy's, one made by hand, a published one.
        metric: key of the records.
    """
    figure, axes = _figure(7.2, 4.2)
    for (name, seeds), colour in zip(runs.items(), COLOURS):
        points = mean_and_spread(seeds, metric)
        if not points:
            continue
        steps, means, lows, highs = zip(*points)
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, means, "o-", color=colour, markersize=3, linewidth=1.6, label=name)
    for name, value in (references or {}).items():
        axes.axhline(value, color=INK, linewidth=1.0, linestyle=":", label=f"{name}: {value:.3g}")
    axes.set_xlabel("steps in the environment")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel(metric.replace("_", " "))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return _save(figure, axes, path, title)


def mean_and_spread(seeds: Sequence[Sequence[Mapping[str, Any]]], metric: str) -> list[tuple[int, float, float, float]]:
    """(step, mean, lowest, highest) over the seeds, at the steps that at least half of them measured."""
    measured: dict[int, list[float]] = {}
    for records in seeds:
        for record in records:
            if record.get(metric) is not None:
                measured.setdefault(record["step"], []).append(record[metric])
    enough = (len(seeds) + 1) // 2
    return [
        (step, statistics.fmean(values), min(values), max(values))
        for step, values in sorted(measured.items())
        if len(values) >= enough
    ]
