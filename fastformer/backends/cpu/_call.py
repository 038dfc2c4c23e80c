"""What the CPU backend's files share: dtypes, and memory for outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype kernels accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Blocks from here on come straight from the system, page by page as they are first written.
_HUGE_BYTES = 4 << 20


def on_huge_pages(t: Tensor) -> Tensor:
    """``t``, new and uninitialised, on huge pages where it is large: first touching small ones would cost more than the
    kernel that fills it."""
    if t.numel() > _HUGE_BYTES // 8 and (size := t.nbytes) >= _HUGE_BYTES:
        _C.advise_huge_pages(t.data_ptr(), size)
    return t


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of x's shape and dtype."""
    return on_huge_pages(torch.empty_like(x, memory_format=torch.contiguous_format))


def row_statistic(x: Tensor) -> Tensor:
    """Room for one number per row of x ``(*, cols)``."""
    return torch.empty(x.numel() // max(x.shape[-1], 1), dtype=acc_dtype(x.dtype))


def row_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the mean and 1 / standard deviation of each row of x ``(*, cols)``."""
    mean = row_statistic(x)
    return mean, torch.empty_like(mean)  # two allocations: an operator's outputs may not share memory
