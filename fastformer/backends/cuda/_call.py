"""What every CUDA backend file needs to call the extension: memory for outputs, the device, the current stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import library

__all__ = ["DTYPES", "empty", "empty_like", "library", "on_device", "row_statistics", "rows_of", "stream"]

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

_NOTHING: AbstractContextManager[None] = nullcontext()


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of x's shape, dtype and device."""
    return empty(x, *x.shape)


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor on ``like``'s device, of its dtype unless another is given."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def rows_of(x: Tensor) -> int:
    """Rows of x ``(*, cols)``."""
    return x.numel() // max(x.shape[-1], 1)


def row_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the mean and 1 / standard deviation of each row of x ``(*, cols)``."""
    rows = rows_of(x)
    return empty(x, rows, dtype=torch.float32), empty(x, rows, dtype=torch.float32)


def on_device(t: Tensor) -> AbstractContextManager[object]:
    """Makes ``t``'s GPU the current one, at no cost where it already is."""
    if t.device.type != "cuda" or t.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(t.device)


def stream(t: Tensor) -> int:
    """The cudaStream_t work on ``t`` is enqueued on; 0 for the emulator."""
    return torch.cuda.current_stream(t.device).cuda_stream if t.device.type == "cuda" else 0
