"""Accuracy, precision, recall and F1 of labels, and the table of what was taken for what.

    precision_c = tp_c / predicted_c,  recall_c = tp_c / actual_c,  F1_c = 2 tp_c / (predicted_c + actual_c)

Macro averages are means over the classes, micro ones come from the summed counts, with one label per example all equal
to accuracy. scikit-learn computes the scores of :meth:`Classification.compute`; the same formulas over counts give
resamples and slices. Kept is a pair of class numbers per example.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..extras import require
from ..models.pretrained import replaced
from .metric import Metric, ratio


class Classification(Metric):
    """One label of several for each example, or for each token of it.

    Args:
        names: of the classes 0 … C - 1.
        positive: class whose precision, recall and F1 come first, for two classes of which one is looked for; None puts
            accuracy first and averages over classes.
        ignore_index: references equal to it are not scored.

    Raises:
        ValueError: fewer than two classes, a name twice, or ``positive`` that is none of them.
    """

    name = "classification"

    def __init__(self, names: Sequence[str], *, positive: str | None = None, ignore_index: int = -100) -> None:
        super().__init__()
        self.names = tuple(str(name) for name in names)
        if len(self.names) < 2:
            raise ValueError(f"names: got {len(self.names)}, expected two classes or more")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"names: every class needs its own, got {', '.join(self.names)}")
        if positive is not None and positive not in self.names:
            raise ValueError(f"positive: {positive!r} is not one of {', '.join(self.names)}")
        self.positive = positive
        self.ignore_index = ignore_index
        self.columns = 3 * len(self.names)
        self._predictions = array("i")
        self._references = array("i")
        self._ends = array("q")  # of each example in the two above

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, prediction: int | Iterable[int], reference: int | Iterable[int]) -> float:
        """Class numbers of an example, or of its tokens; returns the share that is right (NaN where none is scored).

        Raises:
            ValueError: a class that does not exist, or lengths that differ.
        """
        predicted, actual = np.atleast_1d(np.asarray(prediction)), np.atleast_1d(np.asarray(reference))
        if predicted.shape != actual.shape or predicted.ndim != 1:
            raise ValueError(f"prediction: shape {predicted.shape} is not the reference's {actual.shape}")
        kept = actual != self.ignore_index
        predicted, actual = predicted[kept], actual[kept]
        for what, values in (("prediction", predicted), ("reference", actual)):
            if len(values) and not (0 <= values.min() and values.max() < len(self.names)):
                raise ValueError(f"{what}: class {values.max()} is not in [0, {len(self.names)})")
        self._predictions.extend(predicted.tolist())
        self._references.extend(actual.tolist())
        self._ends.append(len(self._references))
        return float(np.mean(predicted == actual)) if len(actual) else float("nan")

    def rows(self) -> np.ndarray:
        """Per example and class: how often right, predicted, actual; ``(N, 3 C)``."""
        classes, count = len(self.names), len(self)
        predicted, actual = self._arrays()
        example = np.repeat(np.arange(count), np.diff(np.asarray(self._ends), prepend=0))
        table = np.zeros((count, self.columns))
        np.add.at(table, (example[predicted == actual], actual[predicted == actual]), 1)
        np.add.at(table, (example, classes + predicted), 1)
        np.add.at(table, (example, 2 * classes + actual), 1)
        return table

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Accuracy, macro averages, then precision, recall and F1 of each class.

        A class that is never predicted has precision 0, as in scikit-learn; one that does not occur has recall 0, and
        is left out of the averages if it is not predicted either.
        """
        right, predicted, actual = np.split(np.asarray(sums, np.float64), 3, axis=-1)
        precision, recall, f1 = (
            np.nan_to_num(ratio(a, b))
            for a, b in ((right, predicted), (right, actual), (2 * right, predicted + actual))
        )
        present = (predicted + actual) > 0

        def macro(values: np.ndarray) -> np.ndarray:
            return ratio((values * present).sum(-1), present.sum(-1))

        accuracy = ratio(right.sum(-1), actual.sum(-1))
        found = {
            "accuracy": accuracy,
            "F1 macro": macro(f1),
            "F1 micro": accuracy,
            "precision macro": macro(precision),
            "recall macro": macro(recall),
        }
        of_class = {}
        for index, name in enumerate(self.names):
            for what, values in (("precision", precision), ("recall", recall), ("F1", f1)):
                of_class[f"{what} {name}"] = values[..., index]
        if self.positive is not None:
            first = {
                f"{what} {self.positive}": of_class[f"{what} {self.positive}"] for what in ("F1", "precision", "recall")
            }
            return {**first, **found, **of_class}
        return {**found, **of_class}

    def check(self) -> None:
        """Raises ValueError without examples, or where all references are of one class."""
        super().check()
        classes = np.unique(self._arrays()[1])
        if len(classes) < 2:
            what = f"all of class {self.names[classes[0]]!r}" if len(classes) else "all ignored"
            raise ValueError(
                f"reference: the {len(self)} examples are {what}; "
                "precision, recall and F1 compare classes and need two or more"
            )

    def compute(self) -> dict[str, float]:
        """The scores, by scikit-learn."""
        self.check()
        metrics = require("sklearn.metrics", "classification scores", "eval")
        predicted, actual = self._arrays()
        labels = np.arange(len(self.names))
        present = np.union1d(predicted, actual)
        options = {"y_true": actual, "y_pred": predicted, "zero_division": 0}
        macro = metrics.precision_recall_fscore_support(**options, labels=present, average="macro")
        each = metrics.precision_recall_fscore_support(**options, labels=labels, average=None)
        accuracy = metrics.accuracy_score(actual, predicted)
        found = {"accuracy": accuracy, "F1 micro": accuracy}
        for index, what in enumerate(("precision", "recall", "F1")):
            found[f"{what} macro"] = macro[index]
            found.update({f"{what} {name}": each[index][label] for label, name in enumerate(self.names)})
        return {name: float(found[name]) for name in self.scores(np.ones(self.columns))}

    def confusion_matrix(self) -> np.ndarray:
        """``(C, C)`` int64: examples (or tokens) of the class of the row that were taken for the column's."""
        metrics = require("sklearn.metrics", "the confusion matrix", "eval")
        predicted, actual = self._arrays()
        return metrics.confusion_matrix(actual, predicted, labels=np.arange(len(self.names)))

    def plot_confusion_matrix(self, path: str | Path, *, title: str = "", normalise: bool = True) -> Path:
        """A PNG of the confusion matrix, as shares of each row or as counts."""
        metrics = require("sklearn.metrics", "the confusion matrix", "eval")
        require("matplotlib", "plots", "eval")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        side = 2.8 + 0.45 * len(self.names)
        figure = Figure(figsize=(side + 0.8, side), dpi=144, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        matrix = self.confusion_matrix()
        if normalise:
            matrix = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        display = metrics.ConfusionMatrixDisplay(matrix, display_labels=self.names)
        display.plot(
            ax=axes,
            cmap="Blues",
            values_format=".2f" if normalise else "d",
            include_values=len(self.names) <= 16,
            xticks_rotation=0 if len(self.names) < 5 else 90,
        )
        axes.set_title(title, loc="left", fontsize=11)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
        return path

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self._predictions, dtype=np.int64), np.asarray(self._references, dtype=np.int64)
