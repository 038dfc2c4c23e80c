"""Embedding over :func:`fastformer.functional.embedding`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class Embedding(torch.nn.Embedding):
    """A table looked up by index, with a gradient that repeats bit for bit.

    Constructor, ``from_pretrained``, initialisation and state_dict key (``weight``) are those of
    ``torch.nn.Embedding``, of which this is a subclass. ``max_norm``, ``scale_grad_by_freq`` and ``sparse`` run torch's
    own function.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input of any shape, int64 or int32 -> ``(*input.shape, embedding_dim)``."""
        return functional.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
