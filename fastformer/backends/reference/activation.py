"""dropout(act(x + bias) * (up + up_bias)) in plain PyTorch; ``up`` and everything else but x is optional.

act is relu, gelu (Hendrycks, Gimpel 2016), gelu_tanh or silu; with ``up`` these are the gated units of Shazeer 2020
(arXiv:2002.05202), x being the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layout import as_matrix
from .layer_norm import acc_dtype
from .philox import dropout_scales

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
FEATURES = frozenset({"bias", "gate", "dropout"})

_FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
_aten = torch.ops.aten
_GRADIENTS = {
    "relu": lambda d, z: _aten.threshold_backward(d, z, 0),
    "gelu": lambda d, z: _aten.gelu_backward(d, z),
    "gelu_tanh": lambda d, z: _aten.gelu_backward(d, z, approximate="tanh"),
    "silu": _aten.silu_backward,
}


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
    y, _, factor = _parts(x, bias, up, up_bias, activation, dropout_p, seed)
    result = (y if factor is None else y * factor).to(x.dtype)
    return result if out is None else out.copy_(result)


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
    """(dx, dup (*, cols), dbias, dup_bias (cols)), None for those not needed.

    dx and dup are new or the ones given, which may be x, up or dout; ``out``, if given, is computed once more.
    """
    acc = acc_dtype(x.dtype)
    y, z, factor = _parts(x, bias, up, up_bias, activation, dropout_p, seed)
    d = dout.to(acc)
    du = None
    if up is not None:
        du = d * y if dropout_p == 0 else d * y * _scales(x, dropout_p, seed)
    dz = _GRADIENTS[activation](d if factor is None else d * factor, z)
    if out is not None:
        out.copy_(y if factor is None else y * factor)
    dbias = as_matrix(dz).sum(0).to(x.dtype) if need_dbias else None
    dup_bias = as_matrix(du).sum(0).to(x.dtype) if need_dup_bias and du is not None else None
    return _result(dz, x, dx), None if du is None else _result(du, x, dup), dbias, dup_bias


def _parts(x, bias, up, up_bias, activation, dropout_p, seed):
    """(act(z), z, what act(z) is multiplied by or None)."""
    z = x.to(acc_dtype(x.dtype))
    if bias is not None:
        z = z + bias.to(z.dtype)
    factor = None
    if up is not None:
        factor = up.to(z.dtype)
        if up_bias is not None:
            factor = factor + up_bias.to(z.dtype)
    if dropout_p > 0:
        scales = _scales(x, dropout_p, seed)
        factor = scales if factor is None else factor * scales
    return _FUNCTIONS[activation](z), z, factor


def _scales(x: Tensor, p: float, seed: int) -> Tensor:
    rows, cols = as_matrix(x).shape if x.dim() else (1, 1)
    return dropout_scales(seed, rows, cols, p, x.device, acc_dtype(x.dtype)).view(x.shape)


def _result(value: Tensor, x: Tensor, given: Tensor | None) -> Tensor:
    value = value.to(x.dtype)
    return value if given is None else given.copy_(value)
