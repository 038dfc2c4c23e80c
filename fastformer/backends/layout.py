"""How a tensor lies in memory as the rows a kernel walks over."""

from __future__ import annotations

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
