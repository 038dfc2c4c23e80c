"""What generative models are trained to, as objectives of the one trainer.

    vae_objective    the bound of :mod:`fastformer.models.latent`, with KL warm-up and free bits
    gan_objective    discriminator and generator in opposition, in one scalar
    image_gpt        the next pixel

The two losses of a GAN add up to one scalar whose backward gives each network its own gradient: the generator's term
sees the discriminator with its weights detached, the discriminator's term sees the images detached. So both move at
once, from the same point (simultaneous gradient descent, which converges with R1: Mescheder et al. 2018,
arXiv:1801.04406, §4), and accumulation, averaging, checkpoints and resuming are the trainer's for both.

R1 penalises the squared gradient of the discriminator at real images. Its own gradient would need the kernels' second
derivatives, which fused kernels do not have, whatever the backend. It is estimated from a difference instead,
E_v [((D(x + h v) - D(x - h v)) / 2h)²] = |grad D(x)|² + O(h²) for v ~ N(0, 1), which first derivatives are enough for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..data import Batch
from ..models.pixels import scaled
from .config import _check
from .objectives import Objective, unwrap

AUGMENTATIONS = ("color", "translation", "cutout")
R1_STEP = 1e-2  # of images in [-1, 1]: float32 still has five digits of the difference


@dataclass(frozen=True)
class VAESettings:
    """The bound that a variational autoencoder is trained on."""

    kl_weight: float = 1.0
    """Of the KL term, after the warm-up; 1 is the bound's, others are a beta-VAE's (Higgins et al. 2017)."""
    kl_warmup: int = 500
    """Batches over which that weight rises from 0."""
    free_bits: float = 0.05
    """Nats of KL that every latent has for nothing (Kingma et al. 2016, equation 15)."""

    def __post_init__(self) -> None:
        _check(
            "vae",
            self,
            ("kl_weight", "at least 0", self.kl_weight >= 0),
            ("kl_warmup", "at least 0", self.kl_warmup >= 0),
            ("free_bits", "at least 0", self.free_bits >= 0),
        )


@dataclass(frozen=True)
class GANSettings:
    """What generator and discriminator are trained to."""

    loss: Literal["non_saturating", "hinge"] = "non_saturating"
    """The pair of losses."""
    r1: float = 0.1
    """Weight of the squared gradient at real images (gamma of Mescheder et al. 2018, equation 9); 0: none. Larger
    images want more of it."""
    r1_every: int = 4
    """Batches between two of those, each with so much more weight (StyleGAN2, arXiv:1912.04958, appendix B)."""
    augment: tuple[str, ...] = ("translation", "cutout")
    """What is done to real and generated images alike: color, translation, cutout."""

    def __post_init__(self) -> None:
        _check(
            "gan",
            self,
            ("loss", f"one of {', '.join(GAN_LOSSES)}", self.loss in GAN_LOSSES),
            ("r1", "at least 0", self.r1 >= 0),
            ("r1_every", "at least 1", self.r1_every >= 1),
            ("augment", f"some of {', '.join(AUGMENTATIONS)}", set(self.augment) <= set(AUGMENTATIONS)),
        )


class Numbered:
    """Batches of ``loader`` with their number as ``_batch``, from 0, by which a schedule goes; exact on resuming."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.number = loader, 0

    def next_batch(self) -> Batch:
        """The next batch."""
        batch = {**self.loader.next_batch(), "_batch": self.number}
        self.number += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The loader's, and the number."""
        return {"loader": self.loader.state_dict(), "number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where ``state`` was taken."""
        self.loader.load_state_dict(state["loader"])
        self.number = state["number"]


# ---- variational autoencoders ----------------------------------------------------------------------------------------


def vae_objective(settings: VAESettings) -> Objective:
    """The negative bound in nats per pixel or token; on batches without a number, as in validation, it is the bound
    itself: weight 1, nothing free."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask") if name in batch}
        number = batch.get("_batch")
        if number is None:
            return model(**inputs).loss
        weight = settings.kl_weight * min(1.0, (number + 1) / max(1, settings.kl_warmup))
        return model(**inputs, kl_weight=weight, free_bits=settings.free_bits).loss

    return Objective(loss, _scored)


def _scored(batch: Batch) -> int:
    if "pixel_values" in batch:
        return batch["pixel_values"].numel()
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


# ---- autoregressive models of images ---------------------------------------------------------------------------------

image_gpt = Objective(lambda model, batch: model(batch["pixel_values"], batch.get("labels")).loss, _scored)
"""Nats per pixel."""


# ---- generative adversarial networks ---------------------------------------------------------------------------------


def non_saturating_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's, of its scores: -log s(D(x)) - log(1 - s(D(G(z)))) (Goodfellow et al. 2014, equation 1)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's, of its scores: max(0, 1 - D(x)) + max(0, 1 + D(G(z))) (Miyato et al. 2018,
    arXiv:1802.05957, equation 16)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


# name -> the discriminator's loss of scores of real and generated images, the generator's of the latter
GAN_LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "non_saturating": (non_saturating_loss, lambda fake: F.softplus(-fake).mean()),
    "hinge": (hinge_loss, lambda fake: -fake.mean()),
}


def gan_objective(settings: GANSettings) -> Objective:
    """Both networks' losses in one scalar, for a :class:`fastformer.models.TransformerGAN`, or any model with
    ``generator``, ``discriminator`` and the configuration's ``latent_size`` and ``levels``."""
    discriminator_loss, generator_loss = GAN_LOSSES[settings.loss]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        gan: Any = unwrap(model)
        real = scaled(batch["pixel_values"], gan.config.levels)
        latents = torch.randn(len(real), gan.config.latent_size, device=real.device)
        fake = augment(gan.generator(latents), settings.augment)
        weights = {name: p.detach() for name, p in gan.discriminator.named_parameters()}
        total = generator_loss(functional_call(gan.discriminator, weights, (fake,)))
        scores = gan.discriminator(augment(real, settings.augment)), gan.discriminator(fake.detach())
        total = total + discriminator_loss(*scores)
        if settings.r1 and batch.get("_batch", 0) % settings.r1_every == 0:
            penalty = r1_penalty(gan.discriminator, real)
            total = total + 0.5 * settings.r1 * settings.r1_every * penalty
        return total

    return Objective(loss, lambda batch: len(batch["pixel_values"]))


def r1_penalty(
    discriminator: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    step: float = R1_STEP,
    generator: torch.Generator | None = None,
) -> Tensor:
    """An estimate of the mean over images of |grad D(x)|² with one random direction each; float32 scalar."""
    with torch.autocast(images.device.type, enabled=False):
        direction = torch.randn(images.shape, generator=generator, device=images.device)
        ends = [discriminator(images.float() + side * step * direction) for side in (1, -1)]
        return ((ends[0] - ends[1]) / (2 * step)).square().mean()


def augment(images: Tensor, policy: tuple[str, ...]) -> Tensor:
    """Differentiable augmentation (Zhao et al. 2020, arXiv:2006.10738, §3.2), drawn anew for each image.

    Args:
        images: ``(B, C, H, W)`` in [-1, 1].
        policy: "color" (brightness by up to 0.5, saturation, contrast by up to half), "translation" (by up to an eighth
            of the side, black where nothing was), "cutout" (a square of half the side, black).
    """
    batch, _, height, width = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(batch, 1, 1, 1, device=images.device).uniform_(low, high)

    if "color" in policy:
        images = images + uniform(-0.5, 0.5)
        grey = images.mean(1, keepdim=True)
        images = (images - grey) * uniform(0.0, 2.0) + grey
        level = images.mean((1, 2, 3), keepdim=True)
        images = (images - level) * uniform(0.5, 1.5) + level
    rows, columns = (torch.arange(n, device=images.device) for n in (height, width))
    if "translation" in policy:
        dy, dx = (torch.randint(-(n // 8), n // 8 + 1, (batch, 1), device=images.device) for n in (height, width))
        padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
        y, x = ((at + d + 1).clamp(0, n + 1) for at, d, n in ((rows, dy, height), (columns, dx, width)))
        padded = padded.gather(2, y[:, None, :, None].expand(-1, images.shape[1], -1, width + 2))
        images = padded.gather(3, x[:, None, None, :].expand(-1, images.shape[1], height, -1))
    if "cutout" in policy:
        y, x = (torch.randint(0, n + 1, (batch, 1), device=images.device) for n in (height, width))
        inside = ((rows - y).abs() * 4 <= height)[:, None, :, None] & ((columns - x).abs() * 4 <= width)[:, None, None]
        images = images.masked_fill(inside, -1.0)
    return images
