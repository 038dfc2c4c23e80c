"""Residual addition, dropout and RMS normalisation in one pass: summed = residual + dropout(x); out = rms_norm(summed).

The block of Llama and T5, as add_layer_norm.py is that of GPT and BERT: x and the residual are read once, two tensors
are written, and both directions derive the dropout mask from a seed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..backends.cpu import add_rms_norm as _cpu
from ._doors import needs_grad, new_seed, operator, through_operator
from ._norms import AddNorm, add_forward, check, check_residual, register_add_norm, row_shape, select_add
from ._small import eager_cpu, without_dropout
from .rms_norm import default_eps


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """``summed = residual + dropout(x)`` and ``out = rms_norm(summed)``.

    Args:
        x: ``(*, *normalized_shape)``, the output of a sublayer; float32, bfloat16, float16 or (CPU) float64.
        residual: same shape and dtype, the stream it is added to.
        normalized_shape, weight, eps, bias: as in :func:`rms_norm`.
        dropout_p: probability of zeroing an element of ``x``; the rest is scaled by 1 / (1 - dropout_p).
        training: False switches dropout off.

    Returns:
        ``(out, summed)``, both in the shape and dtype of ``x``; which of them a block uses, and what the other costs,
        is as in :func:`add_layer_norm`.

    Raises:
        TypeError, ValueError: arguments that do not fit together, naming the argument.
    """
    if without_dropout(dropout_p, training) and eager_cpu(x) and not needs_grad(x, residual, weight, bias):
        found = _cpu.plain(x, residual, normalized_shape, weight, bias, default_eps(x.dtype) if eps is None else eps)
        if found is not None:
            return found
    shape = row_shape(normalized_shape)
    check("x", x, shape, weight, bias, 0.0 if eps is None else eps)
    check_residual(x, residual, dropout_p)
    if eps is None:
        eps = default_eps(x.dtype)
    p = float(dropout_p) if training else 0.0
    if through_operator(x, residual, weight, bias):
        seed_tensor = new_seed() if p > 0 else None
        return operator("add_rms_norm", x, residual, shape, weight, bias, eps, p, seed_tensor)[:2]
    seed = int(new_seed()) if p > 0 else 0
    kernels = select_add("add_rms_norm", x, p)
    if needs_grad(x, residual, weight, bias):
        return AddNorm.apply(x, residual, weight, bias, shape, eps, p, seed, kernels)
    return add_forward(kernels, x, residual, shape, weight, bias, eps, p, seed, statistics=False)[:2]


register_add_norm("add_rms_norm", ("rstd",))
