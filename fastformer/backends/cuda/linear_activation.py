"""A feed-forward's first matmul with its epilogue, and the backward pass of both: csrc/cuda/linear_activation_sm90.cu.

Signatures as in backends/triton/linear_activation.py. The kernel reads matrices by TMA, so their rows have to start at
multiples of 16 bytes; :func:`refusal` says which do not.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import emulated
from ._call import empty, library, on_device, stream

DTYPES = frozenset({torch.bfloat16, torch.float16})
FEATURES = frozenset({"bias", "gate", "dropout"})
__all__ = ["DTYPES", "FEATURES", "backward", "forward", "refusal"]


def refusal(x: Tensor, w1: Tensor, w_up: Tensor | None, w2: Tensor | None) -> str | None:
    """Why a block with these matrices, ``w2`` where gradients are wanted, cannot run here; None if it can."""
    if not _is_hopper(x.device):
        return "the kernel is made for compute capability 9.0"
    for name, matrix in (("x", x), ("w1", w1), ("w_up", w_up), ("w2", w2)):
        if matrix is None:
            continue
        if 0 in matrix.shape:
            return f"{name} is empty"
        sides = (matrix,) if name == "x" else (matrix, matrix.t())
        if not any(_is_aligned(side) for side in sides):
            return f"{name}'s rows do not start at multiples of 16 bytes"
    return None


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w_up: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: int,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x (rows, K), w1, w_up (F, K), b1, b_up (F) -> out, and if ``keep`` gate and up, else None: (rows, F)."""
    x = _aligned(x)
    if w_up is not None and w_up.stride() != w1.stride():
        w1, w_up = w1.contiguous(), w_up.contiguous()
    shape = len(x), len(w1)
    out = empty(x, *shape)
    gate = empty(x, *shape) if keep else None
    up = empty(x, *shape) if keep and w_up is not None else None
    with on_device(x):
        library().linear_activation_forward(
            x, w1, w_up, b1, b_up, out, gate, up, activation, dropout_p, seed, stream(x)
        )  # fmt: skip
    return out, gate, up


def backward(
    dout: Tensor,
    w2: Tensor,
    gate: Tensor,
    b1: Tensor | None,
    up: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: int,
    need_db1: bool,
    need_db_up: bool,
    dgate: Tensor,
    dup: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """dout (rows, K), w2 (K, F) and the forward's gate and up (rows, F) -> dgate and dup, filled; (db1, db_up)."""
    dout = _aligned(dout)
    rows, cols = gate.shape
    db1 = empty(gate, cols) if need_db1 else None
    db_up = empty(gate, cols) if need_db_up else None
    workspace = None
    if need_db1 or need_db_up:
        size = library().linear_activation_backward_workspace(rows, cols, up is not None)
        workspace = empty(gate, size, dtype=torch.uint8)
    with on_device(dout):
        library().linear_activation_backward(
            dout, w2, gate, b1, up, b_up, activation, dropout_p, seed, dgate, dup, db1, db_up, workspace, stream(dout)
        )
    return db1, db_up


def _is_hopper(device: torch.device) -> bool:
    if emulated():
        return os.environ.get("FASTFORMER_CUDA_FAMILY") == "sm90"
    return torch.cuda.get_device_capability(device) == (9, 0)


def _is_aligned(matrix: Tensor) -> bool:
    rows, cols = matrix.shape
    row, col = matrix.stride()
    return (col == 1 or cols == 1) and (rows == 1 or (row > 0 and row % 8 == 0)) and matrix.data_ptr() % 16 == 0


def _aligned(matrix: Tensor) -> Tensor:
    """``matrix``, or a copy whose rows start at multiples of 16 bytes."""
    if _is_aligned(matrix):
        return matrix
    rows, cols = matrix.shape
    return empty(matrix, rows, (cols + 7) // 8 * 8)[:, :cols].copy_(matrix)
