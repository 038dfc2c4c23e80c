"""A linear layer of a few rows, whose weight is read once and converted in registers: csrc/cpu/linear.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
FEATURES: frozenset[str] = frozenset()


def product(x: Tensor, weight: Tensor, start: Tensor | None, out: Tensor) -> bool:
    """x ``(*, K)`` times weight^T ``(N, K)`` plus start ``(N)``, ``(1, N)`` or ``(M, N)``, into out ``(*, N)``.

    ``out`` may be ``start``. False, and nothing done, where the tensors are not of one dtype, their shapes do not fit
    or they lie in memory as the kernel does not read them.
    """
    return _C.linear(x, weight, start, out)
