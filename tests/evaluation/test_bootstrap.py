"""Intervals and p-values: they cover, they are scipy's, and under the null hypothesis they are uniform."""

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats", reason="scipy is not installed (pip install 'fastformer[eval]')")

from fastformer.evaluation.bootstrap import Interval, compare, confidence_intervals
from fastformer.evaluation.classification import Classification
from fastformer.evaluation.text import BLEU, Mean


def mean_of(values, name="share"):
    metric = Mean(name, lambda prediction, reference: prediction)
    for value in values:
        metric.add(value, None)
    return metric


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_a_95_percent_interval_covers_95_percent_of_the_time(method):
    """A binomial share of 0.7 of 80 examples, 400 corpora: 95 ± 3.3 percent (three standard deviations)."""
    draw = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        metric = mean_of((draw.random(80) < 0.7).tolist())
        interval = confidence_intervals(metric, method=method, resamples=400, seed=trial)["share"]
        covered += interval.low <= 0.7 <= interval.high
    assert 0.917 <= covered / 400 <= 0.985


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_the_same_interval_as_scipy(method):
    """Skewed values, where the two methods differ; two draws of 4000 resamples agree to a few percent of the width."""
    values = np.random.default_rng(1).exponential(size=60)
    ours = confidence_intervals(mean_of(values), method=method, resamples=4000)["share"]
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method=method, confidence_level=0.95, rng=np.random.default_rng(2)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.score == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.06 * width)


def test_bca_is_not_the_percentile_interval():
    values = np.random.default_rng(1).exponential(size=30) ** 2
    plain, corrected = (
        confidence_intervals(mean_of(values), method=m, resamples=2000)["share"] for m in ("percentile", "bca")
    )
    assert corrected.high > plain.high and corrected.low > plain.low  # a tail to the right


def test_corpus_scores_are_scored_as_a_corpus():
    """BLEU of a resample is that of its sentences together, not a mean; every score of a metric gets an interval."""
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    metric = BLEU()
    outputs = ["a b c d e", "a b x d e f g", "u v w x y z"]
    references = ["a b c d e", "a b c d e f g", "p q r s t u v"]
    for pair in zip(outputs, references):
        metric.add(*pair)
    interval = confidence_intervals(metric, resamples=300)["BLEU"]
    assert interval.score == pytest.approx(metric.compute()["BLEU"])
    possible = []
    for i in range(3):
        for j in range(3):
            for k in range(3):
                drawn = BLEU()
                for index in (i, j, k):
                    drawn.add(outputs[index], references[index])
                possible.append(drawn.compute()["BLEU"])
    assert interval.low == pytest.approx(min(possible), abs=1e-6)
    assert interval.high == pytest.approx(max(possible), abs=1e-6)


def test_seed_slices_and_equal_values():
    metric = mean_of(np.random.default_rng(3).random(50))
    first, again, other = (confidence_intervals(metric, seed=seed, resamples=200)["share"] for seed in (0, 0, 1))
    assert first == again != other
    part = confidence_intervals(metric, select=np.arange(50) < 20, resamples=200)["share"]
    assert part.score == pytest.approx(metric.rows()[:20, 0].mean())
    for method in ("percentile", "bca"):
        assert confidence_intervals(mean_of([2.0] * 5), method=method)["share"] == Interval(2.0, 2.0, 2.0)


def test_a_class_missing_from_a_resample():
    """One example of a class in thirty: a third of the resamples has none. No warning, and a finite interval."""
    metric = Classification(("a", "b"))
    for index in range(30):
        metric.add(index % 2, int(index == 3))
    interval = confidence_intervals(metric, method="bca", resamples=300)["F1 b"]
    assert 0 <= interval.low <= interval.score <= interval.high <= 1


def test_p_values_are_uniform_where_nothing_differs():
    """Two systems of the same quality, 300 times: 5 percent of the p-values are below 0.05, half below 0.5."""
    draw = np.random.default_rng(4)
    found = []
    for trial in range(300):
        difficulty = draw.normal(size=60)
        ours, theirs = (mean_of(difficulty + draw.normal(size=60)) for _ in range(2))
        found.append(compare(ours, theirs, resamples=199, seed=trial))
    for values in ([c.paired_bootstrap for c in found], [c.randomisation for c in found]):
        assert stats.kstest(values, "uniform").pvalue > 0.01
        assert 0.02 <= np.mean(np.array(values) <= 0.05) <= 0.09


def test_a_real_difference_is_found_and_pairs_matter():
    """A gain of a tenth of the spread between examples: certain where the examples are the same."""
    draw = np.random.default_rng(5)
    difficulty = draw.normal(size=200)
    ours, theirs = mean_of(difficulty + 0.1 + 0.05 * draw.normal(size=200)), mean_of(difficulty)
    found = compare(ours, theirs, name="before", resamples=999)
    assert found.paired_bootstrap == found.randomisation == pytest.approx(1 / 1000)
    assert found.difference.low > 0.08 and found.difference.high < 0.12
    assert (found.baseline_name, found.score - found.baseline) == ("before", pytest.approx(0.1, abs=0.02))
    # beside the bare number, the spread between examples is part of the doubt
    assert compare(ours, float(theirs.compute()["share"])).paired_bootstrap > 0.05


def test_randomisation_is_the_exact_permutation_test():
    """Eight pairs have 256 exchanges, all of which scipy can list."""
    draw = np.random.default_rng(6)
    a, b = draw.normal(size=8) + 0.6, draw.normal(size=8)
    exact = stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis),
        permutation_type="samples",
        vectorized=True,
    ).pvalue
    assert compare(mean_of(a), mean_of(b), resamples=20_000).randomisation == pytest.approx(exact, abs=0.012)


def test_other_scores_and_baselines():
    metric = Classification(("a", "b"))
    for index in range(100):
        metric.add(int(index % 5 == 0), index % 2)
    found = compare(metric, 0.99, score="recall b", name="published")
    assert found.metric == "recall b" and found.paired_bootstrap < 0.01 and np.isnan(found.randomisation)


def test_bad_input():
    metric = mean_of([1.0, 2.0])
    with pytest.raises(ValueError, match="method: got 'normal', expected one of percentile, bca"):
        confidence_intervals(metric, method="normal")
    with pytest.raises(ValueError, match=r"confidence: got 95"):
        confidence_intervals(metric, confidence=95)
    with pytest.raises(ValueError, match="resamples: got 0"):
        confidence_intervals(metric, resamples=0)
    with pytest.raises(ValueError, match="no examples were added"):
        confidence_intervals(mean_of([]))
    with pytest.raises(ValueError, match="select: takes none of the 2 examples"):
        confidence_intervals(metric, select=np.zeros(2, bool))
    with pytest.raises(ValueError, match="baseline: has 3 examples, the system 2"):
        compare(metric, mean_of([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="baseline: is other, which cannot be compared with share"):
        compare(metric, mean_of([1.0, 2.0], "other"))
    with pytest.raises(ValueError, match="score: share has no 'F1', only share"):
        compare(metric, 1.0, score="F1")
    with pytest.raises(TypeError, match="baseline: expected a Metric or a number, got str"):
        compare(metric, "0.9")


def test_of_one_example_there_is_no_interval():
    one, other = mean_of([0.5]), mean_of([0.25])
    for method in ("percentile", "bca"):
        assert str(confidence_intervals(one, method=method)["share"]) == "0.5 –"
    assert str(confidence_intervals(mean_of([0.5, 0.25]), select=np.array([1]))["share"]) == "0.25 –"
    for baseline in (other, 0.25):
        found = compare(one, baseline)
        assert str(found.difference) == "0.25 –"
        assert np.isnan([found.paired_bootstrap, found.randomisation]).all()
