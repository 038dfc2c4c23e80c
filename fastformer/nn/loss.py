"""Loss modules over :mod:`fastformer.functional`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``logsumexp(logits) - logits[target]``, without ever storing the probabilities.

    Constructor and forward as in ``torch.nn.CrossEntropyLoss``: class weights, ``ignore_index``, ``label_smoothing``,
    ``reduction``, targets as class indices or as probabilities.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``, target ``()``, ``(N)`` or ``(N, d1, ...)`` of int64."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
