"""Accuracy, precision, recall and F1 beside scikit-learn, torchmetrics and counting by hand."""

import numpy as np
import pytest
import torch

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")

from fastformer.evaluation.classification import Classification

NAMES = ("red", "green", "blue", "grey")


def labels(classes, examples=300, right=0.6, seed=0):
    draw = np.random.default_rng(seed)
    actual = draw.integers(classes, size=examples)
    return np.where(draw.random(examples) < right, actual, draw.integers(classes, size=examples)), actual


def counted(metric, predicted, actual):
    for one, other in zip(predicted, actual):
        metric.add(one, other)
    return metric


def test_by_hand():
    """3 cats, of which 2 found; 2 dogs, one found: precision of cat 2/3, of dog 1/2."""
    metric = Classification(("cat", "dog"))
    assert [metric.add(p, a) for p, a in ((0, 0), (0, 0), (1, 0), (1, 1), (0, 1))] == [1, 1, 0, 1, 0]
    found = metric.compute()
    assert found["accuracy"] == found["F1 micro"] == pytest.approx(3 / 5)
    assert found["precision cat"] == found["recall cat"] == pytest.approx(2 / 3)
    assert found["precision dog"] == found["recall dog"] == pytest.approx(1 / 2)
    assert found["F1 macro"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metric.confusion_matrix().tolist() == [[2, 1], [1, 1]]


# never predicted: grey; not there at all: grey among three classes that are
@pytest.mark.parametrize("classes, drop", [(2, False), (4, False), (4, True), (3, True)])
def test_scores_of_sums_are_scikit_learn_s(classes, drop):
    names = NAMES[:classes] if classes != 3 else NAMES
    predicted, actual = labels(classes)
    if drop and classes == 4:
        predicted[predicted == 3] = 0
    metric = counted(Classification(names), predicted, actual)
    found = metric.compute()
    sums = metric.scores(metric.rows().sum(axis=0))
    assert list(sums) == list(found)
    for name, value in found.items():
        assert float(sums[name]) == pytest.approx(value, abs=1e-12), name
    for average in ("macro", "micro"):
        wanted = sklearn_metrics.f1_score(actual, predicted, average=average)
        assert found[f"F1 {average}"] == pytest.approx(wanted)


def test_torchmetrics_agrees():
    torchmetrics = pytest.importorskip("torchmetrics.functional", reason="torchmetrics is not installed")
    predicted, actual = labels(4)
    found = counted(Classification(NAMES), predicted, actual).compute()
    tensors = (torch.tensor(predicted), torch.tensor(actual))
    for what, function in (
        ("F1", torchmetrics.classification.multiclass_f1_score),
        ("precision", torchmetrics.classification.multiclass_precision),
        ("recall", torchmetrics.classification.multiclass_recall),
    ):
        assert found[f"{what} macro"] == pytest.approx(float(function(*tensors, 4, average="macro")), abs=1e-6)
        each = function(*tensors, 4, average="none").tolist()
        assert [found[f"{what} {name}"] for name in NAMES] == pytest.approx(each, abs=1e-6)


def test_tokens_and_what_is_not_scored():
    """Tokens of a sentence are one example of the bootstrap; -100 is none."""
    metric = Classification(NAMES[:2])
    assert metric.add([0, 1, 1, 0], [0, 1, 0, -100]) == pytest.approx(2 / 3)
    assert np.isnan(metric.add([0, 0], [-100, -100]))
    metric.add(torch.tensor([1]), torch.tensor([1]))
    assert len(metric) == 3 and metric.rows().shape == (3, 6)
    assert metric.rows()[1].sum() == 0
    assert metric.compute()["accuracy"] == pytest.approx(3 / 4)


def test_the_positive_class_comes_first():
    metric = counted(Classification(("ham", "spam"), positive="spam"), *labels(2))
    assert list(metric.compute())[:4] == ["F1 spam", "precision spam", "recall spam", "accuracy"]
    assert metric.headline == "F1 spam"


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    metric = counted(Classification(NAMES), *labels(4))
    path = metric.plot_confusion_matrix(tmp_path / "plots" / "confusion.png", title="colours")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    counts = metric.plot_confusion_matrix(tmp_path / "counts.png", normalise=False)
    assert counts.read_bytes() != path.read_bytes()


def test_bad_input():
    with pytest.raises(ValueError, match="names: got 1, expected two classes"):
        Classification(["only"])
    with pytest.raises(ValueError, match="names: every class needs its own"):
        Classification(["a", "a"])
    with pytest.raises(ValueError, match="positive: 'c' is not one of a, b"):
        Classification(["a", "b"], positive="c")
    metric = Classification(["a", "b"])
    with pytest.raises(ValueError, match="classification: no examples"):
        metric.compute()
    with pytest.raises(ValueError, match=r"prediction: class 2 is not in \[0, 2\)"):
        metric.add(2, 0)
    with pytest.raises(ValueError, match=r"prediction: shape \(2,\) is not the reference's \(1,\)"):
        metric.add([0, 1], 0)
    metric.add(0, 1)
    metric.add(1, 1)
    with pytest.raises(ValueError, match="the 2 examples are all of class 'b'"):
        metric.compute()
