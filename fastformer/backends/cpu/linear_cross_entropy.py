"""linear_cross_entropy in chunks of rows (backends/chunks.py), and between the matmuls the kernels of
csrc/cpu/cross_entropy.cpp, in place over the chunk's logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import chunks
from ..chunks import Gradients, Products
from ..memory import on_huge_pages
from . import cross_entropy
from ._call import DTYPES

FEATURES = cross_entropy.FEATURES - {"probabilities"}
__all__ = ["DTYPES", "FEATURES", "backward", "forward", "scale"]


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
    return chunks.run(cross_entropy, OnHugePages(x, w, bias), target, weight, (ignore_index, label_smoothing, z_loss))


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
    products = OnHugePages(x, w, bias, needs)
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


class OnHugePages(Products):
    """Products into memory whose pages cost little to touch first."""

    def empty_like(self, t: Tensor) -> Tensor:
        return on_huge_pages(torch.empty_like(t))

    def buffer(self) -> Tensor:
        return on_huge_pages(super().buffer())
