"""Argument checks shared by the public functions. Each message names the argument, what was given, what is accepted."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value: object) -> None:
    """``value`` is a tensor of one of :data:`DTYPES`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: dtype {value.dtype} is not one of float32, bfloat16, float16, float64")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """``value`` lies on the device of ``other``."""
    if value.device != other.device:
        raise ValueError(f"{name}: is on {value.device}, but {other_name} is on {other.device}")


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """``value`` has the dtype of ``other``."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: dtype {value.dtype} differs from {other_name}'s {other.dtype}")


def parameter(name: str, value: Tensor | None, shape: Sequence[int], like_name: str, like: Tensor) -> None:
    """``value`` is None, or has ``shape``, ``like``'s device, and its dtype or float32 beside half precision."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(value).__name__}")
    if value.shape != tuple(shape):
        raise ValueError(f"{name}: shape {tuple(value.shape)} is not {tuple(shape)}")
    if value.dtype != like.dtype and not (
        value.dtype == torch.float32 and like.dtype in (torch.bfloat16, torch.float16)
    ):
        raise TypeError(f"{name}: dtype {value.dtype} beside {like_name} of {like.dtype}; expected the same or float32")
    if value.device != like.device:
        raise ValueError(f"{name}: is on {value.device}, but {like_name} is on {like.device}")


def probability(name: str, value: float, *, closed: bool = True) -> None:
    """0 <= value <= 1 (or < 1)."""
    if not 0 <= value <= 1 or (not closed and value == 1):
        raise ValueError(f"{name}: {value} is not in [0, 1{']' if closed else ')'}")


def choice(name: str, value: str, accepted: Sequence[str]) -> None:
    """``value`` is one of ``accepted``; the error suggests the nearest."""
    if value not in accepted:
        near = difflib.get_close_matches(str(value), accepted, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, accepted))}{hint}")


def rowwise(x: Tensor, cols: int) -> Tensor:
    """``x`` as kernels take it (backends/layout.py): itself if it is contiguous, in rows of ``cols``, else as rows."""
    return x if x.is_contiguous() and x.dim() and x.shape[-1] == cols else as_rows(x, cols)


def as_rows(x: Tensor, cols: int) -> Tensor:
    """``x`` as (rows, cols) with a contiguous last dimension; a view where its strides allow."""
    if x.dim() != 2 or x.shape[1] != cols:
        x = x.reshape(-1, cols) if x.numel() else x.reshape(x.numel() // max(cols, 1), cols)
    if x.stride(1) != 1 and cols != 1:
        x = x.contiguous()
    return x
