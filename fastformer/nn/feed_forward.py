"""A transformer's feed-forward block, ``linear2(gelu(linear1(x)))`` (Vaswani et al. 2017, section 3.3).

The two matmuls are the vendor library's; the bias of the first, the activation and, backward, the bias gradient are one
pass over the hidden activations instead of three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional

ACTIVATIONS = ("gelu", "gelu_tanh")


class FeedForward(torch.nn.Module):
    """Two linear layers around a GELU.

    Args:
        embed_dim: size of the input and of the output.
        hidden_dim: size between the two linear layers; often 4 * embed_dim.
        activation: "gelu" (exact) or "gelu_tanh" (the tanh approximation, GPT-2's).
        bias: whether the linear layers have one.
        dropout: probability of zeroing an element of the output in training.
        device, dtype: of the parameters.

    State: ``linear1.weight (hidden_dim, embed_dim)``, ``linear1.bias``, ``linear2.weight (embed_dim, hidden_dim)``,
    ``linear2.bias``, initialised as ``torch.nn.Linear`` initialises them.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("embed_dim", embed_dim), ("hidden_dim", hidden_dim)):
            if value <= 0:
                raise ValueError(f"{name}: {value} is not positive")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: {activation!r} is not one of {', '.join(map(repr, ACTIVATIONS))}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: {dropout} is not in [0, 1]")
        super().__init__()
        self.embed_dim = embed_dim
        self.hidden_dim = hidden_dim
        self.activation = activation
        self.dropout = dropout
        self.linear1 = torch.nn.Linear(embed_dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.linear2 = torch.nn.Linear(hidden_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input ``(*, embed_dim)`` -> the same shape and dtype."""
        first, second = self.linear1, self.linear2
        out = functional.feed_forward(input, first.weight, first.bias, second.weight, second.bias, self.activation)
        return torch.nn.functional.dropout(out, self.dropout, self.training) if self.dropout > 0 else out

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"
