"""RMS normalisation, out = x / sqrt(mean(x^2) + eps) * weight + bias (Zhang, Sennrich 2019, arXiv:1910.07467).

Forward saves only 1/sqrt(mean(x^2) + eps) of each row; backward recomputes the normalised values from the input in the
same pass that produces the gradients. The kernels are layer_norm's with the mean left out when they are compiled: one
statistic, one pass over the row less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import registry
from ..backends.cpu import rms_norm as _cpu
from ._doors import needs_grad, operator, through_operator
from ._norms import Norm, check, forward, register_norm, row_shape
from ._small import eager_cpu


def default_eps(dtype: torch.dtype) -> float:
    """What torch adds where ``eps`` is None: the epsilon of the type it computes in, not of the data's."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """Divides by the root of the mean square over the last dimensions; as ``torch.nn.functional.rms_norm``.

    Args:
        input: ``(*, *normalized_shape)``, float32, bfloat16, float16 or (CPU) float64, any strides.
        normalized_shape: the trailing dimensions that form a row.
        weight: ``normalized_shape`` or None, in input's dtype or float32.
        eps: added to the mean square. None = ``torch.finfo(torch.float32).eps``, for half precision as well, and
            float64's for float64 input.
        bias: as ``weight``, added at the end; torch has none.

    Returns:
        The shape and dtype of ``input``. The statistic is computed in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, naming the argument.
    """
    if eager_cpu(input) and not needs_grad(input, weight, bias):
        found = _cpu.plain(input, normalized_shape, weight, bias, default_eps(input.dtype) if eps is None else eps)
        if found is not None:
            return found
    shape = row_shape(normalized_shape)
    check("input", input, shape, weight, bias, 0.0 if eps is None else eps)
    if eps is None:
        eps = default_eps(input.dtype)
    if through_operator(input, weight, bias):
        return operator("rms_norm", input, shape, weight, bias, eps)[0]
    kernels = registry.select("rms_norm", input.device.type, input.dtype)
    if needs_grad(input, weight, bias):
        return Norm.apply(input, weight, bias, shape, eps, kernels)
    return forward(kernels, input, shape, weight, bias, eps, statistics=False)[0]


register_norm("rms_norm", ("rstd",))
