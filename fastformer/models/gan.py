"""A generative adversarial network of images (Goodfellow et al. 2014, arXiv:1406.2661) on transformer blocks.

    generator:      z -> mapping -> w;  one token for each cell of a coarse grid -> blocks -> a grid of twice the side
                    with a quarter of the width -> blocks -> … -> linear -> patches of pixels in (-1, 1)
    discriminator:  overlapping patches -> + positions -> blocks -> mean over patches -> score

Growing the grid by pixel shuffle is TransGAN's (Jiang et al. 2021, arXiv:2102.07074, §3.2); w is added before every
block (a shift, of what ViTGAN modulates norms with: Lee et al. 2021, arXiv:2107.04589, §3.3); overlapping patches are
ViTGAN's (§3.2). The discriminator also sees how much the images of a batch differ (Karras et al. 2018,
arXiv:1710.10196, §3), by which a generator of always the same image is told from the data at once.

What the two are trained to is in ``fastformer.training.generative_objectives``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import nn as torch_nn
from torch.nn import functional as F

from .. import nn
from .pixels import check_shape, encoder, from_patches
from .pretrained import PreTrainedConfig, PreTrainedModel


@dataclass
class TransformerGANConfig(PreTrainedConfig):
    """Images of ``num_channels`` × ``image_size`` × ``image_size`` pixels.

    The generator has ``stages`` of ``num_layers`` blocks; the first is ``d_model`` wide, each further one on a grid of
    twice the side with a quarter of the width, and the last writes patches of ``patch_size``. The discriminator has
    ``discriminator_layers`` blocks, ``discriminator_width`` wide, on patches of ``discriminator_patch`` that overlap
    by half on every side.
    """

    model_type: ClassVar[str] = "transformer_gan"

    image_size: int = 8
    num_channels: int = 1
    levels: int = 17
    latent_size: int = 32
    d_model: int = 128
    nhead: int = 4
    num_layers: int = 2
    stages: int = 2
    patch_size: int = 1
    discriminator_width: int = 64
    discriminator_layers: int = 3
    discriminator_patch: int = 2
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        shape = ("image_size", "num_channels", "latent_size", "d_model", "nhead", "num_layers", "stages", "patch_size")
        check_shape(self, *shape, "discriminator_width", "discriminator_layers", "discriminator_patch")
        coarsest = self.patch_size * 2 ** (self.stages - 1)
        if self.image_size % coarsest:
            raise ValueError(
                f"stages: {self.stages} with patches of {self.patch_size} make images of a multiple of {coarsest}, "
                f"image_size is {self.image_size}"
            )
        if self.d_model % (self.nhead * 4 ** (self.stages - 1)):
            raise ValueError(
                f"d_model: {self.d_model} is not a multiple of nhead * 4^(stages - 1) = "
                f"{self.nhead * 4 ** (self.stages - 1)}"
            )
        if self.discriminator_width % self.nhead:
            raise ValueError(f"discriminator_width: {self.discriminator_width} is not a multiple of nhead {self.nhead}")
        if self.image_size % self.discriminator_patch:
            raise ValueError(f"discriminator_patch: {self.discriminator_patch} does not divide {self.image_size}")
        if not 2 <= self.levels <= 256:
            raise ValueError(f"levels: {self.levels} is not in [2, 256]")


class Generator(torch_nn.Module):
    """Latents ``(B, latent_size)`` -> images ``(B, C, H, W)`` in (-1, 1)."""

    def __init__(self, config: TransformerGANConfig) -> None:
        super().__init__()
        self.config = config
        self.side = config.image_size // (config.patch_size * 2 ** (config.stages - 1))
        widths = [config.d_model // 4**i for i in range(config.stages)]
        self.mapping = torch_nn.Sequential(
            nn.Linear(config.latent_size, config.d_model), nn.GELU(), nn.Linear(config.d_model, config.d_model)
        )
        self.first = nn.Linear(config.latent_size, self.side**2 * config.d_model)
        self.positions = torch_nn.ModuleList(
            torch_nn.Embedding((self.side * 2**i) ** 2, width) for i, width in enumerate(widths)
        )
        self.styles = torch_nn.ModuleList(
            torch_nn.ModuleList(nn.Linear(config.d_model, width) for _ in range(config.num_layers)) for width in widths
        )
        self.blocks = torch_nn.ModuleList(
            encoder(width, config.nhead, config.num_layers, 0.0, final_norm=False) for width in widths
        )
        self.norm = nn.LayerNorm(widths[-1])
        self.to_pixels = nn.Linear(widths[-1], config.num_channels * config.patch_size**2)

    def forward(self, latents: Tensor) -> Tensor:
        config = self.config
        w = self.mapping(latents)
        x, side = self.first(latents).view(len(latents), self.side**2, config.d_model), self.side
        for stage, (positions, styles, blocks) in enumerate(zip(self.positions, self.styles, self.blocks)):
            if stage:
                grid = F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (side, side)), 2)
                x, side = grid.flatten(2).transpose(1, 2), 2 * side
            x = x + positions.weight
            for style, block in zip(styles, blocks.layers):
                x = block(x + style(w)[:, None])
        patches = self.to_pixels(self.norm(x))
        return torch.tanh(from_patches(patches, config.patch_size, config.num_channels, config.image_size)[..., 0])


class Discriminator(torch_nn.Module):
    """Images ``(B, C, H, W)`` in [-1, 1] -> scores ``(B)``, above 0 for real ones."""

    def __init__(self, config: TransformerGANConfig) -> None:
        super().__init__()
        width, patch = config.discriminator_width, config.discriminator_patch
        self.margin = patch // 2
        self.patches = torch_nn.Conv2d(config.num_channels, width, patch + 2 * self.margin, patch, self.margin)
        self.positions = torch_nn.Embedding((config.image_size // patch) ** 2, width)
        self.blocks = encoder(width, config.nhead, config.discriminator_layers, 0.0)
        self.score = torch_nn.Sequential(nn.Linear(width + 1, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions.weight
        features = self.blocks(x).mean(1)
        # A square root is steep at 0, where all images are the same.
        spread = (images.var(0, unbiased=False) + 1e-6).sqrt().mean().expand(len(images), 1)
        return self.score(torch.cat([features, spread], 1))[:, 0]


class TransformerGAN(PreTrainedModel):
    """``generator`` and ``discriminator``."""

    config_class = TransformerGANConfig
    base_model_prefix = "gan"

    def __init__(self, config: TransformerGANConfig) -> None:
        super().__init__(config)
        self.generator = Generator(config)
        self.discriminator = Discriminator(config)

    def forward(self, latents: Tensor) -> Tensor:
        """``(B, latent_size)`` -> images ``(B, C, H, W)`` in (-1, 1).

        Raises:
            ValueError: latents of another shape.
        """
        if latents.dim() != 2 or latents.shape[1] != self.config.latent_size:
            raise ValueError(f"latents: shape {tuple(latents.shape)} is not (B, {self.config.latent_size})")
        return self.generator(latents)

    @torch.no_grad()
    def sample(self, count: int, *, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Images of ``count`` latents from N(0, temperature²), ``(count, C, H, W)`` uint8."""
        if count < 1:
            raise ValueError(f"count: got {count}, expected at least 1")
        noise = torch.randn(count, self.config.latent_size, generator=generator, device=self.device)
        images = self(temperature * noise)
        return ((images + 1) * (self.config.levels - 1) / 2).round().to(torch.uint8)
