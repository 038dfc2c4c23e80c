"""What variational autoencoders share: a Gaussian posterior, the bounds on log p(x), paths through the latent space.

    log p(x) >= E_q [log p(x|z)] - KL(q(z|x) || p(z))       ELBO (Kingma & Welling 2014, arXiv:1312.6114, equation 3)
    log p(x) >= E [log 1/K sum_k p(x, z_k) / q(z_k|x)]      importance-weighted (Burda et al. 2016, arXiv:1509.00519,
                                                            equation 8), tighter with every sample

Training minimises -E log p(x|z) + w sum_j max(free_bits, KL_j), with w rising from 0 (Bowman et al. 2016,
arXiv:1511.06349, §3.1) and KL_j of latent j averaged over the batch (Kingma et al. 2016, arXiv:1606.04934, equation
15): both keep the decoder from learning to do without z.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .outputs import ModelOutput
from .pretrained import PreTrainedModel

LOG_VARIANCE = 8.0  # largest absolute value


@dataclass
class VAEOutput(ModelOutput):
    """What a variational autoencoder returns.

    Attributes:
        loss: what is minimised, in nats per pixel or token.
        bound: the negative ELBO of each sample in nats, ``(B)``.
        log_likelihood: ``log p(x|z)`` of each sample, ``(B)``.
        kl: of each sample and latent, ``(B, latent_size)``.
        latent_mean, latent_log_variance: of q(z|x), ``(B, latent_size)``.
    """

    loss: Tensor | None = None
    bound: Tensor | None = None
    log_likelihood: Tensor | None = None
    kl: Tensor | None = None
    latent_mean: Tensor | None = None
    latent_log_variance: Tensor | None = None


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of each number (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation between rows (White 2016, arXiv:1609.04468): every point about as far from 0 as a draw.

    Args:
        a, b: ``(*, L)``.
        t: shares of ``b``, broadcast against ``(*, 1)``.
    """
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)[..., None].clamp(-1 + 1e-6, 1 - 1e-6)
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


class LatentModel(PreTrainedModel):
    """A decoder p(x|z), an encoder q(z|x), and p(z) = N(0, 1). What is encoded is given under its name in a batch."""

    @abstractmethod
    def encode(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z|x), ``(B, latent_size)`` each."""

    @abstractmethod
    def log_likelihood(self, latents: Tensor, **inputs: Any) -> Tensor:
        """log p(x|z) in nats, ``(B)``, float32."""

    @abstractmethod
    def count(self, **inputs: Any) -> Tensor | int:
        """Pixels or tokens that are scored."""

    def posterior(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, 2 latent_size)`` as mean and log variance, float32."""
        mean, log_variance = hidden.float().chunk(2, -1)
        return mean, LOG_VARIANCE * torch.tanh(log_variance / LOG_VARIANCE)

    def bound(self, inputs: dict[str, Any], kl_weight: float = 1.0, free_bits: float = 0.0) -> VAEOutput:
        """One sample of the bound, with its gradient by reparametrisation (Kingma & Welling 2014, equation 10).

        Raises:
            ValueError: kl_weight or free_bits below 0.
        """
        if kl_weight < 0 or free_bits < 0:
            raise ValueError(f"kl_weight, free_bits: got {kl_weight} and {free_bits}, expected at least 0")
        mean, log_variance = self.encode(**inputs)
        latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        log_likelihood = self.log_likelihood(latents, **inputs)
        kl = gaussian_kl(mean, log_variance)
        charged = kl.mean(0).clamp(min=free_bits).sum() * len(mean)
        return VAEOutput(
            loss=(kl_weight * charged - log_likelihood.sum()) / self.count(**inputs),
            bound=kl.sum(-1) - log_likelihood,
            log_likelihood=log_likelihood,
            kl=kl,
            latent_mean=mean,
            latent_log_variance=log_variance,
        )

    @torch.no_grad()
    def log_weights(self, samples: int = 1, generator: torch.Generator | None = None, **inputs: Any) -> Tensor:
        """log p(x, z) - log q(z|x) for ``samples`` draws of z from q(z|x), ``(B, samples)``."""
        mean, log_variance = self.encode(**inputs)
        columns = []
        for _ in range(samples):
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
            latents = mean + noise * (0.5 * log_variance).exp()
            ratio = 0.5 * (noise.square() + log_variance - latents.square()).sum(-1)
            columns.append(self.log_likelihood(latents, **inputs) + ratio)
        return torch.stack(columns, -1)

    def prior(self, count: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """``count`` latents from N(0, temperature²), ``(count, latent_size)``."""
        if count < 1:
            raise ValueError(f"count: got {count}, expected at least 1")
        return temperature * torch.randn(count, self.config.latent_size, generator=generator, device=self.device)


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """The bound of K samples on log p(x) from their log weights ``(B, K)``; ``(B)`` in nats."""
    return torch.logsumexp(log_weights, -1) - math.log(log_weights.shape[-1])
