"""What the transformers are measured beside: a convolutional VAE, a DCGAN, and a Gaussian in principal components.

The first two are trained by the same trainer, objective, batches and steps as the transformer of their family, and have
about as many weights. The Gaussian is fitted in closed form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastformer.models import TransformerGAN, TransformerGANConfig, TransformerVAE, TransformerVAEConfig
from fastformer.models.pixels import bits_per_dim, check_images, scaled


class Crop(nn.Module):
    """The first ``side`` rows and columns."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.side, : self.side]


class ConvVAE(TransformerVAE):
    """Two convolutions that halve the side, a hidden layer, and the same backwards."""

    def __init__(self, config: TransformerVAEConfig) -> None:
        super().__init__(config)
        for name in ("patches", "positions", "encoder", "decoder", "to_pixels"):
            delattr(self, name)
        width, hidden = config.d_model, 4 * config.d_model
        read, side = config.image_size // 4, -(-config.image_size // 4)
        self.encoder = nn.Sequential(
            nn.Conv2d(config.num_channels, width // 2, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 4, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * read**2, hidden),
            nn.ReLU(),
        )
        self.to_latent = nn.Linear(hidden, 2 * config.latent_size)
        self.from_latent = nn.Linear(config.latent_size, hidden)
        self.decoder = nn.Sequential(
            nn.ReLU(),
            nn.Linear(hidden, width * side**2),
            nn.ReLU(),
            nn.Unflatten(1, (width, side, side)),
            nn.ConvTranspose2d(width, width // 2, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(width // 2, width // 2, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width // 2, config.num_channels * self.pixels.num_parameters, 3, 1, 1),
            Crop(config.image_size),
        )

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        check_images("pixel_values", pixel_values, config.num_channels, config.image_size, config.levels)
        return self.posterior(self.to_latent(self.encoder(scaled(pixel_values, config.levels))))

    def decode(self, latents: Tensor) -> Tensor:
        flat = self.decoder(self.from_latent(latents))
        return flat.unflatten(1, (self.config.num_channels, -1)).movedim(2, -1)


class DCGAN(TransformerGAN):
    """Radford et al. 2016, arXiv:1511.06434: strided convolutions, batch normalisation in the generator."""

    def __init__(self, config: TransformerGANConfig) -> None:
        super().__init__(config)
        width, channels = config.d_model, config.num_channels
        read, side = config.image_size // 4, -(-config.image_size // 4)

        def norm(size: int) -> nn.Module:  # by the batch when sampling too: the average weights have no statistics
            return nn.BatchNorm2d(size, track_running_stats=False)

        self.generator = nn.Sequential(
            nn.Linear(config.latent_size, width * side**2, bias=False),
            nn.Unflatten(1, (width, side, side)),
            norm(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width // 2, 4, 2, 1, bias=False),
            norm(width // 2),
            nn.ReLU(),
            nn.ConvTranspose2d(width // 2, width // 4, 4, 2, 1, bias=False),
            norm(width // 4),
            nn.ReLU(),
            nn.Conv2d(width // 4, channels, 3, 1, 1),
            Crop(config.image_size),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(channels, width // 4, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width // 4, width // 2, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(width // 2 * read**2, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
            nn.Flatten(0),
        )


class PCAGaussian:
    """Probabilistic principal components (Tipping & Bishop 1999): x ~ N(mean, W Wᵀ + noise I), by its maximum
    likelihood.

    Args:
        pixels: ``(N, C, H, W)`` uint8 to fit.
        levels: values of a pixel.
        components: columns of W.
    """

    def __init__(self, pixels: Tensor, levels: int, components: int) -> None:
        generator = torch.Generator().manual_seed(0)
        x = pixels.flatten(1).double()
        x = x + torch.rand(x.shape, generator=generator, dtype=torch.float64)  # a density has to be spread over a level
        self.shape, self.levels, self.components = pixels.shape[1:], levels, components
        self.mean = x.mean(0)
        values, self.vectors = torch.linalg.eigh(torch.cov(x.T))
        self.noise = values[:-components].mean()
        self.variances = torch.cat([self.noise.expand(len(values) - components), values[-components:]])

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Images ``(count, C, H, W)`` uint8, without the noise that is not in the components."""
        z = torch.randn(count, self.components, generator=generator, dtype=torch.float64)
        x = self.mean + z * self.variances[-self.components :].sqrt() @ self.vectors[:, -self.components :].T
        return x.floor().clamp(0, self.levels - 1).view(count, *self.shape).to(torch.uint8)

    def bits_per_dim(self, pixels: Tensor) -> float:
        """A bound on the code length: the density of pixels with uniform noise (Theis et al. 2016, equation 4)."""
        x = pixels.flatten(1).double()
        x = x + torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        whitened = ((x - self.mean) @ self.vectors).square() / self.variances
        log_density = -0.5 * (whitened + self.variances.log() + math.log(2 * math.pi)).sum(1)
        return bits_per_dim(-float(log_density.mean()), x.shape[1])
