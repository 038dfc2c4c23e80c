"""Measures of generative models: how close samples are to the data, how much of it they cover, what latents carry.

    frechet_distance      |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) (Heusel et al. 2017, arXiv:1706.08500, equation 6)
    precision_recall      shares of samples in the data's manifold, and the reverse (Kynkäänniemi et al. 2019,
                          arXiv:1904.06991, equation 2); density and coverage (Naeem et al. 2020, arXiv:2002.09797)
    classes_covered       classes that samples have a fair share in
    active_units          latents whose posterior mean moves with the input (Burda et al. 2016, arXiv:1509.00519, §5)
    distinct, self_bleu   of texts: variety (Li et al. 2016, arXiv:1510.03055; Zhu et al. 2018, arXiv:1802.01886)

Distances are in the features of :class:`FeatureNet`, a small network trained here to tell the classes apart: with no
weights of ImageNet they say nothing beside another paper's, and are for models measured by the same network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..extras import require

ACTIVE = 0.01  # variance of the posterior mean above which Burda et al. count a latent as used


class Manifold(NamedTuple):
    """Precision, recall, density and coverage, each about 1 for samples of the data's own distribution (precision and
    recall a little less)."""

    precision: float
    recall: float
    density: float
    coverage: float


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the Gaussians with the mean and covariance of features ``(N, F)`` and ``(M, F)``.

    Raises:
        ValueError: fewer than two rows, or features of different sizes.
    """
    return gaussian_frechet_distance(*_moments(a, b), *_moments(b, a))


def gaussian_frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Between N(mean_a, cov_a) and N(mean_b, cov_b), in float64.

    tr (A B)^½ is the sum of the roots of the eigenvalues of A^½ B A^½, which is symmetric and not negative.
    """
    mean_a, cov_a, mean_b, cov_b = (t.double() for t in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> Manifold:
    """Of features ``(N, F)`` and ``(M, F)``; a set's manifold is the balls around its points that reach their
    ``neighbours``-th neighbour in it.

    Raises:
        ValueError: no more than ``neighbours`` rows.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(f"neighbours: {neighbours}, of {len(real)} real and {len(generated)} generated rows")
    real, generated = real.double(), generated.double()
    radius_real, radius_generated = (torch.cdist(x, x).kthvalue(neighbours + 1, 1).values for x in (real, generated))
    distance = torch.cdist(real, generated)
    in_real, in_generated = distance <= radius_real[:, None], distance <= radius_generated[None]
    return Manifold(
        precision=float(in_real.any(0).double().mean()),
        recall=float(in_generated.any(1).double().mean()),
        density=float(in_real.double().sum(0).mean() / neighbours),
        coverage=float(in_real.any(1).double().mean()),
    )


def classes_covered(predicted: Tensor, num_classes: int, share: float = 0.2) -> int:
    """Classes that at least ``share`` of an equal part of the samples ``(N)`` are seen as."""
    return int((torch.bincount(predicted, minlength=num_classes) * num_classes >= share * len(predicted)).sum())


def active_units(latent_means: Tensor, threshold: float = ACTIVE) -> int:
    """Latents of the posterior means ``(N, latent_size)`` whose variance over the data is above ``threshold``."""
    return int((latent_means.double().var(0) > threshold).sum())


def distinct(texts: Sequence[Sequence[object]], n: int) -> float:
    """Different n-grams over n-grams, of texts as sequences of words or tokens; 0 where there are none."""
    grams = Counter(tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1))
    return len(grams) / max(1, sum(grams.values()))


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU of each text against all others, 0 … 100: the higher, the more they repeat each other."""
    if len(texts) < 2:
        raise ValueError(f"texts: got {len(texts)}, expected at least 2")
    bleu = require("sacrebleu", "self-BLEU", "eval").metrics.BLEU(effective_order=True)
    rest = ([*texts[:i], *texts[i + 1 :]] for i in range(len(texts)))
    return sum(bleu.sentence_score(text, others).score for text, others in zip(texts, rest)) / len(texts)


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def posterior_collapse(latent_means: Tensor, kl: Tensor) -> str:
    """What is wrong with a variational autoencoder whose decoder goes without z, or "".

    Args:
        latent_means: ``(N, latent_size)``.
        kl: ``(N, latent_size)``, of the posteriors from the prior in nats.
    """
    active, total = active_units(latent_means), float(kl.sum(-1).mean())
    if active and total >= 0.1:
        return ""
    return f"posterior collapse: {active} of {kl.shape[-1]} latents are active and the KL is {total:.3f} nats"


def mode_collapse(manifold: Manifold, covered: int, num_classes: int) -> str:
    """What is wrong with samples that show little of the data, or ""."""
    if manifold.coverage >= 0.1 and covered >= num_classes / 2:
        return ""
    share = f"{manifold.coverage:.0%} of the data and {covered} of its {num_classes} classes"
    return f"mode collapse: the samples cover {share}"


# ---- features --------------------------------------------------------------------------------------------------------


class FeatureNet(nn.Module):
    """Two convolutions and a hidden layer: ``(B, C, H, W)`` levels -> features ``(B, width)`` and logits."""

    def __init__(self, channels: int, side: int, levels: int, num_labels: int, width: int = 64) -> None:
        super().__init__()
        self.levels = levels
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, width, 3, stride=2 if side > 8 else 1, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(16 * width, width)
        self.head = nn.Linear(width, num_labels)

    def features(self, pixels: Tensor) -> Tensor:
        """Of the hidden layer, ``(B, width)``."""
        return F.relu(self.hidden(self.convolutions(pixels.float() / (self.levels - 1))))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of the classes."""
        return self.head(self.features(pixels))

    @torch.no_grad()
    def describe(self, pixels: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
        """Features ``(N, width)`` and likeliest classes ``(N)``."""
        features = torch.cat([self.features(part) for part in pixels.split(batch_size)])
        return features, self.head(features).argmax(-1)


def train_feature_net(
    pixels: Tensor, labels: Tensor, levels: int, *, epochs: int = 10, seed: int = 0, batch_size: int = 100
) -> FeatureNet:
    """A :class:`FeatureNet` that tells the classes ``labels`` (N) of ``pixels`` (N, C, H, W) apart, by Adam with the
    rate falling to 0. The same for a seed; the caller's random numbers are left as they are.

    Raises:
        ValueError: fewer than two classes.
    """
    if int(labels.min()) < 0 or int(labels.max()) < 1:
        raise ValueError("labels: features need images of two classes or more")
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(seed)
        net = FeatureNet(pixels.shape[1], pixels.shape[2], levels, int(labels.max()) + 1)
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        steps = epochs * (-(-len(pixels) // batch_size))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
        for _ in range(epochs):
            for chosen in torch.randperm(len(pixels)).split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(net(pixels[chosen]), labels[chosen]).backward()
                optimizer.step()
                schedule.step()
    return net.eval().requires_grad_(False)


def sample_scores(net: FeatureNet, real: Tensor, generated: Tensor, num_classes: int) -> dict[str, float]:
    """Fréchet distance, precision, recall, density, coverage and covered classes of ``generated`` images beside
    ``real`` ones, ``(N, C, H, W)`` levels each."""
    (features_real, _), (features, predicted) = net.describe(real), net.describe(generated)
    manifold = precision_recall(features_real, features)
    return {
        "frechet_distance": frechet_distance(features_real, features),
        **manifold._asdict(),
        "classes_covered": float(classes_covered(predicted, num_classes)),
    }


def _moments(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() != 2 or len(x) < 2 or x.shape[-1] != other.shape[-1]:
        raise ValueError(f"features: shapes {tuple(x.shape)}, {tuple(other.shape)}; expected (N, F), N at least 2")
    return x.double().mean(0), torch.cov(x.double().T).reshape(x.shape[1], x.shape[1])
