"""dropout(act(x + bias) * (up + up_bias)) by csrc/cuda/activation.cu; see backends/reference/activation.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ._call import DTYPES, empty, empty_like, library, on_device, stream

FEATURES = frozenset({"bias", "gate", "dropout"})
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


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
    with on_device(x):
        library().activation_forward(x, bias, up, up_bias, out, activation, dropout_p, seed, stream(x))
    return out


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
    dbias = empty(x, x.shape[-1]) if need_dbias else None
    dup_bias = empty(x, x.shape[-1]) if need_dup_bias else None
    kernels = library()
    with on_device(x):
        workspace = None
        if need_dbias or need_dup_bias:
            workspace = empty(x, kernels.activation_backward_workspace(x, dbias, dup_bias), dtype=torch.uint8)
        kernels.activation_backward(
            dout, x, bias, up, up_bias, dx, dup, dbias, dup_bias, out, activation, dropout_p, seed, workspace, stream(x)
        )
    return dx, dup, dbias, dup_bias
