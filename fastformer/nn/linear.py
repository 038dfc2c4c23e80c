"""The linear layer over :mod:`fastformer.functional`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class Linear(torch.nn.Linear):
    """``input @ weight.T + bias``.

    Constructor, initialisation and state_dict keys (``weight``, ``bias``) are those of ``torch.nn.Linear``, of which
    this is a subclass. The matmul is PyTorch's; half precision on a CPU without instructions for it goes through
    float32, which is faster by far.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input ``(*, in_features)`` -> ``(*, out_features)``, in the same dtype."""
        return functional.linear(input, self.weight, self.bias)
