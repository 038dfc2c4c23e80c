"""Layer normalisation, out = (x - mean) / sqrt(var + eps) * weight + bias (Ba, Kiros, Hinton 2016, arXiv:1607.06450).

Forward saves only the mean and 1/sqrt(var + eps) of each row; backward recomputes the normalised values from the input
in the same pass that produces the gradients, so the op moves two tensors forward and three backward, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as TF

from ..backends import registry
from ..backends.cpu import layer_norm as _cpu
from ._doors import needs_grad, operator, through_operator
from ._norms import Norm, check, forward, register_norm, row_shape
from ._small import eager_cpu, torch_instead


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalises over the last dimensions; same arguments as ``torch.nn.functional.layer_norm``.

    Args:
        input: ``(*, *normalized_shape)``, float32, bfloat16, float16 or (CPU) float64, any strides.
        normalized_shape: the trailing dimensions that form a row.
        weight, bias: ``normalized_shape`` or None, in input's dtype or float32.
        eps: added to the variance.

    Returns:
        The shape and dtype of ``input``. Statistics are computed in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, naming the argument.
    """
    if eager_cpu(input):
        arguments = normalized_shape, weight, bias, eps
        if needs_grad(input, weight, bias):
            found = torch_instead("layer_norm", input, TF.layer_norm, *arguments) if eps >= 0 else None
        else:
            found = _cpu.plain(input, *arguments)
        if found is not None:
            return found
    shape = row_shape(normalized_shape)
    check("input", input, shape, weight, bias, eps)
    if through_operator(input, weight, bias):
        return operator("layer_norm", input, shape, weight, bias, eps)[0]
    kernels = registry.select("layer_norm", input.device.type, input.dtype)
    if needs_grad(input, weight, bias):
        return Norm.apply(input, weight, bias, shape, eps, kernels)
    return forward(kernels, input, shape, weight, bias, eps, statistics=False)[0]


register_norm("layer_norm", ("mean", "rstd"))
