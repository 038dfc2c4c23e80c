"""How sure a score is, and whether one system is better than another: resampling whole examples.

Confidence intervals (Efron and Tibshirani 1993, "An Introduction to the Bootstrap"): the corpus is drawn anew, N
examples with replacement, and scored, many times. ``"percentile"`` takes quantiles of those scores (chapter 13);
``"bca"`` moves the quantiles by the distribution's bias z0 and acceleration a (chapter 14, equations 14.9 to 14.15):

    alpha' = Phi(z0 + (z0 + z_alpha) / (1 - a (z0 + z_alpha)))

Significance of a difference on the same examples: paired bootstrap (Koehn 2004, "Statistical Significance Tests for
Machine Translation Evaluation") and approximate randomisation (Riezler and Maxwell 2005), both two-sided, the first
centred as sacrebleu does it. A p-value counts the observed difference as one of the draws, so it is never 0.

A resample is scored from sums of the examples' rows (metric.py): a product of counts with the rows, for all scores of
a metric at once. scipy.stats.bootstrap would call the statistic with the data itself, for one score at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..extras import require
from .metric import Metric

RESAMPLES = 1000
METHODS = ("percentile", "bca")
_CHUNK = 4_000_000  # counts at a time: 32 MB


@dataclass(frozen=True)
class Interval:
    """A score and the interval that holds it with the given confidence.

    ``low`` and ``high`` are NaN where there is none: one example says nothing of how much others differ.
    """

    score: float
    low: float
    high: float
    confidence: float = 0.95

    @property
    def range(self) -> str:
        """``[low, high]``, or a dash where there is none."""
        return "–" if math.isnan(self.low) else f"[{number(self.low)}, {number(self.high)}]"

    def __str__(self) -> str:
        return f"{number(self.score)} {self.range}"


@dataclass(frozen=True)
class Comparison:
    """``score`` of a system beside the ``baseline``'s, and how likely a difference so large is by chance.

    Attributes:
        difference: score - baseline, with its interval.
        paired_bootstrap: p-value, Koehn 2004.
        randomisation: p-value, Riezler and Maxwell 2005; NaN beside a baseline of which only the score is known.

    Of a single example there are neither intervals nor p-values: NaN.
    """

    metric: str
    baseline_name: str
    score: float
    baseline: float
    difference: Interval
    paired_bootstrap: float
    randomisation: float


def number(value: float) -> str:
    """Four significant digits, or two decimals for large numbers."""
    return f"{value:.2f}" if abs(value) >= 100 else f"{value:.4g}"


def confidence_intervals(
    metric: Metric,
    *,
    method: str = "percentile",
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    select: np.ndarray | None = None,
) -> dict[str, Interval]:
    """An interval for every score of ``metric``.

    Args:
        metric: with two examples or more; of one there are no intervals.
        method: ``"percentile"``, or ``"bca"``, closer to its confidence for skewed scores of few examples.
        confidence: in (0, 1).
        resamples: draws; the ends of a 95% interval need 1000.
        seed: the same seed gives the same interval.
        select: indices or a mask of the examples to take; None takes all.

    Raises:
        ValueError: an argument out of range, or a score that is undefined for these examples.
    """
    _check(method, confidence, resamples)
    metric.check()
    rows = metric.rows() if select is None else metric.rows()[select]
    if not len(rows):
        raise ValueError(f"select: takes none of the {len(metric)} examples")
    total = rows.sum(axis=0)
    points = metric.scores(total)
    if len(rows) == 1:
        return {name: Interval(float(point), np.nan, np.nan, confidence) for name, point in points.items()}
    drawn = metric.scores(np.concatenate(list(_resampled(rows, resamples, seed))))
    left_out = metric.scores(total - rows) if method == "bca" else None
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    intervals = {}
    for name, point in points.items():
        # A resample may leave a class out, whose own scores it then does not have.
        values = drawn[name][~np.isnan(drawn[name])]
        ends = (np.nan, np.nan)
        if len(values):
            shares = tails if left_out is None else _bca(tails, values, float(point), left_out[name])
            ends = np.quantile(values, shares)
        intervals[name] = Interval(float(point), float(ends[0]), float(ends[1]), confidence)
    return intervals


def compare(
    system: Metric,
    baseline: Metric | float,
    *,
    name: str = "baseline",
    score: str | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Whether ``system`` differs from ``baseline`` by more than chance.

    Args:
        system: a metric that was given one system's predictions.
        baseline: the same metric with another system's predictions for the same examples in the same order, or a
            published score, beside which only the system's own examples can be resampled.
        name: of the baseline.
        score: which of the metric's scores; None for the first.
        confidence, resamples, seed: as in :func:`confidence_intervals`.

    Raises:
        TypeError: baseline is neither of the two.
        ValueError: metrics that are not the same, or counted other examples.
    """
    _check("percentile", confidence, resamples)
    system.check()
    score = score or system.headline
    rows = system.rows()
    if score not in (known := system.scores(rows.sum(axis=0))):
        raise ValueError(f"score: {system.name} has no {score!r}, only {', '.join(known)}")

    def of(sums: np.ndarray) -> np.ndarray:
        return system.scores(sums)[score]

    width = rows.shape[1]
    if isinstance(baseline, Metric):
        baseline.check()
        if baseline.columns != system.columns or baseline.name != system.name:
            raise ValueError(f"baseline: is {baseline.name}, which cannot be compared with {system.name}")
        if baseline.signature != system.signature:
            raise ValueError(f"baseline: signature {baseline.signature!r} is not {system.signature!r}")
        if len(baseline) != len(system):
            raise ValueError(f"baseline: has {len(baseline)} examples, the system {len(system)}; give both the same")
        other = baseline.rows()
        theirs = float(of(other.sum(axis=0)))
        observed = float(of(rows.sum(axis=0))) - theirs
        pairs = np.concatenate(list(_resampled(np.hstack([rows, other]), resamples, seed)))
        differences = of(pairs[:, :width]) - of(pairs[:, width:])
        randomisation = _randomised(rows, other, of, observed, resamples, seed)
    elif isinstance(baseline, (int, float)) and not isinstance(baseline, bool):
        theirs = float(baseline)
        observed = float(of(rows.sum(axis=0))) - theirs
        differences = of(np.concatenate(list(_resampled(rows, resamples, seed)))) - theirs
        randomisation = float("nan")
    else:
        raise TypeError(f"baseline: expected a Metric or a number, got {type(baseline).__name__}")
    differences = differences[~np.isnan(differences)]
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    if len(rows) == 1:
        low = high = bootstrapped = randomisation = float("nan")
    else:
        # Under the null hypothesis the difference is 0 and scatters as the resampled one does around its mean.
        bootstrapped = _p_value(differences - differences.mean(), observed)
    return Comparison(
        metric=score,
        baseline_name=name,
        score=observed + theirs,
        baseline=theirs,
        difference=Interval(observed, float(low), float(high), confidence),
        paired_bootstrap=bootstrapped,
        randomisation=randomisation,
    )


def _resampled(rows: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Sums of rows ``(N, K)`` drawn with replacement, ``(chunk, K)`` at a time."""
    generator = np.random.default_rng(seed)
    count = len(rows)
    chunk = max(1, min(resamples, _CHUNK // count))
    for first in range(0, resamples, chunk):
        draws = min(chunk, resamples - first)
        chosen = generator.integers(count, size=(draws, count)) + np.arange(draws)[:, None] * count
        counts = np.bincount(chosen.ravel(), minlength=draws * count).reshape(draws, count)
        yield counts.astype(np.float64) @ rows


def _randomised(rows, other, score, observed: float, resamples: int, seed: int) -> float:
    """p-value of the difference, each pair of outputs exchanged or not by a coin."""
    generator = np.random.default_rng(seed)
    gap = rows - other
    ours, theirs = rows.sum(axis=0), other.sum(axis=0)
    chunk = max(1, min(resamples, _CHUNK // len(rows)))
    shuffled = []
    for first in range(0, resamples, chunk):
        exchanged = generator.random((min(chunk, resamples - first), len(rows))) < 0.5
        moved = exchanged.astype(np.float64) @ gap
        shuffled.append(score(ours - moved) - score(theirs + moved))
    return _p_value(np.concatenate(shuffled), observed)


def _p_value(differences: np.ndarray, observed: float) -> float:
    # A tie must count, also where the same sum was rounded in another order.
    reached = np.abs(differences) >= abs(observed) - 1e-12 * max(1.0, abs(observed))
    return float((1 + np.count_nonzero(reached)) / (1 + len(differences)))


def _bca(tails: np.ndarray, values: np.ndarray, point: float, left_out: np.ndarray) -> np.ndarray:
    """The shares of the distribution that correct ``tails`` for bias and acceleration."""
    special = require("scipy.special", "bias-corrected intervals", "eval")
    left_out = left_out[~np.isnan(left_out)]
    deviation = left_out.mean() - left_out
    spread = (deviation**2).sum() ** 1.5
    below = (np.mean(values < point) + np.mean(values <= point)) / 2
    if spread == 0 or not 0 < below < 1:  # all draws alike, or all on one side: nothing to correct by
        return tails
    acceleration = (deviation**3).sum() / (6 * spread)
    bias = special.ndtri(below)
    shifted = bias + special.ndtri(tails)
    return special.ndtr(bias + shifted / (1 - acceleration * shifted))


def _check(method: str, confidence: float, resamples: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence}, expected a number between 0 and 1")
    if resamples < 1:
        raise ValueError(f"resamples: got {resamples}, expected at least 1")
