"""The evaluation loop: a model's answers to a stream of examples, counted by metrics, kept one line each in a file.

In memory are the metrics' few numbers per example (metric.py), a number per example and slice, and the worst examples.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import math
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..models.pretrained import replaced
from .bootstrap import Comparison, Interval, compare, confidence_intervals
from .metric import Metric
from .predictions import Record, classify

Slice = Callable[[Record], str]
MOST_SLICES = 200


@dataclass
class Evaluation:
    """What was found.

    Attributes:
        metrics: with everything that was counted.
        slices: of each slicing its names, and the number of the name for each example (N,).
        worst: the records with the worst scores by the first metric, worst first.
        records: file with a line of JSON per example, if one was written.
        references: SHA-256 of all references in order.
        seconds: of the whole loop.
    """

    metrics: list[Metric]
    slices: dict[str, tuple[list[str], np.ndarray]] = field(default_factory=dict)
    worst: list[dict[str, Any]] = field(default_factory=list)
    records: Path | None = None
    references: str = ""
    seconds: float = 0.0

    def __len__(self) -> int:
        """Examples."""
        return len(self.metrics[0])

    def scores(self) -> dict[str, float]:
        """Every score of every metric."""
        return {name: value for metric in self.metrics for name, value in metric.compute().items()}

    def intervals(self, **options: Any) -> dict[str, Interval]:
        """The same with intervals; options of :func:`fastformer.evaluation.confidence_intervals`."""
        found = (confidence_intervals(metric, **options) for metric in self.metrics)
        return {name: interval for each in found for name, interval in each.items()}

    def by_slice(self, name: str, **options: Any) -> dict[str, tuple[int, dict[str, Interval]]]:
        """For each slice of the slicing ``name`` its number of examples and the headline score of each metric."""
        names, numbers = self.slices[name]
        table = {}
        for number, value in enumerate(names):
            chosen = np.flatnonzero(numbers == number)
            found = {}
            for metric in self.metrics:
                found[metric.headline] = confidence_intervals(metric, select=chosen, **options)[metric.headline]
            table[value] = (len(chosen), found)
        return table

    def compare(self, other: Evaluation | Mapping[str, float], name: str, **options: Any) -> list[Comparison]:
        """Significance of the difference to another evaluation of the same examples, or to published scores.

        Args:
            other: by headline score for an evaluation; by each score that is named for numbers.
            name: of the baseline.
            options: of :func:`fastformer.evaluation.compare`.

        Raises:
            ValueError: an evaluation of other examples, or in another order; a published score that no metric here has.
        """
        if isinstance(other, Evaluation):
            if other.references != self.references:
                raise ValueError(f"baseline {name}: its references are not the same ones in the same order")
            pairs = zip(self.metrics, other.metrics, strict=True)
            return [compare(ours, theirs, name=name, **options) for ours, theirs in pairs]
        owner = {score: metric for metric in self.metrics for score in metric.compute()}
        unknown = [score for score in other if score not in owner]
        if unknown:
            raise ValueError(f"baseline {name}: {unknown[0]!r} is not among the scores {', '.join(owner)}")
        return [compare(owner[score], value, name=name, score=score, **options) for score, value in other.items()]


def evaluate(
    model: Any,
    data: Iterable[Any],
    metrics: Metric | Sequence[Metric],
    *,
    predict: Callable[[Any, Iterable[Any]], Iterable[Record]] = classify,
    records: str | Path | None = None,
    slices: Mapping[str, Slice] | None = None,
    worst: int = 10,
    gather: Callable[[Any], list[Any]] | None = None,
) -> Evaluation:
    """Runs ``model`` over ``data`` and scores what it says.

    >>> evaluate(model, batches, Classification(["negative", "positive"]))
    >>> evaluate(model, pairs, [BLEU(), ChrF()], predict=partial(generate_texts, tokenizer=tokenizer))

    Args:
        data: batches or examples, whichever ``predict`` takes; read once.
        metrics: one or several, new ones; the first sorts the examples.
        predict: from model and data to records: :func:`classify`, or another function of predictions.py with its
            further arguments bound, or your own.
        records: a JSONL file for a line per example: prediction, reference, scores, slices. Written as they come, and
            in its place when all are there.
        slices: by name, from a record to the slice it belongs to: :func:`by_length`, :func:`by_label`, or your own.
        worst: how many of the worst examples to keep.
        gather: of processes that share the work (``Parallel.gather``), a value of each in order of rank. ``data`` are
            then this one's rows of every batch, as ``fastformer.data.EvaluationLoader`` gives them by rank, and each
            process counts the records of all, in the order of a single one. One of them may write ``records``.

    Raises:
        ValueError: no examples, or metrics that were used before.
    """
    metrics = [metrics] if isinstance(metrics, Metric) else list(metrics)
    if not metrics:
        raise ValueError("metrics: expected at least one")
    used = [metric.name for metric in metrics if len(metric)]
    if used:
        raise ValueError(f"metrics: {used[0]} has examples already; give a new one")
    begin = time.perf_counter()
    found = Evaluation(metrics)
    counter = _Counter(metrics, slices or {}, worst)
    stream: Iterable[Record] = predict(model, data)
    if gather is not None:
        stream = _in_turn(gather(list(stream)))
    if records is None:
        for record in stream:
            counter.add(record)
    else:
        found.records = Path(records)
        found.records.parent.mkdir(parents=True, exist_ok=True)
        with replaced(found.records) as temporary, temporary.open("w", encoding="utf-8") as file:
            for record in stream:
                file.write(json.dumps(counter.add(record), ensure_ascii=False, default=_plain) + "\n")
    for metric in metrics:
        metric.check()
    found.slices = {name: (list(names), np.asarray(numbers)) for name, (names, numbers) in counter.slices.items()}
    found.worst = [line for _, _, line in sorted(counter.heap, key=lambda entry: entry[:2], reverse=True)]
    found.references = counter.references.hexdigest()
    found.seconds = time.perf_counter() - begin
    return found


def read_records(path: str | Path, metrics: Metric | Sequence[Metric], **options: Any) -> Evaluation:
    """Scores the predictions in a file of records again, as a baseline or by other metrics.

    Raises:
        ValueError: a line that is no record; the message says which.
    """

    def lines(_model: Any, _data: Any) -> Iterable[Record]:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    content = json.loads(line)
                    yield Record(content.pop("prediction"), content.pop("reference"), content, content.get("loss"))
                except (ValueError, KeyError, AttributeError, TypeError) as error:
                    raise ValueError(f"{path}: line {number} is not a record with prediction and reference") from error

    return evaluate(None, (), metrics, predict=lines, **options)


def by_length(text: str = "text", edges: Sequence[int] = (10, 20, 40, 80, 160)) -> Slice:
    """Slices by the number of words of a field: ``"up to 10"``, ``"11 to 20"`` … ``"over 160"``."""
    if not edges or list(edges) != sorted(set(edges)):
        raise ValueError(f"edges: got {tuple(edges)}, expected rising numbers")

    def slice_of(record: Record) -> str:
        words = len(str(record.shown.get(text, "")).split())
        above = [edge for edge in edges if words > edge]
        if len(above) == len(edges):
            return f"over {edges[-1]}"
        return f"{above[-1] + 1} to {edges[len(above)]}" if above else f"up to {edges[0]}"

    return slice_of


def by_label(names: Sequence[str]) -> Slice:
    """Slices by the class of the reference."""
    return lambda record: names[record.reference]


def _in_turn(parts: Sequence[Sequence[Record]]) -> Iterable[Record]:
    """The first record of each, the second of each …; the later ones may have one less."""
    for row in itertools.zip_longest(*parts):
        yield from (record for record in row if record is not None)


class _Counter:
    """Gives each record to the metrics and slices, and keeps the worst."""

    def __init__(self, metrics: list[Metric], slices: Mapping[str, Slice], worst: int) -> None:
        self.metrics = metrics
        self.functions = slices
        self.slices: dict[str, tuple[dict[str, int], array]] = {name: ({}, array("i")) for name in slices}
        self.keep = worst
        self.count = 0
        self.references = hashlib.sha256()
        self.heap: list[tuple[tuple[float, float], int, dict[str, Any]]] = []  # the least bad on top

    def add(self, record: Record) -> dict[str, Any]:
        """Returns the line for the file."""
        scores = [metric.add(record.prediction, record.reference) for metric in self.metrics]
        reference = self.metrics[0].identity(record.reference)
        self.references.update(json.dumps(reference, default=_plain).encode() + b"\n")
        line = {"index": self.count, "prediction": record.prediction, "reference": record.reference}
        line["scores"] = {metric.name: _finite(score) for metric, score in zip(self.metrics, scores)}
        if record.loss is not None:
            line["loss"] = _finite(record.loss)
        for name, function in self.functions.items():
            names, numbers = self.slices[name]
            value = str(function(record))
            if names.setdefault(value, len(names)) >= MOST_SLICES:
                raise ValueError(f"slices: {name} has more than {MOST_SLICES} different values, such as {value!r}")
            numbers.append(names[value])
            line.setdefault("slices", {})[name] = value
        line = {**record.shown, **line}
        if self.keep and not math.isnan(scores[0]):
            bad = (scores[0] if self.metrics[0].lower_is_better else -scores[0], record.loss or 0.0)
            # Among equals the first; negated, as a heap gives up its smallest.
            push = heapq.heappush if len(self.heap) < self.keep else heapq.heappushpop
            push(self.heap, (bad, -self.count, line))
        self.count += 1
        return line


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _plain(value: Any) -> Any:
    """Arrays, tensors and numbers of other libraries as JSON."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
