"""A linear layer of a few rows, whose weight is read once and converted in registers: csrc/cpu/linear.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
FEATURES: frozenset[str] = frozenset()


def refusal(a: Tensor, b: Tensor, start: Tensor | None, out: Tensor) -> str | None:
    """Why the kernel cannot compute :func:`product` of tensors that lie as these do, or None."""
    if a.stride(1) != 1 or out.stride(1) != 1 or (start is not None and start.stride(-1) != 1):
        return "rows that are not contiguous"
    if 1 not in b.stride():
        return "a matrix without contiguous rows or columns"
    if start is not None and start.shape not in (out.shape, out.shape[1:], (1, out.shape[1])):
        return "a start that broadcasts along its rows"
    return None


def product(a: Tensor, b: Tensor, start: Tensor | None, out: Tensor) -> Tensor:
    """a ``(M, K)`` times b ``(K, N)`` plus start ``(M, N)``, ``(1, N)`` or ``(N)``, into out ``(M, N)``.

    ``out`` may be ``start``.
    """
    _C.linear(a, b, start, out)
    return out
