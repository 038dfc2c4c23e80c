"""Activations by the names that appear in config.json."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# activation_function -> the fused feed-forward's name for it; the rest runs unfused.
FUSED_ACTIVATIONS: dict[str, str] = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
OTHER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda x: F.relu(x).square(),
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def check_activation(name: str, activation: str) -> None:
    """Raises ValueError, naming the configuration's field ``name``, unless there is such an activation."""
    if activation not in FUSED_ACTIVATIONS and activation not in OTHER_ACTIVATIONS:
        accepted = ", ".join(sorted((*FUSED_ACTIVATIONS, *OTHER_ACTIVATIONS)))
        raise ValueError(f"{name}: {activation!r} is not one of {accepted}")
