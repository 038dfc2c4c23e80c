"""A transformer's feed-forward block, ``linear2(activation(linear1(x)))`` (Vaswani et al. 2017, section 3.3), and the
gated form of Llama and T5 v1.1, ``down_proj(activation(gate_proj(x)) * up_proj(x))`` (Shazeer 2020,
arXiv:2002.05202).

The matmuls are the vendor library's; biases, activation, product, dropout and, backward, the bias gradients are one
pass over the hidden activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..functional._checks import choice, probability
from ..functional.activation import ACTIVATIONS
from ._joined import LINEAR, JoinedLayers
from ._plain import is_plain


class _Block(torch.nn.Module):
    """What the two forms share: options, their checks, and the output's dropout and residual."""

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        activation: str,
        dropout: float,
        activation_dropout: float,
        recompute: bool,
    ) -> None:
        for name, value in (("embed_dim", embed_dim), ("hidden_dim", hidden_dim)):
            if value <= 0:
                raise ValueError(f"{name}: {value} is not positive")
        choice("activation", activation, ACTIVATIONS)
        probability("dropout", dropout)
        probability("activation_dropout", activation_dropout)
        super().__init__()
        self.embed_dim = embed_dim
        self.hidden_dim = hidden_dim
        self.activation = activation
        self.dropout = dropout
        self.activation_dropout = activation_dropout
        self.recompute = recompute

    def _finish(self, block: Callable[..., Tensor], residual: Tensor | None) -> Tensor:
        """``residual + dropout(block())``; without dropout the block's last matmul adds the residual."""
        options: dict[str, Any] = {
            "dropout_p": self.activation_dropout,
            "training": self.training,
            "recompute": self.recompute,
        }
        if self.dropout == 0 or not self.training:
            return block(residual=residual, **options)
        out = torch.nn.functional.dropout(block(**options), self.dropout)
        return out if residual is None else residual + out

    def _call(self, activated: Callable[[], Tensor], last: torch.nn.Module, residual: Tensor | None) -> Tensor:
        """The same with layers that have to be called: replaced ones, or with hooks."""
        dropout, training = torch.nn.functional.dropout, self.training
        hidden = dropout(activated(), self.activation_dropout, training)
        out = dropout(last(hidden), self.dropout, training)
        return out if residual is None else residual + out

    def extra_repr(self) -> str:
        text = f"activation={self.activation!r}, dropout={self.dropout}"
        if self.activation_dropout:
            text += f", activation_dropout={self.activation_dropout}"
        return text + ", recompute=True" if self.recompute else text


class FeedForward(_Block):
    """Two linear layers around an activation.

    Args:
        embed_dim: size of the input and of the output.
        hidden_dim: size between the two linear layers; often 4 * embed_dim.
        activation: "relu", "gelu" (exact), "gelu_tanh" (the tanh approximation, GPT-2's) or "silu".
        bias: whether the linear layers have one.
        dropout: probability of zeroing an element of the output in training.
        device, dtype: of the parameters.
        activation_dropout: the same for an element after the activation.
        recompute: backward repeats the first layer instead of keeping what it computed.

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
        *,
        activation_dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__(embed_dim, hidden_dim, activation, dropout, activation_dropout, recompute)
        self.linear1 = torch.nn.Linear(embed_dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.linear2 = torch.nn.Linear(hidden_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input ``(*, embed_dim)`` -> the same shape and dtype; ``residual``, of that shape too, is added."""
        first, second = self.linear1, self.linear2
        if not (is_plain(first, *LINEAR) and is_plain(second, *LINEAR)):
            return self._call(lambda: functional.bias_activation(first(input), None, self.activation), second, residual)

        def block(**options: Any) -> Tensor:
            return functional.feed_forward(
                input, first.weight, first.bias, second.weight, second.bias, self.activation, **options
            )

        return self._finish(block, residual)


class GatedFeedForward(JoinedLayers, _Block):
    """Two linear layers whose product, one of them activated, goes through a third: SwiGLU, GeGLU, ReGLU.

    The first two weights lie next to each other in memory, so that both are one matmul; they are two parameters all the
    same. A module whose parameters were replaced one by one (rather than moved or loaded) works with two matmuls.

    Args:
        embed_dim: size of the input and of the output.
        hidden_dim: size in between.
        activation: of the gate: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU), "relu" (ReGLU).
        bias: whether the linear layers have one.
        dropout: probability of zeroing an element of the output in training.
        device, dtype: of the parameters.
        activation_dropout: the same for an element of the product.
        recompute: backward repeats the first two layers instead of keeping what they computed.

    State: ``gate_proj.weight`` and ``up_proj.weight (hidden_dim, embed_dim)``, ``down_proj.weight (embed_dim,
    hidden_dim)`` and their biases, Llama's names, initialised as ``torch.nn.Linear`` initialises them.
    """

    joined_layers = ("gate_proj", "up_proj")

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        activation: str = "silu",
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation_dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__(embed_dim, hidden_dim, activation, dropout, activation_dropout, recompute)
        self.gate_proj = torch.nn.Linear(embed_dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.up_proj = torch.nn.Linear(embed_dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.down_proj = torch.nn.Linear(hidden_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.join()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input ``(*, embed_dim)`` -> the same shape and dtype; ``residual``, of that shape too, is added."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not all(is_plain(layer, *LINEAR) for layer in (gate, up, down)):
            return self._call(
                lambda: functional.gated_activation(gate(input), up(input), self.activation), down, residual
            )

        def block(**options: Any) -> Tensor:
            return functional.gated_feed_forward(
                input,
                gate.weight,
                up.weight,
                down.weight,
                self.activation,
                b_gate=gate.bias,
                b_up=up.bias,
                b_down=down.bias,
                **options,
            )

        return self._finish(block, residual)
