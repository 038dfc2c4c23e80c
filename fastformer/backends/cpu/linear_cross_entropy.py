"""linear_cross_entropy in chunks of rows (backends/chunks.py): torch's matmuls, and between them the kernels of
csrc/cpu/cross_entropy.cpp, in place over the chunk's logits.

Half precision on a CPU that has no such products: torch multiplies one element at a time there, so the weight is
widened to float32, a few thousand classes at a time, and multiplied by the float32 matmul.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _C
from ..chunks import Products, chunk_rows, for_chunks
from . import cross_entropy
from ._call import DTYPES, acc_dtype, on_huge_pages

FEATURES = cross_entropy.FEATURES
__all__ = ["DTYPES", "FEATURES", "backward", "forward", "loss_and_gradients", "scale"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
BLOCK_CLASSES = 2048  # of a widened weight: with its gradient and the logits some 15 MB at 768 features


def forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """x (rows, features), w (classes, features), target (rows) -> loss (rows) acc, lse (rows) acc.

    Raises IndexError for a target outside [0, classes) that is not ``ignore_index``.
    """
    check_target(target, len(w), ignore_index)
    loss, lse = _row_results(x)

    def kernel(rows: slice, logits: Tensor) -> None:
        _C.cross_entropy_forward(logits, target[rows], weight, loss[rows], lse[rows], ignore_index, label_smoothing)

    products = _products(x, w, bias)
    for_chunks(products, _buffer(x, w), kernel, gradients=False)
    return loss, lse


def backward(
    dloss: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float = 0.0,
    needs: Sequence[bool] = (True, True, True),
) -> Gradients:
    """dloss (rows) acc, any stride -> the gradients of x, w and bias that ``needs`` asks for, else None."""

    def kernel(rows: slice, logits: Tensor) -> None:
        _gradient(dloss[rows], logits, target[rows], weight, lse[rows], ignore_index, label_smoothing)

    products = _products(x, w, bias, needs)
    for_chunks(products, _buffer(x, w), kernel, gradients=True)
    return products.gradients()


def loss_and_gradients(
    dloss: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float = 0.0,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[Tensor, Gradients]:
    """Both directions in one pass: loss (rows) acc, and the gradients of sum(dloss * loss)."""
    check_target(target, len(w), ignore_index)
    loss, lse = _row_results(x)

    def kernel(rows: slice, logits: Tensor) -> None:
        _C.cross_entropy_forward(logits, target[rows], weight, loss[rows], lse[rows], ignore_index, label_smoothing)
        _gradient(dloss[rows], logits, target[rows], weight, lse[rows], ignore_index, label_smoothing)

    products = _products(x, w, bias, needs)
    for_chunks(products, _buffer(x, w), kernel, gradients=True)
    return loss, products.gradients()


def scale(gradients: Gradients, dloss: Tensor) -> Gradients:
    """The gradients times one number, in place; most often it is 1 and nothing is to do."""
    factor = dloss.item()
    if factor != 1:
        for gradient in gradients:
            if gradient is not None:
                gradient *= factor
    return gradients


def check_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """Before the first product: finding it in the last chunk would be late."""
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise IndexError(
            f"target: row {row} is {int(target[row])}, not in [0, {classes}) and not ignore_index ({ignore_index})"
        )


def _gradient(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    smoothing: float,
) -> None:
    """Writes the gradient of the logits over the logits."""
    _C.cross_entropy_backward(dloss, logits, target, weight, lse, logits, ignore_index, smoothing)


def _row_results(x: Tensor) -> tuple[Tensor, Tensor]:
    loss = torch.empty(len(x), dtype=acc_dtype(x.dtype))
    return loss, torch.empty_like(loss)


def _buffer(x: Tensor, w: Tensor) -> Tensor:
    return on_huge_pages(torch.empty(chunk_rows(len(x), x.dtype), len(w), dtype=x.dtype))


def _products(x: Tensor, w: Tensor, bias: Tensor | None, needs: Sequence[bool] = (False, False, False)) -> Products:
    return (_OnHugePages if multiplies(x.dtype) else _Widened)(x, w, bias, needs)


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has a fast matmul for ``dtype`` on this CPU."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


class _OnHugePages(Products):
    def empty_like(self, t: Tensor) -> Tensor:
        return on_huge_pages(torch.empty_like(t))


class _Widened(_OnHugePages):
    """The products in float32, over blocks of classes."""

    def __init__(
        self, x: Tensor, w: Tensor, bias: Tensor | None, needs: Sequence[bool] = (False, False, False)
    ) -> None:
        super().__init__(x, w, bias, needs)
        rows, block = chunk_rows(len(x), x.dtype), min(BLOCK_CLASSES, len(w))
        self.x_chunk = torch.empty(rows, x.shape[1])
        self.block_w = torch.empty(block, x.shape[1])
        self.block_logits = torch.empty(rows * block)
        self.block_dw = torch.empty_like(self.block_w) if needs[1] else None
        self.dx_chunk = torch.empty_like(self.x_chunk) if needs[0] else None

    def blocks(self):
        for begin in range(0, len(self.w), BLOCK_CLASSES):
            yield slice(begin, min(begin + BLOCK_CLASSES, len(self.w)))

    def widened(self, block: slice) -> Tensor:
        return self.block_w[: block.stop - block.start].copy_(self.w[block])

    def block_of(self, table: Tensor, block: slice) -> Tensor:
        shape = (len(table), block.stop - block.start)
        return self.block_logits[: shape[0] * shape[1]].view(shape)

    def logits(self, rows: slice, out: Tensor) -> None:
        x = self.x_chunk[: len(out)].copy_(self.x[rows])
        for block in self.blocks():
            wide = torch.mm(x, self.widened(block).t(), out=self.block_of(out, block))
            if self.bias is not None:
                wide += self.bias[block]
            out[:, block] = wide

    def add_gradients(self, rows: slice, dlogits: Tensor) -> None:
        x = self.x_chunk[: len(dlogits)]
        for block in self.blocks():
            wide = self.block_of(dlogits, block).copy_(dlogits[:, block])
            first = block.start == 0
            if self.dx_chunk is not None:
                dx = self.dx_chunk[: len(x)]
                torch.addmm(dx, wide, self.widened(block), beta=0 if first else 1, out=dx)
            if self.dw is not None and self.block_dw is not None:
                dw = torch.mm(wide.t(), x, out=self.block_dw[: wide.shape[1]])
                self.dw[block] = dw if rows.start == 0 else dw.add_(self.dw[block])
            if self.dbias is not None:
                self.dbias[block] += wide.sum(0)
        if self.dx is not None and self.dx_chunk is not None:
            self.dx[rows] = self.dx_chunk[: len(x)]
