"""Embedding by csrc/cpu/embedding.cpp; see backends/reference/embedding.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _C
from ..embedding_table import Table
from ._call import DTYPES, acc_dtype, on_huge_pages

FEATURES = frozenset({"norm", "dropout"})
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


def forward(
    tables: tuple[Table, ...],
    shape: Sequence[int],
    scale: float,
    normalize: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> out (*shape, cols), and with ``normalize`` mean, rstd (rows) acc. ``statistics`` as in layer_norm.

    Raises ValueError for an index out of range, naming the table.
    """
    weight = tables[0].weight
    out, mean, rstd = on_huge_pages(weight.new_empty((*shape, weight.shape[1]))), None, None
    if normalize and statistics:
        mean = weight.new_empty(math.prod(shape), dtype=acc_dtype(weight.dtype))
        rstd = torch.empty_like(mean)
    _C.embedding_forward(tables, out, scale, normalize, eps, dropout_p, seed, norm_weight, norm_bias, mean, rstd)
    return out, mean, rstd


def backward(
    dout: Tensor,
    tables: tuple[Table, ...],
    scale: float,
    normalize: bool,
    norm_weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    dropout_p: float,
    seed: int,
    needs: tuple[bool, ...],
    need_dweight: bool,
    need_dbias: bool,
    param_dtype: torch.dtype,
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    """dout (rows, cols) -> dense gradients of the tables, None where ``needs`` is False; of the norm's parameters."""
    gradients = [
        on_huge_pages(dout.new_empty(table.weight.shape)) if needed else None
        for table, needed in zip(tables, needs, strict=True)
    ]
    dsummed = on_huge_pages(torch.empty(dout.shape, dtype=dout.dtype)) if normalize or dropout_p > 0 else None
    dweight = dout.new_empty(dout.shape[1], dtype=param_dtype) if need_dweight else None
    dbias = dout.new_empty(dout.shape[1], dtype=param_dtype) if need_dbias else None
    norm = (norm_weight, mean, rstd)
    _C.embedding_backward(
        dout, tables, scale, normalize, dropout_p, seed, *norm, dsummed, tuple(gradients), dweight, dbias
    )
    return gradients, dweight, dbias
