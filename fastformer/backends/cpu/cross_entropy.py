"""Cross-entropy by csrc/cpu/cross_entropy.cpp; signatures as in backends/reference/cross_entropy.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ._call import DTYPES, acc_dtype, empty_like

FEATURES = frozenset({"weight", "label_smoothing", "z_loss", "probabilities"})
__all__ = [
    "DTYPES", "FEATURES", "backward", "backward_probabilities", "forward", "gradient_in_forward", "plain", "reduced"
]  # fmt: skip

# A row that is read again should come from the cache; a few megabytes lie in the last level of any.
_CACHED_ROW_BYTES = 4 << 20


def gradient_in_forward(cols: int, dtype: torch.dtype) -> bool:
    """Whether writing the gradient of rows of ``cols`` logits in the forward pass is the faster way.

    It saves reading the logits again, unless the row has left the cache by then. Never for float16: what trains in it
    scales the loss, because small gradients underflow, and here the scale would come too late.
    """
    return dtype != torch.float16 and cols * dtype.itemsize <= _CACHED_ROW_BYTES


def forward(
    logits: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float = 0.0,
    probabilities: Tensor | None = None,
    dloss: Tensor | None = None,
    dlogits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """logits (rows, cols), target (rows) int64 or probabilities (rows, cols), weight (cols) acc or None
    -> loss (rows) acc, lse (rows) acc; with dlogits (rows, cols) and dloss (rows) the gradient as well.

    Raises IndexError for a target outside [0, cols) that is not ``ignore_index``, before anything is written.
    """
    loss = torch.empty(len(logits), dtype=acc_dtype(logits.dtype))
    lse = torch.empty_like(loss)
    try:
        _C.cross_entropy_forward(
            logits, _contiguous(target), weight, loss, lse, ignore_index, label_smoothing, z_loss, probabilities,
            dloss, dlogits,
        )  # fmt: skip
    except ValueError as error:
        raise _index_error(error) from None
    return loss, lse


def reduced(
    logits: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    probabilities: Tensor | None,
    mean: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The mean or the sum of the rows' losses, one number in the dtype of logits, and its gradient (or None)."""
    loss = torch.empty((), dtype=logits.dtype)
    dlogits = empty_like(logits) if gradient else None
    try:
        _C.cross_entropy_reduced(
            logits, _contiguous(target), weight, loss, ignore_index, label_smoothing, z_loss, probabilities, dlogits,
            mean,
        )  # fmt: skip
    except ValueError as error:
        raise _index_error(error) from None
    return loss, dlogits


def plain(logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, mean: bool) -> Tensor | None:
    """``reduced`` without its gradient; None if anything about the call is unusual or wrong."""
    loss = logits.new_empty(())
    return loss if _C.cross_entropy_plain(logits, target, ignore_index, label_smoothing, mean, loss) else None


def backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float = 0.0,
) -> Tensor:
    """dloss (rows) acc (an expanded scalar is fine) -> dlogits (rows, cols) in the dtype of logits."""
    dlogits = empty_like(logits)
    _C.cross_entropy_backward(
        dloss, logits, target.contiguous(), weight, lse, dlogits, ignore_index, label_smoothing, z_loss
    )
    return dlogits


def backward_probabilities(
    dloss: Tensor,
    logits: Tensor,
    probabilities: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    z_loss: float = 0.0,
    need_dprobabilities: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """dloss (rows) acc -> dlogits, and dprobabilities (or None), both (rows, cols) in the dtype of logits."""
    dlogits = empty_like(logits)
    dprobabilities = empty_like(logits) if need_dprobabilities else None
    _C.cross_entropy_backward(
        dloss, logits, None, weight, None, dlogits, 0, label_smoothing, z_loss, probabilities, dprobabilities
    )
    return dlogits, dprobabilities


def _contiguous(target: Tensor | None) -> Tensor | None:
    return target if target is None else target.contiguous()


def _index_error(error: ValueError) -> Exception:
    return IndexError(str(error)) if str(error).startswith("target: row") else error
