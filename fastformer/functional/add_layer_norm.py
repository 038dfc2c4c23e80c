"""Residual addition, dropout and layer normalisation in one pass: summed = residual + dropout(x); out = norm(summed).

Between two sublayers of a transformer PyTorch reads and writes the activations four times (dropout, add, norm); here
they are read once and written twice. The dropout mask is not stored: both directions derive it from a seed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import layer_norm

from ..backends.cpu import add_layer_norm as _cpu
from ._doors import needs_grad, new_seed, operator, through_operator
from ._norms import AddNorm, add_forward, check, check_residual, register_add_norm, row_shape, select_add
from ._small import eager_cpu, torch_instead, without_dropout


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """``summed = residual + dropout(x)`` and ``out = layer_norm(summed)``.

    Args:
        x: ``(*, *normalized_shape)``, the output of a sublayer; float32, bfloat16, float16 or (CPU) float64.
        residual: same shape and dtype, the stream it is added to.
        normalized_shape, weight, bias, eps: as in :func:`layer_norm`.
        dropout_p: probability of zeroing an element of ``x``; the rest is scaled by 1 / (1 - dropout_p).
        training: False switches dropout off.

    Returns:
        ``(out, summed)``, both in the shape and dtype of ``x``. A pre-norm block continues with ``summed`` as the
        residual stream. A post-norm block, ``out, _ = add_layer_norm(...)``, uses ``out`` only: backward reads
        ``summed`` in any case, and no gradient is made up for it. Without gradients it is one write that a norm which
        does not return the sum would not need.

    Raises:
        TypeError, ValueError: arguments that do not fit together, naming the argument.
    """
    if without_dropout(dropout_p, training) and eager_cpu(x):
        arguments = residual, normalized_shape, weight, bias, eps
        if needs_grad(x, residual, weight, bias):
            found = torch_instead("add_layer_norm", x, _separate, *arguments) if eps >= 0 else None
        else:
            found = _cpu.plain(x, *arguments)
        if found is not None:
            return found
    shape = row_shape(normalized_shape)
    check("x", x, shape, weight, bias, eps)
    check_residual(x, residual, dropout_p)
    p = float(dropout_p) if training else 0.0
    if through_operator(x, residual, weight, bias):
        seed_tensor = new_seed() if p > 0 else None
        return operator("add_layer_norm", x, residual, shape, weight, bias, eps, p, seed_tensor)[:2]
    seed = int(new_seed()) if p > 0 else 0
    kernels = select_add("add_layer_norm", x, p)
    if needs_grad(x, residual, weight, bias):
        return AddNorm.apply(x, residual, weight, bias, shape, eps, p, seed, kernels)
    return add_forward(kernels, x, residual, shape, weight, bias, eps, p, seed, statistics=False)[:2]


def _separate(x, residual, normalized_shape, weight, bias, eps):
    if residual.shape != x.shape or residual.dtype != x.dtype:  # they would be broadcast
        raise ValueError
    summed = residual + x
    return layer_norm(summed, normalized_shape, weight, bias, eps), summed


register_add_norm("add_layer_norm", ("mean", "rstd"))
