"""How a tensor lies in memory as the rows a kernel walks over."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def row_layout(x: Tensor) -> tuple[int, int, int]:
    """(rows, columns, elements between rows) of x ``(*, cols)``.

    x is contiguous, or two-dimensional with contiguous rows at any distance. Kernels take such tensors as they are: a
    view with two dimensions would cost a small call more than its arithmetic.
    """
    cols = x.shape[-1]
    if x.dim() == 2:
        return x.shape[0], cols, x.stride(0)
    return x.numel() // max(cols, 1), cols, cols


def as_matrix(x: Tensor) -> Tensor:
    """x ``(*, cols)``, laid out as for :func:`row_layout`, as a view ``(rows, cols)``."""
    return x if x.dim() == 2 else x.view(row_layout(x)[:2])


def dense_like(x: Tensor) -> Tensor:
    """An uninitialised tensor of x's shape and order of dimensions in memory, without gaps, its last contiguous."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def collapsed(
    tensors: Sequence[Tensor | None], shape: Sequence[int], keep_queries: bool = False
) -> tuple[list[Tensor | None], tuple[int, int, int]]:
    """Tensors that broadcast to ``shape`` ``(*, cols)``, as views ``(a, b, c, cols)`` with three leading dimensions.

    Neighbouring dimensions become one where the strides of every tensor allow it; a tensor is copied only where more
    than three are left. Its last stride is 0 (broadcast) or 1.

    Args:
        tensors: as many dimensions as ``shape``, each of size 1 or shape's; None stays None.
        keep_queries: leave the last leading dimension as it is.

    Returns:
        The views, and (a, b, c).
    """
    given = [None if t is None else (t if t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous()) for t in tensors]
    broadcast = [None if t is None else t.expand(shape) for t in given]
    present = [t for t in broadcast if t is not None]
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in present]
    for d, size in enumerate(shape[:-1]):
        last = keep_queries and d == len(shape) - 2
        if size == 1 and not last:
            continue
        of_d = [t.stride(d) for t in present]
        if sizes and not last and all(s[-1] == n * size for s, n in zip(strides, of_d)):
            sizes[-1] *= size
            for s, n in zip(strides, of_d):
                s[-1] = n
            continue
        sizes.append(size)
        for s, n in zip(strides, of_d):
            s.append(n)
    if len(sizes) > 3:
        return collapsed([None if t is None else t.contiguous() for t in broadcast], shape, keep_queries)
    missing = 3 - len(sizes)
    a, b, c = [1] * missing + sizes
    views: list[Tensor | None] = []
    for t in broadcast:
        if t is None:
            views.append(None)
            continue
        step = 0 if t.stride(-1) == 0 and shape[-1] > 1 else 1
        views.append(t.as_strided((a, b, c, shape[-1]), [0] * missing + strides.pop(0) + [step]))
    return views, (a, b, c)
