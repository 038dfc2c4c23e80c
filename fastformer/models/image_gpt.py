"""An autoregressive model of images: a GPT-2 over pixels (Chen et al. 2020, "Generative Pretraining from Pixels").

    log p(x | y) = sum_i log p(x_i | x_1 … x_(i-1), y)

Pixels are tokens, row by row, the channels of a pixel one after the other; before them stands a token for the class, or
one that says nothing. The likelihood is exact, so its bits per dimension are those of a lossless code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import functional
from .gpt2 import GPT2Config, GPT2LMHeadModel
from .outputs import CausalLMOutputWithPast
from .pixels import check_images, check_shape
from .pretrained import PreTrainedConfig, PreTrainedModel


@dataclass
class ImageGPTConfig(PreTrainedConfig):
    """Images of ``num_channels`` × ``image_size`` × ``image_size`` pixels in [0, levels), of one of ``num_labels``
    classes, or 0 for images without."""

    model_type: ClassVar[str] = "fastformer_image_gpt"

    image_size: int = 8
    num_channels: int = 1
    levels: int = 17
    num_labels: int = 10
    d_model: int = 64
    nhead: int = 4
    num_layers: int = 4
    dropout: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_shape(self, "image_size", "num_channels", "levels", "d_model", "nhead", "num_layers")
        if self.levels < 2:
            raise ValueError(f"levels: {self.levels} is not 2 or more")
        if self.num_labels < 0:
            raise ValueError(f"num_labels: {self.num_labels} is negative")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout} is not in [0, 1)")

    @property
    def dims(self) -> int:
        """Numbers in an image."""
        return self.num_channels * self.image_size**2


class ImageGPT(PreTrainedModel):
    """``gpt2``, a :class:`GPT2LMHeadModel` whose tokens are the levels of a pixel, then the classes."""

    config_class = ImageGPTConfig
    base_model_prefix = "image_gpt"
    tied_weights: ClassVar[dict[str, str]] = {"gpt2.lm_head.weight": "gpt2.transformer.wte.weight"}

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__(config)
        self.gpt2 = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.levels + max(1, config.num_labels),
                n_positions=config.dims + 1,
                n_embd=config.d_model,
                n_layer=config.num_layers,
                n_head=config.nhead,
                resid_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                attn_pdrop=0.0,
                bos_token_id=config.levels,
                eos_token_id=None,
            )
        )

    def ties(self) -> dict[str, str]:
        return self.tied_weights

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> CausalLMOutputWithPast:
        """The loss, nats per pixel, and ``logits (B, dims, levels)``.

        Args:
            pixel_values: ``(B, C, H, W)``, whole numbers in [0, levels).
            labels: ``(B)`` int64, the class of each image, in [0, num_labels); not read by a model without classes.

        Raises:
            TypeError, ValueError: an argument that does not fit, naming it.
        """
        config = self.config
        check_images("pixel_values", pixel_values, config.num_channels, config.image_size, config.levels)
        pixels = pixel_values.permute(0, 2, 3, 1).flatten(1).long()
        read = torch.cat([self._first(len(pixels), labels), pixels[:, :-1]], 1)
        # The classes are no pixels: they have no part in the probabilities.
        logits = self.gpt2(read, use_cache=False).logits[..., : config.levels].float()
        loss = functional.cross_entropy(logits.flatten(0, 1), pixels.flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    @torch.no_grad()
    def log_prob(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p(x | y) of each image in nats, ``(B)``. Without ``labels``, of a model with classes, log p(x): the mean
        of p(x | y) over classes that are equally frequent."""
        config = self.config
        if labels is None and config.num_labels:
            classes = torch.arange(config.num_labels, device=pixel_values.device)
            each = [self.log_prob(pixel_values, y.expand(len(pixel_values))) for y in classes]
            return torch.logsumexp(torch.stack(each), 0) - math.log(config.num_labels)
        logits = self(pixel_values, labels).logits
        pixels = pixel_values.permute(0, 2, 3, 1).flatten(1).long()
        return logits.log_softmax(-1).gather(-1, pixels[..., None]).sum((1, 2))

    @torch.no_grad()
    def sample(
        self,
        count: int,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        **options: Any,
    ) -> Tensor:
        """``count`` images, pixel after pixel with a key/value cache, ``(count, C, H, W)`` uint8.

        Args:
            labels: ``(count)``, their classes; default each class in turn.
            temperature, options: of ``generate``.
        """
        config = self.config
        if count < 1:
            raise ValueError(f"count: got {count}, expected at least 1")
        if labels is None and config.num_labels:
            labels = torch.arange(count, device=self.device) % config.num_labels

        def pixels_only(_: Tensor, scores: Tensor) -> Tensor:
            scores[:, config.levels :] = -torch.inf
            return scores

        written = self.gpt2.generate(
            self._first(count, labels),
            max_new_tokens=config.dims,
            do_sample=True,
            generator=generator,
            temperature=temperature,
            logits_processor=[pixels_only],
            **options,
        )
        shape = (count, config.image_size, config.image_size, config.num_channels)
        return written[:, 1:].view(shape).permute(0, 3, 1, 2).to(torch.uint8)

    def _first(self, batch: int, labels: Tensor | None) -> Tensor:
        """The token before the pixels, ``(B, 1)``."""
        config = self.config
        if not config.num_labels:
            return torch.full((batch, 1), config.levels, device=self.device)
        if labels is None:
            raise ValueError(f"labels: needed, the model has {config.num_labels} classes")
        if labels.shape != (batch,) or labels.is_floating_point():
            raise ValueError(f"labels: expected integers of shape ({batch},), got {labels.dtype} {tuple(labels.shape)}")
        if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < config.num_labels:
            raise ValueError(f"labels: not all are in [0, {config.num_labels})")
        return labels[:, None] + config.levels
