"""Normalisation modules over :mod:`fastformer.functional`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class LayerNorm(torch.nn.LayerNorm):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the trailing dimensions, by the fused kernels.

    Constructor, initialisation and state_dict keys (``weight``, ``bias``) are those of ``torch.nn.LayerNorm``, of which
    this is a subclass. Statistics are accumulated in float32, in float64 for float64 input.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input ``(*, *normalized_shape)`` -> the same shape and dtype."""
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the trailing dimensions, by the fused kernels.

    Constructor, initialisation and state_dict keys (``weight``) are those of ``torch.nn.RMSNorm``, of which this is a
    subclass. The mean square is accumulated in float32, in float64 for float64 input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x ``(*, *normalized_shape)`` -> the same shape and dtype."""
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
