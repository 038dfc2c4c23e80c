"""A variational autoencoder of short texts (Bowman et al. 2016, arXiv:1511.06349) with a GPT-2 for its decoder.

    tokens -> encoder blocks -> mean over tokens -> linear -> mean, log variance of q(z|x)
    z -> linear -> ``prefix`` vectors before the text, which every layer of a GPT-2 attends to (Li et al. 2020,
    arXiv:2004.04092, §3.2, "memory") -> tokens one after the other

A decoder that reads all words before the next has little need of z. Word dropout (Bowman et al., §3.2) hides some of
them during training, and free bits (:mod:`.latent`) make the rest of the pressure away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import nn as torch_nn

from .. import functional, nn
from .gpt2 import GPT2Config, GPT2LMHeadModel
from .inputs import check_indices
from .latent import LatentModel, VAEOutput, slerp
from .pixels import check_shape, encoder
from .pretrained import PreTrainedConfig


@dataclass
class TransformerTextVAEConfig(PreTrainedConfig):
    """Texts of at most ``max_length`` tokens, their end included.

    ``vocab_size`` counts the last three ids, which are no text: ``bos_token_id`` before a text, ``eos_token_id`` after
    it (and as padding), and ``mask_token_id`` in the place of a word that ``word_dropout`` hides.
    """

    model_type: ClassVar[str] = "transformer_text_vae"

    vocab_size: int = 103
    max_length: int = 64
    latent_size: int = 32
    d_model: int = 128
    nhead: int = 4
    num_layers: int = 2
    dropout: float = 0.0
    word_dropout: float = 0.3
    prefix: int = 4
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_shape(self, "vocab_size", "max_length", "latent_size", "d_model", "nhead", "num_layers", "prefix")
        if self.vocab_size < 4:
            raise ValueError(f"vocab_size: {self.vocab_size} leaves no token beside the three special ones")
        for name in ("dropout", "word_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not in [0, 1]")

    @property
    def bos_token_id(self) -> int:
        return self.vocab_size - 3

    @property
    def eos_token_id(self) -> int:
        return self.vocab_size - 2

    @property
    def mask_token_id(self) -> int:
        return self.vocab_size - 1


class TransformerTextVAE(LatentModel):
    """Encoder and decoder of texts.

    Parameters: ``tokens``, ``positions``, ``encoder.layers.<i>`` and ``to_latent`` of q(z|x); ``from_latent`` and
    ``decoder``, a :class:`GPT2LMHeadModel`, of p(x|z).
    """

    config_class = TransformerTextVAEConfig
    base_model_prefix = "vae"
    tied_weights: ClassVar[dict[str, str]] = {"decoder.lm_head.weight": "decoder.transformer.wte.weight"}

    def __init__(self, config: TransformerTextVAEConfig) -> None:
        super().__init__(config)
        width = config.d_model
        self.tokens = torch_nn.Embedding(config.vocab_size, width)
        self.positions = torch_nn.Embedding(config.max_length, width)
        self.encoder = encoder(width, config.nhead, config.num_layers, config.dropout)
        self.to_latent = nn.Linear(width, 2 * config.latent_size)
        self.from_latent = nn.Linear(config.latent_size, config.prefix * width)
        self.decoder = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.prefix + config.max_length + 1,
                n_embd=width,
                n_layer=config.num_layers,
                n_head=config.nhead,
                resid_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                attn_pdrop=0.0,
                bos_token_id=config.bos_token_id,
                eos_token_id=config.eos_token_id,
            )
        )

    def ties(self) -> dict[str, str]:
        return self.tied_weights

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        kl_weight: float = 1.0,
        free_bits: float = 0.0,
    ) -> VAEOutput:
        """One sample of the bound; words are hidden from the decoder in training mode only.

        Args:
            input_ids: ``(B, S)`` int64, each text with ``eos_token_id`` at its end, and padding on the right.
            attention_mask: ``(B, S)``, 0 at padding.
            kl_weight: of the KL term in the loss; 1 is the ELBO's.
            free_bits: nats of KL that each latent has for nothing.

        Raises:
            TypeError, ValueError: an argument that does not fit, naming it.
        """
        return self.bound({"input_ids": input_ids, "attention_mask": attention_mask}, kl_weight, free_bits)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(B, S)`` -> mean and log variance of q(z|x), ``(B, latent_size)`` each."""
        check_indices("input_ids", input_ids, self.config.vocab_size)
        length = input_ids.shape[1]
        if length > self.config.max_length:
            raise ValueError(f"input_ids: {length} tokens, the model has {self.config.max_length} (max_length)")
        real = _real(input_ids, attention_mask)
        hidden = self.tokens(input_ids) + self.positions.weight[:length]
        hidden = self.encoder(hidden, src_key_padding_mask=~real).masked_fill(~real[..., None], 0.0)
        return self.posterior(self.to_latent(hidden.sum(1) / real.sum(1, keepdim=True)))

    def log_likelihood(self, latents: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        config, real = self.config, _real(input_ids, attention_mask)
        read = torch.cat([torch.full_like(input_ids[:, :1], config.bos_token_id), input_ids[:, :-1]], 1)
        if self.training and config.word_dropout:
            hidden = torch.rand(read.shape, device=read.device) < config.word_dropout
            hidden[:, 0] = False
            read = read.masked_fill(hidden, config.mask_token_id)
        embedded = torch.cat([self._prefix(latents), self.decoder.transformer.wte(read)], 1)
        states = self.decoder.transformer(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits = self.decoder.lm_head(states[:, config.prefix :]).float()
        targets = input_ids.masked_fill(~real, -100)
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return -losses.view_as(targets).sum(1)

    def count(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor | int:
        return input_ids.numel() if attention_mask is None else attention_mask.sum()

    @torch.no_grad()
    def decode(
        self, latents: Tensor, *, do_sample: bool = False, generator: torch.Generator | None = None, **options: Any
    ) -> list[list[int]]:
        """The token ids of a text for each of the latents ``(B, latent_size)``, without special ones: the likeliest
        next token each time, or with ``do_sample`` as ``generate`` draws, whose options these are."""
        config = self.config
        cache = self.decoder.transformer(inputs_embeds=self._prefix(latents), use_cache=True).past_key_values
        # The tokens whose keys are in the cache already; what they are is not read.
        prompts = torch.full((len(latents), config.prefix + 1), config.bos_token_id, device=latents.device)

        def text_only(_: Tensor, scores: Tensor) -> Tensor:
            scores[:, [config.bos_token_id, config.mask_token_id]] = -torch.inf
            return scores

        written = self.decoder.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            past_key_values=cache,
            max_new_tokens=config.max_length,
            do_sample=do_sample,
            generator=generator,
            logits_processor=[text_only],
            pad_token_id=config.eos_token_id,
            **options,
        )
        rows = (row[config.prefix + 1 :] for row in written.tolist())
        return [row[: row.index(config.eos_token_id)] if config.eos_token_id in row else row for row in rows]

    def sample(
        self, count: int, *, generator: torch.Generator | None = None, temperature: float = 1.0, **options: Any
    ) -> list[list[int]]:
        """Token ids of ``count`` texts for latents from the prior, drawn at ``temperature``."""
        latents = self.prior(count, generator)
        return self.decode(latents, do_sample=True, generator=generator, temperature=temperature, **options)

    def reconstruct(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[list[int]]:
        """The texts that the means of q(z|x) stand for."""
        with torch.no_grad():
            return self.decode(self.encode(input_ids, attention_mask)[0])

    def interpolate(self, a: Tensor, b: Tensor, steps: int = 5) -> list[list[int]]:
        """From one text to another, ``(1, S)`` each, on the sphere."""
        if steps < 2:
            raise ValueError(f"steps: got {steps}, expected at least 2")
        with torch.no_grad():
            ends = (self.encode(ids)[0] for ids in (a, b))
            return self.decode(slerp(*ends, torch.linspace(0, 1, steps, device=a.device)[:, None]))

    def _prefix(self, latents: Tensor) -> Tensor:
        return self.from_latent(latents).view(len(latents), self.config.prefix, self.config.d_model)


def _real(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: shape {tuple(attention_mask.shape)} is not {tuple(input_ids.shape)}")
    return attention_mask != 0
