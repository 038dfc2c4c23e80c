"""Pictures of an alignment run: reward, divergence, lengths and entropy over its steps, and spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...training.plots import INK, OURS, _figure, _save, _smooth

HELD_OUT = "#d9622b"
# fields of a record (a line each), the panel's name
PANELS = (
    (("reward", "held_out_reward", "true_reward"), "reward"),
    (("rollout_kl_k3", "kl_k3", "approximate_kl"), "KL divergence (k3), nats per token"),
    (("length",), "tokens of a completion"),
    (("entropy",), "entropy, nats per token"),
)


def plot_alignment(records: Sequence[Mapping[str, Any]], path: str | Path, *, title: str) -> Path:
    """Reward (of rollouts, and held out), KL divergence, length and entropy over the steps, a panel each.

    Args:
        records: of ``metrics.jsonl`` (:func:`fastformer.training.logs.read_metrics`).
        path: the PNG to write.
        title: above the panels.
    """
    figure, panels = _figure(12.8, 3.2, columns=len(PANELS))
    for axes, (names, label) in zip(panels, PANELS):
        for name, colour in zip(names, (OURS, HELD_OUT, INK)):
            points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
            if points:
                steps, values = zip(*points)
                axes.plot(
                    steps, _smooth(values, len(values) // 50), color=colour, linewidth=1.4, label=name.replace("_", " ")
                )
        axes.set_xlabel("step")
        axes.set_title(label, fontsize=9)
        if len(names) > 1 and axes.lines:
            axes.legend(frameon=False, fontsize=7)
    return _save(figure, panels[0], path, title, suptitle=True)


def plot_seeds(
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    path: str | Path,
    *,
    title: str,
    labels: tuple[str, str] = ("rollouts", "reward"),
) -> Path:
    """Mean over seeds, and from the least to the largest, for each of several ways.

    Args:
        curves: by name, for each seed points (x, y), all seeds at the same x.
        path: the PNG to write.
        title: above the plot.
        labels: of the axes.
    """
    figure, axes = _figure(7.2, 4.2)
    for (name, seeds), colour in zip(curves.items(), (OURS, HELD_OUT, INK)):
        xs = [x for x, _ in seeds[0]]
        table = [[y for _, y in seed] for seed in seeds]
        columns = list(zip(*table))
        axes.plot(xs, [sum(c) / len(c) for c in columns], color=colour, linewidth=1.6, label=name)
        axes.fill_between(xs, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.legend(frameon=False)
    return _save(figure, axes, path, title)
