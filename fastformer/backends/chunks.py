"""linear_cross_entropy over chunks of rows, for the backends that never hold all logits.

For each chunk, in one buffer:

    logits = x w^T + b                                          the library's matmul (backends/matmul.py)
    loss, and dlogits written over the logits                   the backend's kernel of cross_entropy
    dx = dlogits w,  dw += dlogits^T x,  db += sum(dlogits)     the library's matmuls

Gradients that are written in the forward pass take three products, where a backward pass of its own would have to make
the logits again. Floor: those products; beside them each logit is written and read twice, in a buffer that is reused.

The chunks are a quarter of the rows. PyTorch holds three tables of rows x classes at its peak (log-probabilities and
two gradients), so this is a twelfth of it at any size; and a half-precision dw is rounded four times on its way: the
partial sums of a quarter, a half and three quarters of the rows are smaller than the whole, so together that is less
than three roundings of the result, where the product of all rows has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import matmul

CHUNKS = 4
MIN_ROWS = 64
"""Fewer rows leave a matmul waiting for the weight."""
MAX_ROWS = 1024
"""Where sums keep their digits (float32, float64), more rows only take more memory."""
SMALL_LOGITS = 1 << 18
"""So few logits stay in the cache, all at once."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
NONE = (False, False, False)


def chunk_rows(rows: int, classes: int, dtype: torch.dtype) -> int:
    """How many rows to take at a time."""
    if rows * classes <= SMALL_LOGITS:
        return rows
    quarter = max(-(-rows // CHUNKS), min(rows, MIN_ROWS))
    return min(quarter, MAX_ROWS) if dtype.itemsize >= 4 else quarter


class Products:
    """The matmuls around the logits of a chunk, in the dtype of the inputs, and the gradients they add up.

    x is (rows, features), w (classes, features), bias (classes) or None; ``needs`` says which of their gradients are
    wanted.
    """

    def __init__(self, x: Tensor, w: Tensor, bias: Tensor | None, needs: Sequence[bool] = NONE) -> None:
        self.x, self.w, self.bias = x, w, bias
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        # In the strides of w (which may be a transposed view): what accumulates the gradient expects them.
        self.dx = torch.empty_like(x) if needs[0] else None
        self.dw = self.empty_like(w) if needs[1] else None
        self.dbias = torch.zeros_like(bias, dtype=acc) if needs[2] and bias is not None else None

    def empty_like(self, t: Tensor) -> Tensor:
        """Memory for a large gradient."""
        return torch.empty_like(t)

    def buffer(self) -> Tensor:
        """Memory for the logits of a chunk."""
        return self.x.new_empty(chunk_rows(len(self.x), len(self.w), self.x.dtype), len(self.w))

    def logits(self, rows: slice, out: Tensor) -> None:
        """Writes the logits of ``rows`` to ``out``."""
        if self.bias is None:
            matmul.mm(self.x[rows], self.w.t(), out)
        else:
            matmul.addmm(self.bias, self.x[rows], self.w.t(), out)

    def add_gradients(self, rows: slice, dlogits: Tensor) -> None:
        """Adds what ``rows`` contribute to the gradients; the chunk from row 0 comes first."""
        if self.dx is not None:
            matmul.mm(dlogits, self.w, self.dx[rows])
        if self.dw is not None:
            if rows.start == 0:
                matmul.mm(dlogits.t(), self.x[rows], self.dw)
            else:
                matmul.addmm(self.dw, dlogits.t(), self.x[rows], self.dw)
        if self.dbias is not None:
            self.dbias += dlogits.sum(0)

    def gradients(self) -> Gradients:
        """The gradients of x, w and bias, in their dtypes; None for one that was not wanted."""
        if self.dw is not None and len(self.x) == 0:
            self.dw.zero_()
        dbias = None if self.dbias is None or self.bias is None else self.dbias.to(self.bias.dtype)
        return self.dx, self.dw, dbias


def run(
    kernels: ModuleType,
    products: Products,
    target: Tensor,
    weight: Tensor | None,
    options: tuple[int, float, float],
    dloss: Tensor | None = None,
) -> Tensor:
    """The loss of each row, (rows) acc; with ``dloss`` (rows) acc ``products`` has the gradients afterwards.

    Args:
        kernels: the backend's file of cross_entropy.
        target, weight: (rows) int64; (classes) acc or None.
        options: ignore_index, label_smoothing, z_loss.
    """
    x = products.x
    loss = torch.empty(len(x), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    buffer = products.buffer()
    for begin in range(0, len(x), max(len(buffer), 1)):
        rows = slice(begin, min(begin + len(buffer), len(x)))
        logits = buffer[: rows.stop - begin]
        products.logits(rows, logits)
        part = None if dloss is None else dloss[rows]
        # In place: the kernel reads an element for the last time before it writes it.
        dlogits = None if dloss is None else logits
        loss[rows], _ = kernels.forward(
            logits, target[rows], weight, *options, probabilities=None, dloss=part, dlogits=dlogits
        )
        if dlogits is not None:
            products.add_gradients(rows, dlogits)
    return loss
