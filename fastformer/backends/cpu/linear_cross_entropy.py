"""linear_cross_entropy in chunks of rows (backends/chunks.py): torch's matmuls, and between them the kernels of
csrc/cpu/cross_entropy.cpp, in place over the chunk's logits.

Half precision on a CPU that has no such products: torch multiplies one element at a time there, so the weight is
widened to float32, a few thousand classes at a time, and multiplied by the float32 matmul.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import chunks
from ..chunks import Gradients, Products
from . import cross_entropy
from ._call import DTYPES, on_huge_pages

FEATURES = cross_entropy.FEATURES - {"probabilities"}
__all__ = ["DTYPES", "FEATURES", "backward", "forward", "scale"]

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
) -> Tensor:
    """x (rows, features), w (classes, features), bias (classes), target (rows), weight (classes) acc -> loss (rows).

    Raises IndexError for a target outside [0, classes) that is not ``ignore_index``.
    """
    check_target(target, len(w), ignore_index)
    return chunks.run(
        cross_entropy, _products(x.dtype)(x, w, bias), target, weight, (ignore_index, label_smoothing, z_loss)
    )


def backward(
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
    """dloss (rows) acc (an expanded scalar is fine) -> loss (rows) acc, and the gradients of x, w and bias that
    ``needs`` asks for, else None. It needs nothing of the forward pass, so it can be that as well."""
    check_target(target, len(w), ignore_index)
    products = _products(x.dtype)(x, w, bias, needs)
    loss = chunks.run(cross_entropy, products, target, weight, (ignore_index, label_smoothing, z_loss), dloss)
    return loss, products.gradients()


def scale(gradients: Gradients, dloss: Tensor) -> Gradients:
    """The gradients times one number, in place; most often it is 1 and nothing is to do."""
    factor = dloss.item()
    for gradient in gradients:
        if gradient is not None and factor != 1:
            gradient *= factor
    return gradients


def check_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """Before the first product: in the last chunk it would be found late."""
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise IndexError(
            f"target: row {row} is {int(target[row])}, not in [0, {classes}) and not ignore_index ({ignore_index})"
        )


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has a fast matmul for ``dtype`` on this CPU."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def _products(dtype: torch.dtype) -> type[Products]:
    return OnHugePages if multiplies(dtype) else Widened


class OnHugePages(Products):
    """Products into memory whose pages cost little to touch first."""

    def empty_like(self, t: Tensor) -> Tensor:
        return on_huge_pages(torch.empty_like(t))

    def buffer(self) -> Tensor:
        return on_huge_pages(super().buffer())


class Widened(OnHugePages):
    """The products of half precision in float32, over blocks of classes."""

    def __init__(self, x: Tensor, w: Tensor, bias: Tensor | None, needs: Sequence[bool] = chunks.NONE) -> None:
        super().__init__(x, w, bias, needs)
        rows, block = chunks.chunk_rows(len(x), len(w), x.dtype), min(BLOCK_CLASSES, len(w))
        self.wide_x = torch.empty(rows, x.shape[1])
        self.wide_w = torch.empty(block, x.shape[1])
        self.wide_logits = torch.empty(rows * block)
        self.wide_dx = torch.empty_like(self.wide_x) if needs[0] else None
        self.wide_dw = torch.empty_like(self.wide_w) if needs[1] else None

    def logits(self, rows: slice, out: Tensor) -> None:
        x = self.wide_x[: len(out)].copy_(self.x[rows])
        for block, w in self._blocks():
            logits = torch.mm(x, w.t(), out=self._room(len(x), len(w)))
            if self.bias is not None:
                logits += self.bias[block]
            out[:, block] = logits

    def add_gradients(self, rows: slice, dlogits: Tensor) -> None:
        x = self.wide_x[: len(dlogits)]  # still there from the logits
        dx = None if self.wide_dx is None else self.wide_dx[: len(x)]
        for block, w in self._blocks():
            wide = self._room(len(x), len(w)).copy_(dlogits[:, block])
            if dx is not None:
                dx.addmm_(wide, w, beta=0 if block.start == 0 else 1)
            if self.dw is not None and self.wide_dw is not None:
                dw = torch.mm(wide.t(), x, out=self.wide_dw[: len(w)])
                self.dw[block] = dw if rows.start == 0 else dw.add_(self.dw[block])
            if self.dbias is not None:
                self.dbias[block] += wide.sum(0)
        if self.dx is not None and dx is not None:
            self.dx[rows] = dx

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for begin in range(0, len(self.w), BLOCK_CLASSES):
            block = slice(begin, min(begin + BLOCK_CLASSES, len(self.w)))
            yield block, self.wide_w[: block.stop - begin].copy_(self.w[block])

    def _room(self, rows: int, classes: int) -> Tensor:
        return self.wide_logits[: rows * classes].view(rows, classes)
