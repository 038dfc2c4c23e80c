"""linear_cross_entropy over chunks of rows, for the backends that never hold all logits.

For each chunk, in one buffer:

    logits = x w^T + b                                    the library's matmul
    loss, lse and dlogits, written over the logits        one kernel
    dx = dlogits w,  dw += dlogits^T x,  db += sum(dlogits)     the library's matmuls

A gradient that is written in the forward pass needs three products where a backward pass of its own would need four.

The chunks are a quarter of the rows. PyTorch holds three tables of rows x classes at its peak (log-probabilities and
two gradients), so this is a twelfth of it at any size; and a half-precision dw is rounded four times on its way: the
partial sums of a quarter, a half and three quarters of the rows are smaller than the whole, so together that is less
than three roundings of the result, where the product of all rows has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHUNKS = 4
MIN_ROWS = 64
"""Fewer rows leave a matmul waiting for the weight."""
MAX_ROWS = 1024
"""Where sums keep their digits (float32, float64), more rows only take more memory."""


def chunk_rows(rows: int, dtype: torch.dtype) -> int:
    """How many rows to take at a time."""
    quarter = max(-(-rows // CHUNKS), min(rows, MIN_ROWS))
    return min(quarter, MAX_ROWS) if dtype.itemsize >= 4 else quarter


class Products:
    """The matmuls around the logits of a chunk, in the dtype of the inputs.

    x is (rows, features), w (classes, features), bias (classes) or None; ``needs`` says which of their gradients are
    wanted.
    """

    def __init__(
        self, x: Tensor, w: Tensor, bias: Tensor | None, needs: Sequence[bool] = (False, False, False)
    ) -> None:
        self.x, self.w, self.bias = x, w, bias
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        # In the strides of w (which may be a transposed view): what accumulates the gradient expects them.
        self.dx = torch.empty_like(x) if needs[0] else None
        self.dw = self.empty_like(w) if needs[1] else None
        self.dbias = torch.zeros_like(bias, dtype=acc) if needs[2] and bias is not None else None

    def empty_like(self, t: Tensor) -> Tensor:
        """Memory for a large gradient."""
        return torch.empty_like(t)

    def logits(self, rows: slice, out: Tensor) -> None:
        """Writes the logits of ``rows`` to ``out``."""
        if self.bias is None:
            torch.mm(self.x[rows], self.w.t(), out=out)
        else:
            torch.addmm(self.bias, self.x[rows], self.w.t(), out=out)

    def add_gradients(self, rows: slice, dlogits: Tensor) -> None:
        """Adds what ``rows`` contribute to the gradients; the chunk from row 0 comes first."""
        if self.dx is not None:
            torch.mm(dlogits, self.w, out=self.dx[rows])
        if self.dw is not None:
            torch.addmm(self.dw, dlogits.t(), self.x[rows], beta=0 if rows.start == 0 else 1, out=self.dw)
        if self.dbias is not None:
            self.dbias += dlogits.sum(0)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of x, w and bias, in their dtypes; None for one that was not wanted."""
        if self.dw is not None and len(self.x) == 0:
            self.dw.zero_()
        dbias = None if self.dbias is None or self.bias is None else self.dbias.to(self.bias.dtype)
        return self.dx, self.dw, dbias


def for_chunks(products: Products, buffer: Tensor, kernel: Callable[[slice, Tensor], None], gradients: bool) -> None:
    """Calls ``kernel(rows, logits)`` for each chunk; with ``gradients`` it leaves dlogits in place of the logits."""
    for begin in range(0, len(products.x), max(len(buffer), 1)):
        rows = slice(begin, min(begin + len(buffer), len(products.x)))
        chunk = buffer[: rows.stop - begin]
        products.logits(rows, chunk)
        kernel(rows, chunk)
        if gradients:
            products.add_gradients(rows, chunk)
