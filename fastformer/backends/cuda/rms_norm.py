"""RMS normalisation by csrc/cuda/rms_norm.cu; signatures as in backends/reference/rms_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _norm
from ._call import DTYPES, empty, empty_like, library, on_device, rows_of, stream

FEATURES: frozenset[str] = frozenset()
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, statistics: bool = True
) -> tuple[Tensor, Tensor]:
    """x (*, cols), weight and bias (cols) or None -> out (*, cols), rstd (rows)."""
    out, rstd = empty_like(x), empty(x, rows_of(x), dtype=torch.float32)
    with on_device(x):
        library().rms_norm_forward(x, weight, bias, out, None, rstd, eps, stream(x))
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
    return _norm.backward("rms_norm", dout, x, weight, None, rstd, need_dx, need_dweight, need_dbias, param_dtype)
