"""Distributions over pixels that are whole numbers, so that a likelihood is one of a lossless code; and patches.

categorical   a probability for every level (van den Oord et al. 2016, arXiv:1601.06759, §3)
logistic      a mixture of logistic densities, each level the mass between its neighbours' midpoints, the first and
              the last with all that lies beyond (Salimans et al. 2017, arXiv:1701.05517, equation 2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn as torch_nn
from torch.nn import functional as F

from .. import nn

LIKELIHOODS = ("categorical", "logistic")
LOWEST_LOG_SCALE = -7.0  # narrower than a level of 256 by far; beyond it gradients only grow


@dataclass(frozen=True)
class PixelDistribution:
    """A family of distributions over 0 … levels - 1, with ``num_parameters`` numbers for each pixel.

    Args:
        likelihood: one of ``LIKELIHOODS``.
        levels: values of a pixel.
        mixtures: logistic densities in the mixture.
    """

    likelihood: str
    levels: int
    mixtures: int = 1

    @property
    def num_parameters(self) -> int:
        return self.levels if self.likelihood == "categorical" else 3 * self.mixtures

    def log_prob(self, parameters: Tensor, pixels: Tensor) -> Tensor:
        """log P of pixels ``(*)`` in [0, levels) under parameters ``(*, num_parameters)``, float32 ``(*)``."""
        parameters = parameters.float()
        if self.likelihood == "categorical":
            return parameters.log_softmax(-1).gather(-1, pixels.long()[..., None])[..., 0]
        weights, centre, log_scale = self._mixture(parameters)
        half = 1.0 / (self.levels - 1)  # of the distance of two levels, which lie in [-1, 1]
        x = scaled(pixels, self.levels)[..., None] - centre
        above, below = (x + half) * torch.exp(-log_scale), (x - half) * torch.exp(-log_scale)
        # s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)), of which no factor cancels.
        inside = F.logsigmoid(above) + F.logsigmoid(-below) + torch.log(-torch.expm1(below - above))
        first, last = (pixels == 0)[..., None], (pixels == self.levels - 1)[..., None]
        log_mass = torch.where(first, F.logsigmoid(above), torch.where(last, F.logsigmoid(-below), inside))
        return torch.logsumexp(weights + log_mass, -1)

    def mean(self, parameters: Tensor) -> Tensor:
        """A pixel in the middle of the distribution, uint8 ``(*)``."""
        parameters = parameters.float()
        if self.likelihood == "categorical":
            levels = torch.arange(self.levels, device=parameters.device, dtype=parameters.dtype)
            return (parameters.softmax(-1) * levels).sum(-1).round().to(torch.uint8)
        weights, centre, _ = self._mixture(parameters)
        return self._level((weights.exp() * centre.clamp(-1, 1)).sum(-1))

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A pixel drawn from the distribution, uint8 ``(*)``."""
        parameters = parameters.float()
        weights = parameters if self.likelihood == "categorical" else self._mixture(parameters)[0]
        probabilities = weights.softmax(-1).flatten(0, -2)
        chosen = torch.multinomial(probabilities, 1, generator=generator).view(parameters.shape[:-1])
        if self.likelihood == "categorical":
            return chosen.to(torch.uint8)
        _, centre, log_scale = (t.gather(-1, chosen[..., None])[..., 0] for t in self._mixture(parameters))
        u = torch.rand(centre.shape, generator=generator, device=centre.device).clamp(1e-5, 1 - 1e-5)
        return self._level(centre + log_scale.exp() * torch.logit(u))

    def _mixture(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log weights, centres and log scales, ``(*, mixtures)`` each."""
        weights, centre, log_scale = parameters.chunk(3, -1)
        # Scales begin at about a tenth of the range.
        return weights.log_softmax(-1), centre, (log_scale - 2.0).clamp(min=LOWEST_LOG_SCALE)

    def _level(self, x: Tensor) -> Tensor:
        return ((x.clamp(-1, 1) + 1) * (self.levels - 1) / 2).round().to(torch.uint8)


def scaled(pixels: Tensor, levels: int) -> Tensor:
    """Levels as numbers from -1 to 1, float32."""
    return pixels.float() * (2.0 / (levels - 1)) - 1.0


def to_patches(images: Tensor, size: int) -> Tensor:
    """``(B, C, H, W)`` -> ``(B, H W / size², C size²)``, row by row."""
    b, c, h, w = images.shape
    tiles = images.view(b, c, h // size, size, w // size, size)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * size * size)


def from_patches(patches: Tensor, size: int, channels: int, side: int) -> Tensor:
    """The inverse: ``(B, N, channels size² P)`` -> ``(B, channels, side, side, P)``, with P numbers for a pixel."""
    count = side // size
    tiles = patches.view(len(patches), count, count, channels, size, size, -1)
    return tiles.permute(0, 3, 1, 4, 2, 5, 6).reshape(len(patches), channels, side, side, -1)


def encoder(
    d_model: int, nhead: int, num_layers: int, dropout: float, final_norm: bool = True
) -> nn.TransformerEncoder:
    """A pre-norm stack of :class:`fastformer.nn.TransformerEncoderLayer`, every layer with weights of its own."""
    layer = nn.TransformerEncoderLayer(d_model, nhead, 4 * d_model, dropout, "gelu", batch_first=True, norm_first=True)
    norm = nn.LayerNorm(d_model) if final_norm else None
    stack = nn.TransformerEncoder(layer, num_layers, norm, enable_nested_tensor=False)
    for parameter in stack.parameters():  # torch's stack begins with copies of one layer
        if parameter.dim() > 1:
            torch_nn.init.xavier_uniform_(parameter)
    return stack


def check_images(name: str, pixels: Tensor, channels: int, side: int, levels: int) -> None:
    """Raises unless ``pixels`` are whole numbers ``(B, channels, side, side)`` in [0, levels)."""
    if not isinstance(pixels, Tensor) or pixels.is_floating_point():
        raise TypeError(f"{name}: expected integer levels (uint8), got {getattr(pixels, 'dtype', type(pixels))}")
    if pixels.dim() != 4 or pixels.shape[1:] != (channels, side, side):
        raise ValueError(f"{name}: shape {tuple(pixels.shape)} is not (B, {channels}, {side}, {side})")
    if pixels.device.type == "cpu" and pixels.numel() and not 0 <= int(pixels.min()) <= int(pixels.max()) < levels:
        raise ValueError(f"{name}: values from {int(pixels.min())} to {int(pixels.max())} are not in [0, {levels})")


def check_shape(config: object, *names: str) -> None:
    """Raises ValueError for the first field of ``names`` that is no positive integer, and for heads that do not divide
    the width."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {value!r} is not a positive integer")
    if config.d_model % config.nhead:  # type: ignore[attr-defined]
        raise ValueError(f"nhead: {config.nhead} does not divide d_model {config.d_model}")  # type: ignore[attr-defined]


def bits_per_dim(nats: float, dims: int = 1) -> float:
    """Negative log-likelihood in nats of ``dims`` numbers -> bits for each of them."""
    return nats / (dims * math.log(2.0))
