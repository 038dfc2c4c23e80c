"""Measures of samples against closed forms, and the two collapses: what fails them and what does not."""

import pytest
import torch

from fastformer.evaluation.generative import (
    Manifold,
    active_units,
    classes_covered,
    distinct,
    frechet_distance,
    gaussian_frechet_distance,
    mode_collapse,
    posterior_collapse,
    precision_recall,
    sample_scores,
    self_bleu,
    train_feature_net,
)


def points(count=400, shift=0.0, scale=1.0, seed=0):
    return shift + scale * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)).double()


def test_frechet_distance_of_gaussians():
    """Where covariances commute it is the distance of means and of roots; and the same Gaussian is at distance 0."""
    mean = torch.tensor([1.0, -2.0])
    a, b = torch.diag(torch.tensor([4.0, 9.0])), torch.diag(torch.tensor([1.0, 16.0]))
    assert gaussian_frechet_distance(mean, a, torch.zeros(2), b) == pytest.approx(5 + (2 - 1) ** 2 + (3 - 4) ** 2)
    turned = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert gaussian_frechet_distance(mean, turned, mean, turned) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(points(), points()) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(points(20000), points(20000, 1.0, 2.0, 1)) == pytest.approx(4 + 4, rel=0.03)


def test_frechet_distance_by_the_eigenvalues_of_the_product():
    """The other way to its last term, which is not symmetric: tr (A B)^½ by the eigenvalues of A B."""
    a, b = points(50) @ points(4, seed=3), points(60, 0.3, seed=1)
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * roots
    assert frechet_distance(a, b) == pytest.approx(float(distance), rel=1e-6)


def test_precision_and_recall():
    data = points(300)
    same = precision_recall(data, points(300, seed=1))
    assert min(same) > 0.6 and same.density < 1.4
    assert precision_recall(data, data) == Manifold(1.0, 1.0, pytest.approx(4 / 3, abs=0.01), 1.0)  # itself included
    assert precision_recall(data, points(300, 100.0)) == Manifold(0.0, 0.0, 0.0, 0.0)
    one = precision_recall(data, data[:1] + 1e-3 * points(300, seed=2))  # good samples, all alike
    assert one.precision == 1.0 and one.recall < 0.05 and one.coverage < 0.1
    wide = precision_recall(data, points(300, 0.0, 8.0, 1))  # bad samples everywhere
    assert wide.recall > 0.8 and wide.precision < 0.5


def test_mode_collapse_is_told():
    data = points(300)
    good, one = precision_recall(data, points(300, seed=1)), precision_recall(data, data[:1] + 1e-3 * points(300))
    assert mode_collapse(good, 10, 10) == ""
    assert "mode collapse" in mode_collapse(one, 10, 10) and "mode collapse" in mode_collapse(good, 3, 10)
    assert classes_covered(torch.tensor([0] * 97 + [1] * 3), 3) == 1
    assert classes_covered(torch.arange(100) % 3, 3) == 3


def test_posterior_collapse_is_told():
    means = torch.randn(100, 4) * torch.tensor([1.0, 1.0, 1e-3, 0.0])
    assert active_units(means) == 2
    assert posterior_collapse(means, torch.ones(100, 4)) == ""
    assert "0 of 4" in posterior_collapse(torch.zeros(100, 4), torch.zeros(100, 4))
    assert "posterior collapse" in posterior_collapse(means, torch.full((100, 4), 1e-3))


def test_variety_of_texts():
    assert distinct([["a", "b", "a"], ["a"]], 1) == 0.5 and distinct([["a", "b"], ["a", "b"]], 2) == 0.5
    assert distinct([["a"]], 2) == 0.0
    pytest.importorskip("sacrebleu", reason="self-BLEU is sacrebleu's")
    same, apart = self_bleu(["a b c d e"] * 3), self_bleu(["a b c d e", "f g h i j", "k l m n o"])
    assert same == pytest.approx(100) and apart < 1


def test_features_tell_classes_apart_and_repeat():
    labels = torch.arange(120) % 3
    pixels = torch.randint(3, (120, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for label in range(3):
        pixels[labels == label, :, 2 * label : 2 * label + 2] = 6
    state = torch.get_rng_state()
    nets = [train_feature_net(pixels, labels, 7, epochs=6, batch_size=20) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    (features, predicted), (again, _) = (net.describe(pixels) for net in nets)
    assert torch.equal(features, again) and (predicted == labels).float().mean() > 0.95
    good = sample_scores(nets[0], pixels[:60], pixels[60:], 3)
    collapsed = sample_scores(nets[0], pixels[:60], pixels[:1].expand(60, -1, -1, -1), 3)
    assert good["frechet_distance"] < collapsed["frechet_distance"] / 5
    assert good["classes_covered"] == 3 and collapsed["classes_covered"] == 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: frechet_distance(points(), points()[:, :2]), "features: shapes"),
        (lambda: precision_recall(points(3), points(9)), "neighbours: 3"),
        (lambda: self_bleu(["one"]), "texts: got 1"),
        (lambda: train_feature_net(torch.zeros(4, 1, 6, 6), torch.full((4,), -1), 2), "labels"),
    ],
)
def test_what_does_not_fit_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
