"""Matmuls, a b and start + a b: PyTorch's own, except for half precision and a few rows on a CPU.

Without instructions for it PyTorch multiplies bfloat16 and float16 element by element, five to a hundred times slower
than float32. There pieces of both operands are converted to float32, multiplied by the float32 matmul, added up in
float32 and rounded at the end, once. Converting a piece reads and writes each element once for the hundreds of products
it takes part in, a few percent beside them. The pieces of a thread are 24 MiB at most, kept from call to call, since
fresh memory would cost as much again to touch for the first time.

Where a has a few rows only, as when tokens are generated, reading b is all the work on any CPU, and csrc/cpu/linear.cpp
reads it once, converted in registers. float32 takes it as well, in functional.linear where no gradient is recorded.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from . import registry
from .memory import empty, empty_if_large, on_huge_pages

PIECE = 2 << 20
"""Elements of a converted piece at most."""
DEPTH = 2048
"""Of the products that are added up, so many are converted at a time."""


SMALL = 1 << 14
"""So few multiplications PyTorch has done, one by one, before this way has begun."""
HALF = frozenset({torch.bfloat16, torch.float16})
FEW_ROWS = dict.fromkeys((torch.float32, *HALF), 8)
"""Up to so many rows of a the kernel that reads b once multiplies, on any CPU."""
FEW_ROWS_FLOAT32_WEIGHT = 1 << 18
"""Elements of a float32 weight from which on the kernel is asked: the way to it takes longer than smaller products."""
FEW_ROWS_CONVERTED = 16
"""The same where b would have to be converted."""
FEW_ROWS_MULTIPLIED = 2
"""The same for half precision that the CPU itself multiplies, while b lies in the cache: from three rows on arithmetic
takes longer than reading it, and those instructions do more of it."""
CACHED = 1 << 24
"""Elements of half precision that may lie in the cache, 32 MiB."""


def _without_instructions() -> frozenset[torch.dtype]:
    found = []
    for dtype, name in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported")):
        supported = getattr(torch.ops.mkldnn, name, None)  # a build without oneDNN has neither
        if supported is None or not supported():
            found.append(dtype)
    return frozenset(found)


CONVERTED: frozenset[torch.dtype] = _without_instructions()
"""The dtypes whose products go through float32 on a CPU. Tests set it."""


def converts(t: Tensor) -> bool:
    """Whether products of ``t`` go through float32."""
    return t.dtype in CONVERTED and t.device.type == "cpu"


def few(rows: int, weight: Tensor) -> bool:
    """Whether CPU tensors have so few rows that the kernel for them is the faster one, and it is there."""
    dtype = weight.dtype
    most = FEW_ROWS_CONVERTED if dtype in CONVERTED else FEW_ROWS.get(dtype, 0)
    if rows > FEW_ROWS_MULTIPLIED and dtype in HALF and dtype not in CONVERTED and weight.numel() < CACHED:
        return False
    return rows <= most and _kernel() is not None


def of_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x ``(*, K)`` times weight^T plus bias by the kernel of few rows; None if these are more, or not for it."""
    if not few(x.shape[:-1].numel(), weight) or weight.dim() != 2:
        return None
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    kernel = _kernel()
    return out if kernel is not None and kernel.product(x, weight, bias, out) else None


@functools.cache
def _kernel() -> ModuleType | None:
    return None if registry.refusal("cpu", "linear", "cpu", torch.bfloat16, ()) else registry.load("cpu", "linear")


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a ``(M, K)`` times b ``(K, N)``, of any strides, into ``out`` if it is given."""
    if a.dtype in HALF and a.device.type == "cpu":
        return _half(a, b, out, None)
    return torch.mm(a, b, out=empty_if_large(a, a.shape[0], b.shape[1]) if out is None else out)


def addmm(start: Tensor, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """start, which broadcasts to ``(M, N)``, plus a ``(M, K)`` times b ``(K, N)``; ``out`` may be ``start``."""
    if a.dtype in HALF and a.device.type == "cpu":
        return _half(a, b, out, start)
    return torch.addmm(start, a, b, out=empty_if_large(a, a.shape[0], b.shape[1]) if out is None else out)


def weight_grad(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """dy^T x, from dy ``(M, N)`` and x ``(M, K)``: the gradient of w ``(N, K)``.

    In the orientation the weights have in memory, so that an optimizer (and a second accumulation) sees matching
    strides; GPT-2 passes transposed views.
    """
    return mm(dy.t(), x) if w.is_contiguous() else mm(x.t(), dy).t()


def _half(a: Tensor, b: Tensor, out: Tensor | None, start: Tensor | None) -> Tensor:
    if out is None:
        out = empty(a, a.shape[0], b.shape[1])
    kernel = _kernel() if few(len(a), b) else None
    if kernel is not None and kernel.product(a, b.t(), start, out):
        return out
    if a.dtype in CONVERTED and a.numel() * b.shape[1] > SMALL:
        return _product(a, b, out, start)
    return torch.mm(a, b, out=out) if start is None else torch.addmm(start, a, b, out=out)


# ---- through float32 -------------------------------------------------------------------------------------------------


class _Kept(threading.local):
    """Memory for the pieces of the left operand, the right one and the result, in each thread."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def piece(self, name: str, rows: int, cols: int) -> Tensor:
        kept = self.buffers.get(name)
        if kept is None or kept.numel() < rows * cols:
            with torch.inference_mode(False):  # it may be needed outside as well
                kept = on_huge_pages(torch.empty(rows * cols, dtype=torch.float32, device="cpu"))
            self.buffers[name] = kept
        return kept[: rows * cols].view(rows, cols)


_kept = _Kept()


class _Operand:
    """A matrix of which one piece at a time is held in float32, in the order the dimensions have in memory."""

    def __init__(self, name: str, matrix: Tensor) -> None:
        self.name, self.transposed = name, _transposed(matrix)
        self.matrix = matrix.t() if self.transposed else matrix
        self.held: tuple[slice, slice] | None = None
        self.wide = matrix

    def piece(self, rows: slice, cols: slice) -> Tensor:
        if self.held != (rows, cols):
            part = self.matrix[cols, rows] if self.transposed else self.matrix[rows, cols]
            wide = _kept.piece(self.name, *part.shape).copy_(part)
            self.held, self.wide = (rows, cols), wide.t() if self.transposed else wide
        return self.wide


def _product(a: Tensor, b: Tensor, out: Tensor, start: Tensor | None) -> Tensor:
    (height, depth), width = a.shape, b.shape[1]
    start = None if start is None else start.expand(height, width)
    if _transposed(out):  # the result's pieces are then written in rows
        _product(b.t(), a.t(), out.t(), None if start is None else start.t())
        return out
    if depth == 0:
        return out.zero_() if start is None else out.copy_(start)
    deep = _share(depth, DEPTH)
    wide = _share(width, PIECE // deep)
    high = _share(height, PIECE // max(deep, wide))
    left, right = _Operand("left", a), _Operand("right", b)
    for cols in _blocks(width, wide):
        for rows in _blocks(height, high):
            target = out[rows, cols]
            total = _kept.piece("result", *target.shape)
            if start is not None:
                total.copy_(start[rows, cols])
            for part in _blocks(depth, deep):
                begun = start is not None or part.start > 0
                total.addmm_(left.piece(rows, part), right.piece(part, cols), beta=1 if begun else 0)
            target.copy_(total)
    return out


def _transposed(t: Tensor) -> bool:
    return t.stride(0) < t.stride(1)


def _share(size: int, most: int) -> int:
    """The size of equal blocks of at most ``most``."""
    count = max(-(-size // most), 1)
    return -(-size // count)


def _blocks(size: int, block: int) -> Iterator[slice]:
    for begin in range(0, size, max(block, 1)):
        yield slice(begin, min(begin + block, size))
