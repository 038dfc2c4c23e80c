"""dropout(act(x + bias) * (up + up_bias)) by csrc/cpu/activation.cpp; see backends/reference/activation.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ._call import DTYPES, empty_like

FEATURES = frozenset({"bias", "gate", "dropout"})
__all__ = ["DTYPES", "FEATURES", "backward", "forward", "plain"]


def forward(
    x: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    dropout_p: float = 0.0,
    seed: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """x, up (*, cols), bias, up_bias (cols) -> out (*, cols), a new tensor or the one given, which may be x or up."""
    if out is None:
        out = empty_like(x)
    _C.activation_forward(x, bias, up, up_bias, out, activation, dropout_p, seed)
    return out


def plain(x: Tensor, activation: str) -> Tensor | None:
    """act(x); None if anything about the call is unusual."""
    out = torch.empty_like(x)
    return out if _C.activation_plain(x, activation, out) else None


def backward(
    dout: Tensor,
    x: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    dropout_p: float = 0.0,
    seed: int = 0,
    need_dbias: bool = False,
    need_dup_bias: bool = False,
    dx: Tensor | None = None,
    dup: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dup (*, cols), dbias, dup_bias (cols)), None for those not needed."""
    if dx is None:
        dx = empty_like(x)
    if dup is None and up is not None:
        dup = empty_like(x)
    dbias = torch.empty(x.shape[-1], dtype=x.dtype) if need_dbias else None
    dup_bias = torch.empty(x.shape[-1], dtype=x.dtype) if need_dup_bias else None
    _C.activation_backward(dout, x, bias, up, up_bias, dx, dup, dbias, dup_bias, out, activation, dropout_p, seed)
    return dx, dup, dbias, dup_bias
