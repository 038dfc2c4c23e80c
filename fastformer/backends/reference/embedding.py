"""out = dropout(layer_norm(scale * tables[0][ids] + tables[1][ids] + ...)) in plain PyTorch; see fastformer.h."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..embedding_table import Table
from . import layer_norm
from .philox import dropout_scales

DTYPES = layer_norm.DTYPES
FEATURES = frozenset({"norm", "dropout"})


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

    Raises ValueError for an index out of range on the CPU, naming the table; elsewhere its row of the output is NaN.
    """
    out, mean, rstd = _sum(tables, math.prod(shape), scale), None, None
    if normalize:
        out, mean, rstd = layer_norm.forward(out, norm_weight, norm_bias, eps)
    if dropout_p > 0:
        out = _dropped(out, dropout_p, seed)
    return out.view(*shape, out.shape[1]), mean, rstd


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
    acc, dweight, dbias = layer_norm.acc_dtype(dout.dtype), None, None
    if dropout_p > 0:
        dout = _dropped(dout, dropout_p, seed)
    if normalize:
        assert mean is not None and rstd is not None
        summed = _sum(tables, len(dout), scale)
        d, dweight, dbias = layer_norm.backward(
            dout, summed, norm_weight, mean, rstd, True, need_dweight, need_dbias, param_dtype
        )
        assert d is not None
        dout = d
    gradients: list[Tensor | None] = []
    for i, (table, needed) in enumerate(zip(tables, needs, strict=True)):
        if not needed:
            gradients.append(None)
            continue
        total = torch.zeros(table.weight.shape, dtype=acc, device=dout.device)
        if len(dout):
            ids = table.indices().repeat(len(dout) // table.period)
            counted = (ids >= 0) & (ids < len(total)) & (ids != table.padding_idx)
            total.index_add_(0, ids[counted], dout.to(acc)[counted])
        gradients.append((total * scale if i == 0 else total).to(dout.dtype))
    return gradients, dweight, dbias


def _sum(tables: tuple[Table, ...], rows: int, scale: float) -> Tensor:
    dtype = tables[0].weight.dtype
    total = torch.zeros(
        rows, tables[0].weight.shape[1], dtype=layer_norm.acc_dtype(dtype), device=tables[0].weight.device
    )
    for i, table in enumerate(tables):
        if rows == 0:
            break
        ids, size = table.indices(), len(table.weight)
        inside = (ids >= 0) & (ids < size)
        if not ids.is_cuda and not inside.all():
            entry = int((~inside).nonzero()[0])
            raise ValueError(f"tables[{i}].ids: entry {entry} is {int(ids[entry])}, not in [0, {size})")
        taken = table.weight[ids.where(inside, 0)].to(total.dtype).where(inside[:, None], torch.nan)
        total += (taken * scale if i == 0 else taken).repeat(rows // table.period, 1)
    return total.to(dtype)


def _dropped(x: Tensor, dropout_p: float, seed: int) -> Tensor:
    acc = layer_norm.acc_dtype(x.dtype)
    return (x.to(acc) * dropout_scales(seed, *x.shape, dropout_p, x.device, acc)).to(x.dtype)
