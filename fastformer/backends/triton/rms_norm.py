"""RMS normalisation: out = x * rstd * weight + bias per row, rstd = 1 / sqrt(mean(x^2) + eps), and its gradients.

With xhat = x * rstd, g = dout * weight and <.> the mean over a row:

    dx = rstd * (g - xhat * <g * xhat>),   dweight = sum over rows of dout * xhat,   dbias = sum of dout

These are layer_norm.py's formulas without a mean, and its kernels given none, with the same tiles: one reduction of a
row less in each direction.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import layer_norm
from .launch import DTYPES as DTYPES
from .launch import Configuration

FEATURES: frozenset[str] = frozenset()


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, statistics: bool = True
) -> tuple[Tensor, Tensor]:
    """x (*, cols), weight and bias (cols) or None -> out (*, cols), rstd (rows)."""
    out, _, _, rstd = layer_norm.run_forward(x, None, weight, bias, eps, None, centred=False)
    return out, rstd


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    param_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx in x's dtype, dweight and dbias in ``param_dtype``), None for those not needed."""
    needs = (need_dx, need_dweight, need_dbias)
    return layer_norm.run_backward(dout, None, x, weight, None, rstd, None, *needs, param_dtype)[1:]


def configurations() -> Iterator[Configuration]:
    """Every build of layer_norm's kernels without a mean."""
    return layer_norm.build_configurations("rms_norm", residual=False, dropout=False, centred=False)
