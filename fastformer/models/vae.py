"""A variational autoencoder of images (Kingma & Welling 2014, arXiv:1312.6114) on transformer blocks.

    patches -> linear -> + positions -> encoder blocks -> mean over patches -> linear -> mean, log variance of q(z|x)
    z -> linear -> one vector for each patch -> decoder blocks -> linear -> distribution of each pixel (:mod:`.pixels`)

Given z the pixels are independent, so all of them are decoded at once; pixels are whole numbers, so the bound is one on
the length of a lossless code. The bounds themselves are in :mod:`.latent`; :mod:`.vae_text` is the form for text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import nn as torch_nn

from .. import nn
from .latent import LatentModel, VAEOutput, slerp
from .pixels import LIKELIHOODS, PixelDistribution, check_images, check_shape, encoder, from_patches, scaled, to_patches
from .pretrained import PreTrainedConfig


@dataclass
class TransformerVAEConfig(PreTrainedConfig):
    """Images of ``num_channels`` × ``image_size`` × ``image_size`` pixels in [0, levels).

    ``num_layers`` blocks, ``d_model`` wide, in the encoder and as many in the decoder. ``mixtures`` is for the
    likelihood "logistic".
    """

    model_type: ClassVar[str] = "transformer_vae"

    image_size: int = 8
    num_channels: int = 1
    levels: int = 17
    patch_size: int = 2
    latent_size: int = 16
    d_model: int = 64
    nhead: int = 4
    num_layers: int = 3
    dropout: float = 0.0
    likelihood: str = "categorical"
    mixtures: int = 3
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        sizes = (
            "image_size",
            "num_channels",
            "patch_size",
            "latent_size",
            "d_model",
            "nhead",
            "num_layers",
            "mixtures",
        )
        check_shape(self, *sizes)
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size: {self.patch_size} does not divide image_size {self.image_size}")
        if not 2 <= self.levels <= 256:
            raise ValueError(f"levels: {self.levels} is not in [2, 256]")
        if self.likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood: {self.likelihood!r} is none of {', '.join(LIKELIHOODS)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout} is not in [0, 1)")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def dims(self) -> int:
        """Numbers in an image."""
        return self.num_channels * self.image_size**2


class TransformerVAE(LatentModel):
    """Encoder and decoder of images.

    Parameters: ``patches``, ``positions``, ``encoder.layers.<i>`` and ``to_latent`` of q(z|x); ``from_latent``,
    ``decoder.layers.<i>`` and ``to_pixels`` of p(x|z).
    """

    config_class = TransformerVAEConfig
    base_model_prefix = "vae"

    def __init__(self, config: TransformerVAEConfig) -> None:
        super().__init__(config)
        self.pixels = PixelDistribution(config.likelihood, config.levels, config.mixtures)
        width, patch = config.d_model, config.num_channels * config.patch_size**2
        self.patches = nn.Linear(patch, width)
        self.positions = torch_nn.Embedding(config.num_patches, width)
        self.encoder = encoder(width, config.nhead, config.num_layers, config.dropout)
        self.to_latent = nn.Linear(width, 2 * config.latent_size)
        self.from_latent = nn.Linear(config.latent_size, config.num_patches * width)
        self.decoder = encoder(width, config.nhead, config.num_layers, config.dropout)
        self.to_pixels = nn.Linear(width, patch * self.pixels.num_parameters)

    def forward(self, pixel_values: Tensor, *, kl_weight: float = 1.0, free_bits: float = 0.0) -> VAEOutput:
        """One sample of the bound.

        Args:
            pixel_values: ``(B, C, H, W)``, whole numbers in [0, levels).
            kl_weight: of the KL term in the loss; 1 is the ELBO's.
            free_bits: nats of KL that each latent has for nothing.

        Raises:
            TypeError, ValueError: an argument that does not fit, naming it.
        """
        return self.bound({"pixel_values": pixel_values}, kl_weight, free_bits)

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, C, H, W)`` -> mean and log variance of q(z|x), ``(B, latent_size)`` each."""
        config = self.config
        check_images("pixel_values", pixel_values, config.num_channels, config.image_size, config.levels)
        patches = to_patches(scaled(pixel_values, config.levels), config.patch_size)
        hidden = self.encoder(self.patches(patches) + self.positions.weight)
        return self.posterior(self.to_latent(hidden.mean(1)))

    def decode(self, latents: Tensor) -> Tensor:
        """``(B, latent_size)`` -> parameters of each pixel's distribution, ``(B, C, H, W, P)``."""
        config = self.config
        if latents.dim() != 2 or latents.shape[1] != config.latent_size:
            raise ValueError(f"latents: shape {tuple(latents.shape)} is not (B, {config.latent_size})")
        hidden = self.from_latent(latents).view(len(latents), config.num_patches, config.d_model)
        return from_patches(
            self.to_pixels(self.decoder(hidden)), config.patch_size, config.num_channels, config.image_size
        )

    def log_likelihood(self, latents: Tensor, pixel_values: Tensor) -> Tensor:
        return self.pixels.log_prob(self.decode(latents), pixel_values).flatten(1).sum(1)

    def count(self, pixel_values: Tensor) -> int:
        return pixel_values.numel()

    @torch.no_grad()
    def sample(
        self, count: int, *, generator: torch.Generator | None = None, temperature: float = 1.0, draw: bool = False
    ) -> Tensor:
        """Images of latents from the prior, ``(count, C, H, W)`` uint8: pixels drawn from their distributions, or its
        middle."""
        return self._images(self.prior(count, generator, temperature), generator, draw)

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor) -> Tensor:
        """The images that the means of q(z|x) stand for, uint8."""
        return self._images(self.encode(pixel_values)[0])

    @torch.no_grad()
    def interpolate(self, a: Tensor, b: Tensor, steps: int = 8) -> Tensor:
        """From images ``a`` to images ``b`` ``(B, C, H, W)`` on the sphere: ``(B, steps, C, H, W)`` uint8."""
        if steps < 2:
            raise ValueError(f"steps: got {steps}, expected at least 2")
        ends = (self.encode(images)[0][:, None] for images in (a, b))
        path = slerp(*ends, torch.linspace(0, 1, steps, device=a.device)[:, None])
        return self._images(path.flatten(0, 1)).view(len(a), steps, *a.shape[1:])

    def _images(self, latents: Tensor, generator: torch.Generator | None = None, draw: bool = False) -> Tensor:
        parameters = self.decode(latents)
        return self.pixels.sample(parameters, generator) if draw else self.pixels.mean(parameters)
