"""GPT-2's own decoder for generation on a CPU: prompts through the model, then one kernel call per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import nn as torch_nn

from .. import nn
from ..backends.registry import overridden
from ..functional.decoder_step import DecoderLayer, DecoderStep, supported
from ..nn.submodules import is_plain
from .activations import FUSED_ACTIVATIONS
from .cache import KVCache
from .conv1d import Conv1D

if TYPE_CHECKING:
    from .gpt2 import GPT2LMHeadModel

PLAIN = (Conv1D, nn.LayerNorm, torch_nn.Embedding, torch_nn.Linear, nn.Linear, torch_nn.Dropout, torch_nn.ModuleList)


def fused_decoder(model: GPT2LMHeadModel, batch_size: int, max_length: int) -> FusedDecoder | None:
    """A :class:`FusedDecoder`, or None where the kernel does not cover the model as it is."""
    from . import gpt2

    if overridden() not in (None, "cpu"):
        return None
    if torch.is_autocast_enabled("cpu") or _activation(model) not in ("gelu", "gelu_tanh"):
        return None
    own = (gpt2.GPT2LMHeadModel, gpt2.GPT2Model, gpt2.GPT2Block, gpt2.GPT2Attention, gpt2.GPT2MLP)
    # Replaced layers (adapters, quantisation) and hooks have to run, not only be read.
    if not all(is_plain(module, *PLAIN, *own) for module in model.modules()):
        return None
    if supported(batch_size, list(model.parameters())):
        return None
    return FusedDecoder(model, max_length)


def _activation(model: GPT2LMHeadModel) -> str | None:
    return FUSED_ACTIVATIONS.get(model.config.activation_function)


class FusedDecoder:
    """:class:`fastformer.generation.Decoder` over :class:`fastformer.functional.decoder_step.DecoderStep`."""

    def __init__(self, model: GPT2LMHeadModel, max_length: int) -> None:
        self.model = model
        self.max_length = max_length

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, repeats: int = 1) -> Tensor:
        """Prompts ``(B, S)``, mask ``(B, S)`` 0 at left padding or None -> logits ``(B * repeats, V)``."""
        model = self.model
        batch, self.length = input_ids.shape
        self._prompt_length = self.length
        self._cache = cache = KVCache(model.config.n_layer, self.max_length)
        positions = start = None
        if attention_mask is not None:
            start = (attention_mask == 0).sum(1)
            positions = (attention_mask.cumsum(1) - 1).clamp_(min=0)
        logits = model(
            input_ids, cache, attention_mask, position_ids=positions, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        cache.repeat(repeats)
        self._start = start if start is None or repeats == 1 else start.repeat_interleave(repeats)
        self._positions = torch.full((batch * repeats,), self.length) if start is None else self.length - self._start
        self._step = self._build(cache)
        return logits if repeats == 1 else logits.repeat_interleave(repeats, 0)

    def step(self, token_ids: Tensor) -> Tensor:
        """Appends one token to each sequence, ``(B)``; logits ``(B, V)`` for the next."""
        logits = self._step(token_ids, self._positions, self.length, self._start)
        self.length += 1
        self._positions += 1
        return logits

    def reorder(self, indices: Tensor) -> None:
        """Replaces sequence i by sequence ``indices[i]``, one of the same prompt."""
        self._filled().reorder(indices, self._prompt_length)

    @property
    def past_key_values(self) -> KVCache:
        """The cache, without a limit to what may still be added."""
        self._filled().max_length = None
        return self._cache

    def _filled(self) -> KVCache:
        self._cache.lengths = [self.length] * len(self._cache)  # the kernel does not count
        return self._cache

    def _build(self, cache: KVCache) -> DecoderStep:
        model = self.model
        body = model.transformer
        layers, caches = [], []
        for block, keys, values in zip(body.h, cache.keys, cache.values, strict=True):
            assert keys is not None and values is not None
            parts = (block.ln_1, block.attn.c_attn, block.attn.c_proj, block.ln_2, block.mlp.c_fc, block.mlp.c_proj)
            layers.append(DecoderLayer(*(t for part in parts for t in (part.weight, part.bias))))
            caches.append((keys, values))
        return DecoderStep(
            layers,
            body.wte.weight,
            body.wpe.weight,
            body.ln_f.weight,
            body.ln_f.bias,
            model.lm_head.weight,
            caches,
            [block.attn.scale for block in body.h],
            model.config.layer_norm_epsilon,
            _activation(model) == "gelu_tanh",
        )
