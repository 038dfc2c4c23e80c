"""When the parameters of a submodule may be read instead of the submodule being called.

A fused kernel does the work of several submodules. Those that carry hooks, or that someone replaced (by an adapter, a
quantised or a parametrised layer), have to be called all the same.
"""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as TF
from torch.nn.modules import module as torch_module

from .. import functional
from .activation import GELU, ReLU, SiLU

M = TypeVar("M", bound=torch.nn.Module)

_FUNCTIONS = (
    (TF.relu, "relu"),
    (torch.relu, "relu"),
    (functional.relu, "relu"),
    (TF.gelu, "gelu"),
    (functional.gelu, "gelu"),
    (TF.silu, "silu"),
    (functional.silu, "silu"),
)


def is_plain(module: object, *types: type[M]) -> TypeGuard[M]:
    """Whether ``module`` is of exactly one of ``types`` and nothing but that type's ``forward`` would see a call."""
    if type(module) not in types:
        return False
    assert isinstance(module, torch.nn.Module)
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # some libraries replace the method of an instance
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def pending_dropout(module: torch.nn.Module, x: Tensor) -> tuple[Tensor, float]:
    """(x, the probability with which a kernel has to drop its elements): what ``module`` does, or has done here."""
    if is_plain(module, torch.nn.Dropout):
        return x, module.p if module.training else 0.0
    return module(x), 0.0


def activation_name(activation: Any) -> str | None:
    """The name by which the fused kernels know a function or module; None if they do not."""
    for function, name in _FUNCTIONS:
        if activation is function:
            return name
    if is_plain(activation, torch.nn.ReLU, ReLU):
        return "relu"
    if is_plain(activation, torch.nn.GELU, GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return "silu" if is_plain(activation, torch.nn.SiLU, SiLU) else None
