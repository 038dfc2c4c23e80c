"""Embedding by csrc/cuda/embedding.cu; see backends/reference/embedding.py.

An index outside its table makes its row of the output NaN, and gives no gradient: finding it earlier would mean waiting
for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..embedding_table import Table
from ._call import DTYPES, empty, library, on_device, stream

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
    """-> out (*shape, cols), and with ``normalize`` mean, rstd (rows) float32."""
    weight = tables[0].weight
    out, mean, rstd = empty(weight, *shape, weight.shape[1]), None, None
    if normalize:
        mean, rstd = (empty(weight, math.prod(shape), dtype=torch.float32) for _ in range(2))
    norm = (norm_weight, norm_bias, mean, rstd)
    with on_device(weight):
        library().embedding_forward(tables, out, scale, normalize, eps, dropout_p, seed, *norm, stream(weight))
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
        empty(dout, *table.weight.shape) if needed else None for table, needed in zip(tables, needs, strict=True)
    ]
    dsummed = empty(dout, *dout.shape) if normalize or dropout_p > 0 else None
    dweight = empty(dout, dout.shape[1], dtype=param_dtype) if need_dweight else None
    dbias = empty(dout, dout.shape[1], dtype=param_dtype) if need_dbias else None
    norm, kernels = (norm_weight, mean, rstd), library()
    arguments = (
        dout, tables, scale, normalize, dropout_p, seed, norm, dsummed, tuple(gradients), dweight, dbias
    )  # fmt: skip
    with on_device(dout):
        workspace = empty(dout, kernels.embedding_backward_workspace(*arguments), dtype=torch.uint8)
        kernels.embedding_backward(*arguments, workspace, stream(dout))
    return gradients, dweight, dbias
