"""Pictures of a run: loss over steps, and speed beside PyTorch. PNG files by matplotlib, no display needed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..extras import require

OURS, THEIRS, INK, GRID = "#2563a8", "#b8bec7", "#30343b", "#e4e7eb"

# field of a record, its name to read, what it is divided by
PANELS = (
    ("learning_rate", "learning rate", 1),
    ("gradient_norm", "norm of the gradient", 1),
    ("tokens_per_second", "tokens per second", 1),
    ("peak_memory", "peak memory (GiB)", 2**30),
)


def plot_loss(
    records: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str,
    reference: tuple[str, float] | None = None,
    label: str = "cross-entropy (nats per token)",
) -> Path:
    """Training loss (every step, faint, and smoothed) and validation loss over the steps of a run.

    Args:
        records: of ``metrics.jsonl`` (:func:`fastformer.training.logs.read_metrics`).
        path: the PNG to write.
        title: above the plot.
        reference: (label, loss) of a published result, as a dotted line.
        label: what the loss is.
    """
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r["step"], r["validation_loss"]) for r in records if r.get("validation_loss") is not None]
    figure, axes = _figure(7.2, 4.2)
    if train:
        steps, losses = zip(*train)
        axes.plot(steps, losses, color=OURS, alpha=0.18, linewidth=0.8)
        axes.plot(steps, _smooth(losses, len(losses) // 100), color=OURS, linewidth=1.6, label="training")
    if validation:
        steps, losses = zip(*validation)
        axes.plot(steps, losses, "o-", color="#d9622b", markersize=4, linewidth=1.4, label="validation (held out)")
        axes.annotate(
            f"{losses[-1]:.3f}",
            (steps[-1], losses[-1]),
            textcoords="offset points",
            xytext=(0, -14),
            ha="right",
            color="#d9622b",
            fontweight="bold",
        )
    if reference is not None:
        axes.axhline(reference[1], color=INK, linewidth=1.0, linestyle=":", label=f"{reference[0]}: {reference[1]:.2f}")
    # The first steps fall so fast that the rest would be a flat line beneath them.
    settled = [loss for _, loss in train[len(train) // 50 :] + validation if math.isfinite(loss)]
    if settled:
        low, high = min(settled + ([reference[1]] if reference else [])), max(settled)
        axes.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.03 * (high - low) + 1e-3)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.legend(frameon=False)
    return _save(figure, axes, path, title)


def plot_curve(
    points: Sequence[tuple[float, float]],
    path: str | Path,
    *,
    title: str,
    labels: tuple[str, str],
    references: Mapping[str, float] | None = None,
) -> Path:
    """One measured number against another, such as an error against the arithmetic spent.

    Args:
        points: (x, y).
        path: the PNG to write.
        title: above the plot.
        labels: of the two axes.
        references: published values of y by name, as dotted lines.
    """
    figure, axes = _figure(7.2, 4.2)
    axes.plot(*zip(*points), "o-", color=OURS, markersize=4, linewidth=1.6, label="measured")
    for (name, value), style in zip((references or {}).items(), itertools.cycle((":", "--", "-."))):
        axes.axhline(value, color=INK, linewidth=1.0, linestyle=style, label=f"{name}: {value:.3g}")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.legend(frameon=False)
    return _save(figure, axes, path, title)


def plot_run(records: Sequence[Mapping[str, Any]], path: str | Path, *, title: str) -> Path:
    """Learning rate, norm of the gradient, tokens per second and peak memory over the steps of a run, a panel each.

    Args:
        records: of ``metrics.jsonl`` (:func:`fastformer.training.logs.read_metrics`).
        path: the PNG to write.
        title: above the panels.
    """
    figure, panels = _figure(12.8, 3.2, columns=4)
    for axes, (name, label, unit) in zip(panels, PANELS):
        points = [(r["step"], r[name] / unit) for r in records if r.get(name) is not None]
        if points:
            steps, values = zip(*points)
            axes.plot(steps, values, color=OURS, linewidth=1.2)
        axes.set_title(label, fontsize=10, color=INK)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
    return _save(figure, panels[0], path, title, suptitle=True)


def plot_speed(
    rows: Sequence[tuple[str, float, float]], path: str | Path, *, title: str, names: tuple[str, str]
) -> Path:
    """Tokens per second of two implementations, one panel a job, the ratio above the first.

    Args:
        rows: (job, first, second), in tokens/s.
        path: the PNG to write.
        title: above the panels.
        names: of the two implementations.
    """
    figure, panels = _figure(3.4 * len(rows) + 0.6, 3.9, columns=len(rows))
    for axes, (job, first, second) in zip(panels, rows):
        bars = axes.bar(names, (first, second), color=(OURS, THEIRS), width=0.58)
        axes.bar_label(bars, [f"{first:,.0f}", f"{second:,.0f}"], padding=3, color=INK)
        axes.set_title(f"{job}: {first / second:.2f}×", fontsize=11, color=INK)
        axes.set_ylim(0, 1.18 * max(first, second))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel("tokens per second")
    return _save(figure, panels[0], path, title, suptitle=True)


def plot_search(trials: Sequence[Mapping[str, Any]], metric: str, best_is: str, path: str | Path) -> Path:
    """A search: what each trial came to and the best so far, then the values over each setting that was drawn.

    Args:
        trials: ``number``, ``value`` (None where the trial was stopped) and ``settings`` of each.
        metric: its name; ``best_is`` "lowest" or "highest".
        path: the PNG to write.
    """
    ended = [t for t in trials if t["value"] is not None and math.isfinite(t["value"])]
    names = [n for n in (ended[0]["settings"] if ended else {}) if len({t["settings"][n] for t in ended}) > 1]
    figure, panels = _figure(3.6 * (1 + len(names)), 3.4, columns=1 + len(names))
    panels = panels if names else [panels]
    values = [t["value"] for t in ended]
    numbers = [t["number"] for t in ended]
    best = list(itertools.accumulate(values, max if best_is == "highest" else min))
    panels[0].plot(numbers, values, "o", color=OURS, markersize=4, label="trial")
    panels[0].step(numbers, best, where="post", color="#d9622b", linewidth=1.4, label="best so far")
    panels[0].set_xlabel("trial")
    panels[0].set_ylabel(metric.replace("_", " "))
    panels[0].legend(frameon=False)
    for axes, name in zip(panels[1:], names):
        axes.plot([t["settings"][name] for t in ended], values, "o", color=OURS, markersize=4)
        axes.set_xlabel(name)
        if name.endswith("learning_rate"):
            axes.set_xscale("log")
    stopped = len(trials) - len(ended)
    return _save(figure, panels[0], path, f"{len(ended)} trials to the end, {stopped} stopped", suptitle=True)


def plot_images(images: Any, path: str | Path, *, levels: int, columns: int = 16, title: str) -> Path:
    """A sheet of images, row by row.

    Args:
        images: ``(N, C, H, W)``, whole numbers in [0, levels); 3 channels are colours, of others the first is shown.
        path: the PNG to write.
        levels: the brightest is levels - 1.
        columns: images in a row.
        title: above the sheet.
    """
    import numpy as np

    pixels = np.asarray(images, dtype=np.float32) / (levels - 1)
    pixels = pixels.transpose(0, 2, 3, 1) if pixels.shape[1] == 3 else pixels[:, 0]
    columns, (height, width) = min(columns, len(pixels)), pixels.shape[1:3]
    rows = -(-len(pixels) // columns)
    sheet = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, *pixels.shape[3:]), dtype=np.float32)
    for i, image in enumerate(pixels):
        y, x = i // columns * (height + 1), i % columns * (width + 1)
        sheet[y : y + height, x : x + width] = image
    figure, axes = _figure(max(4.0, 0.45 * columns), 0.5 + max(0.6, 0.45 * rows))
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    return _save(figure, axes, path, title)


def _figure(width: float, height: float, columns: int = 1):
    require("matplotlib", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: its global state and choice of display backend are the caller's.
    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK)
    return figure, panels[0] if columns == 1 else panels


def _save(figure, axes, path: str | Path, title: str, suptitle: bool = False) -> Path:
    if suptitle:
        figure.suptitle(title, fontsize=11, color=INK)
    else:
        axes.set_title(title, loc="left", fontsize=11, color=INK)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    return path


def _smooth(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value and up to ``reach`` neighbours on either side; at the steep start as many on both."""
    sums = [0.0, *itertools.accumulate(values)]
    smoothed = []
    for i in range(len(values)):
        first, end = i - min(reach, i), min(len(values), i + min(reach, i) + 1)
        smoothed.append((sums[end] - sums[first]) / (end - first))
    return smoothed
