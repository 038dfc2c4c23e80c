"""linear_cross_entropy in chunks of rows (backends/chunks.py): cuBLAS's matmuls, and between them one kernel that makes
a row's loss and writes its gradient over its logits (triton/cross_entropy.py). Nothing waits for the device.

The rows of the chunk's buffer are padded to 128 bytes, because matmuls of tables whose rows begin anywhere cannot load
them in whole vectors; a vocabulary of 50,257 would be one.

A target outside [0, classes) that is not ignore_index makes its loss NaN, and with it every gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from .. import chunks
from ..chunks import Gradients, Products
from . import cross_entropy
from .launch import DTYPES as DTYPES
from .launch import Configuration

FEATURES = cross_entropy.FEATURES - {"probabilities"}
ROW_BYTES = 128


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
    """x (rows, features), w (classes, features), bias (classes), target (rows), weight (classes) acc -> loss (rows)."""
    return chunks.run(cross_entropy, Padded(x, w, bias), target, weight, (ignore_index, label_smoothing, z_loss))


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
    ``needs`` asks for, else None."""
    products = Padded(x, w, bias, needs)
    loss = chunks.run(cross_entropy, products, target, weight, (ignore_index, label_smoothing, z_loss), dloss)
    return loss, products.gradients()


class Padded(Products):
    """Products through a buffer whose rows begin at multiples of ROW_BYTES."""

    def buffer(self) -> Tensor:
        row = ROW_BYTES // self.x.element_size()
        classes = len(self.w)
        rows = chunks.chunk_rows(len(self.x), len(self.w), self.x.dtype)
        return self.x.new_empty(rows, -(-classes // row) * row)[:, :classes]


def scale(gradients: Gradients, dloss: Tensor) -> Gradients:
    """The gradients times one number, in place; where it is 1, as most often, memory is not touched."""
    for gradient in gradients:
        if gradient is not None:
            cross_entropy.scale(gradient, dloss)
    return gradients


def configurations() -> Iterator[Configuration]:
    """The kernel of triton/cross_entropy.py that writes the gradient, for vocabularies."""
    for one in cross_entropy.configurations():
        if re.search(r"forward \w+ 262144 gradient$", one.label):
            yield replace(one, label=f"linear_{one.label}")
