"""Activation modules over :mod:`fastformer.functional`; constructors and forward as in ``torch.nn``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class GELU(torch.nn.GELU):
    """``x * Phi(x)``, exact (``approximate="none"``) or by the tanh approximation (``"tanh"``)."""

    def __init__(self, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate: {approximate!r} is not one of 'none', 'tanh'")
        super().__init__(approximate)

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape and dtype."""
        return functional.gelu(input, approximate=self.approximate)


class SiLU(torch.nn.SiLU):
    """``x * sigmoid(x)``."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape and dtype."""
        return functional.silu(input, inplace=self.inplace)


class ReLU(torch.nn.ReLU):
    """``max(x, 0)``."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape and dtype."""
        return functional.relu(input, inplace=self.inplace)


class Softmax(torch.nn.Softmax):
    """Softmax along ``dim``. A slice that is entirely -inf gives zeros, where ``torch.nn.Softmax`` gives NaN."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape and dtype."""
        return functional.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """Logarithm of the softmax along ``dim``."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape and dtype."""
        return functional.log_softmax(input, self.dim, _stacklevel=5)
