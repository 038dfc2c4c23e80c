"""Layer normalisation by csrc/cuda/layer_norm.cu; signatures as in backends/reference/layer_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _norm
from ._call import DTYPES, empty_like, library, on_device, row_statistics, stream

FEATURES: frozenset[str] = frozenset()
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, statistics: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """x (*, cols), weight and bias (cols) or None -> out (*, cols), mean (rows), rstd (rows)."""
    out, (mean, rstd) = empty_like(x), row_statistics(x)
    with on_device(x):
        library().layer_norm_forward(x, weight, bias, out, mean, rstd, eps, stream(x))
    return out, mean, rstd


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    param_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx in x's dtype, dweight and dbias in ``param_dtype``), None for those not needed."""
    return _norm.backward("layer_norm", dout, x, weight, mean, rstd, need_dx, need_dweight, need_dbias, param_dtype)
