"""What every CPU backend file needs to call ``fastformer._C``: dtype codes, pointers and workspaces."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C

# The values of ff_dtype in csrc/include/fastformer.h.
DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
DTYPES = frozenset(DTYPE)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype kernels accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pointer(t: Tensor | None) -> int:
    """The address of a tensor's first element, 0 for None."""
    return 0 if t is None else t.data_ptr()


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


def workspace(size: int) -> Tensor:
    """``size`` bytes of uninitialised memory, from torch's allocator."""
    return torch.empty(size, dtype=torch.uint8)
