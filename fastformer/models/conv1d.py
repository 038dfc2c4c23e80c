"""GPT-2's linear layer, y = x W + b with W as (in, out), the transpose of ``torch.nn.Linear``'s."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional


class Conv1D(nn.Module):
    """A linear layer with its weight as ``(in_features, out_features)``, the layout of GPT-2's checkpoints."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """x ``(*, in_features)`` -> ``(*, out_features)``."""
        return functional.linear(x, self.weight.t(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[0]}, out_features={self.weight.shape[1]}"
