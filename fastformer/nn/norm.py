"""Normalisation modules over :mod:`fastformer.functional`, and what stands between two sublayers of a transformer:
dropout, residual addition and a norm, which are one kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout

from .. import functional
from .submodules import is_plain


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


def add_norm(
    norm: torch.nn.Module, delta: Tensor | None, residual: Tensor, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``(norm(summed), summed)`` with ``summed = residual + dropout(delta)``: one kernel unless ``norm`` has hooks.

    Args:
        norm: any module; a LayerNorm or RMSNorm without hooks, ours or torch's, is read.
        delta: a sublayer's output in the shape of ``residual``, or None: nothing to add.
        dropout_p: 0 where not training.
    """
    if delta is None:
        return norm(residual), residual
    if delta.dtype != residual.dtype:  # under autocast: half-precision matmuls beside a float32 residual stream
        dtype = torch.promote_types(delta.dtype, residual.dtype)
        delta, residual = delta.to(dtype), residual.to(dtype)
    if is_plain(norm, LayerNorm, torch.nn.LayerNorm):
        return functional.add_layer_norm(
            delta, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps, dropout_p=dropout_p
        )
    if is_plain(norm, RMSNorm, torch.nn.RMSNorm):
        return functional.add_rms_norm(
            delta, residual, norm.normalized_shape, norm.weight, norm.eps, dropout_p=dropout_p
        )
    summed = add_residual(delta, residual, dropout_p)
    return norm(summed), summed


def add_residual(delta: Tensor | None, residual: Tensor, dropout_p: float = 0.0) -> Tensor:
    """``residual + dropout(delta)``; ``delta`` None adds nothing."""
    return residual if delta is None else residual + dropout(delta, dropout_p)
