"""report.md: scores with intervals, baselines with significance, slices, classes, and the worst examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.pretrained import replaced
from .bootstrap import RESAMPLES, Comparison, Interval, number
from .classification import Classification
from .evaluate import Evaluation

CONFUSION_FILE, REPORT_FILE = "confusion.png", "report.md"


def write_report(
    evaluation: Evaluation,
    directory: str | Path,
    *,
    title: str,
    baselines: Mapping[str, Evaluation | Mapping[str, float]] | None = None,
    command: str = "",
    method: str = "percentile",
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Path:
    """Writes ``report.md``, and ``confusion.png`` for labels, into ``directory``; returns the former.

    Args:
        baselines: by name another evaluation of the same examples, or published scores by their name.
        command: what made this, to be repeated.
        method, confidence, resamples, seed: as in :func:`fastformer.evaluation.confidence_intervals`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    percent = f"{100 * confidence:g}%"
    lines = [f"# {title}", "", f"{len(evaluation):,} examples in {evaluation.seconds:.1f} s."]
    if command:
        lines += ["", "```", command, "```"]
    lines += ["", "## Scores", ""]
    intervals = evaluation.intervals(method=method, **options)
    classes = {
        f"{what} {name}"
        for metric in evaluation.metrics
        if isinstance(metric, Classification)
        for name in metric.names
        for what in ("precision", "recall", "F1")
        if name != metric.positive
    }
    rows = [
        (name, number(i.score), i.range) for name, i in intervals.items() if name not in classes and i.score == i.score
    ]
    lines += _table(("score", "value", f"{percent} interval"), rows)
    signatures = [f"{metric.name}: `{metric.signature}`" for metric in evaluation.metrics if metric.signature]
    if signatures:
        lines += ["", *(f"- {signature}" for signature in signatures)]
    how = f"Intervals: {method} bootstrap over examples, {resamples:,} resamples, seed {seed}."
    lines += ["", how if len(evaluation) > 1 else "A single example: no interval can be had."]
    if baselines:
        comparisons = [
            found for name, other in baselines.items() for found in evaluation.compare(other, name, **options)
        ]
        lines += ["", "## Beside baselines", "", *_comparisons(comparisons, percent)]
    for name in evaluation.slices:
        lines += ["", f"## By {name}", ""]
        table = evaluation.by_slice(name, **options)
        headlines = [metric.headline for metric in evaluation.metrics]
        rows = [(value, f"{count:,}", *(str(found[h]) for h in headlines)) for value, (count, found) in table.items()]
        lines += _table((name, "examples", *headlines), rows)
    for metric in evaluation.metrics:
        if isinstance(metric, Classification):
            lines += ["", "## Classes", "", *_classes(metric, intervals)]
            metric.plot_confusion_matrix(directory / CONFUSION_FILE, title="share of each class (row)")
            lines += ["", f"![What was taken for what]({CONFUSION_FILE})"]
    if evaluation.worst:
        lines += ["", f"## The {len(evaluation.worst)} worst examples by {evaluation.metrics[0].name}", ""]
        lines += _worst(evaluation)
    if evaluation.records is not None:
        lines += ["", f"All {len(evaluation):,}: {evaluation.records.name}"]
    path = directory / REPORT_FILE
    with replaced(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _comparisons(comparisons: Sequence[Comparison], percent: str) -> list[str]:
    rows = []
    for found in comparisons:
        p = [f"{value:.3g}" if value == value else "–" for value in (found.paired_bootstrap, found.randomisation)]
        change = f"{number(found.difference.score)} {found.difference.range}"
        rows.append((found.baseline_name, found.metric, number(found.score), number(found.baseline), change, *p))
    head = ("baseline", "score", "this", "baseline's", f"difference, {percent} interval", "p, paired bootstrap")
    note = (
        "p: how likely a difference so large is by chance, two-sided; – beside a score without its examples, and of a "
        "single one."
    )
    return [*_table((*head, "p, randomisation"), rows), "", note]


def _classes(metric: Classification, intervals: Mapping[str, Interval]) -> list[str]:
    counts = metric.confusion_matrix().sum(axis=1)
    rows = [
        (name, f"{count:,}", *(str(intervals[f"{what} {name}"]) for what in ("precision", "recall", "F1")))
        for name, count in zip(metric.names, counts)
    ]
    return _table(("class", "examples", "precision", "recall", "F1"), rows)


def _worst(evaluation: Evaluation) -> list[str]:
    names = next((m.names for m in evaluation.metrics if isinstance(m, Classification)), None)

    def value(content: Any) -> str:
        return names[content] if names and isinstance(content, int) else _short(content)

    rows = []
    for line in evaluation.worst:
        rest = {k: v for k, v in line.items() if k not in ("index", "prediction", "reference", "scores", "slices")}
        scores = ", ".join(f"{name} {number(score)}" for name, score in line["scores"].items() if score is not None)
        shown = "; ".join(f"{key}: {_short(content)}" for key, content in rest.items())
        rows.append((str(line["index"]), value(line["prediction"]), value(line["reference"]), scores, shown))
    return _table(("example", "prediction", "reference", "scores", "more"), rows)


def _short(content: Any, most: int = 160) -> str:
    text = number(content) if isinstance(content, float) else str(content)
    return text if len(text) <= most else text[: most - 1] + "…"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def cells(values: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(value.replace("|", "\\|").split()) for value in values) + " |"

    return [cells(head), "|" + "---|" * len(head), *map(cells, rows)]
