"""Loss modules over :mod:`fastformer.functional`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``logsumexp(logits) - logits[target]``, without ever storing the probabilities.

    Constructor and forward as in ``torch.nn.CrossEntropyLoss``: class weights, ``ignore_index``, ``label_smoothing``,
    ``reduction``, targets as class indices or as probabilities. ``z_loss`` as in :func:`functional.cross_entropy`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``, target its shape without C in int64, or its shape."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
