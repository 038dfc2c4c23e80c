"""What the fused forwards of other libraries' layers are made of: which modules they may read instead of calling, and the
kernels over them.

A kernel that covers several modules never calls them. That is right only while nothing else depends on the call
(nn/submodules.py): so it is asked on every call, because hooks, adapters and dtypes come and go, and where the answer is
no, the original forward runs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import gelu

from .. import functional, nn
from ..nn import submodules
from ._proof import fingerprint

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LINEAR = (torch.nn.Linear, nn.Linear)
_CONV1D = "06ace03f789ec920"  # transformers' x @ weight + bias, the weight (in_features, out_features)

# The forward of activations of transformers; "act" calls its attribute of that name.
ACTIVATIONS = {
    "ce934bf3d5007abd": "gelu_tanh",  # NewGELUActivation
    "b0474c49906ffbfa": "gelu_tanh",  # FastGELUActivation
    "a6b769f04fcc0480": "gelu_tanh",  # AccurateGELUActivation
    "8529e0425e7d021e": "silu",  # SiLUActivation
    "0a1fd91c43719ca7": "act",  # GELUActivation, GELUTanh
}


def untouched(*modules: torch.nn.Module) -> bool:
    """Whether calling the modules does nothing but run the forward of their classes."""
    for module in modules:  # a loop, not all(): this runs on every call
        if not submodules.is_plain(module, type(module)):
            return False
    return True


@functools.lru_cache(maxsize=None)
def is_conv1d(cls: type) -> bool:
    return cls.__name__ == "Conv1D" and fingerprint(getattr(cls, "forward", None)) == _CONV1D


def linear_weights(module: torch.nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The weight ``(out_features, in_features)`` and the bias of a linear layer, None if it has to be called."""
    cls = type(module)
    if cls not in LINEAR and not is_conv1d(cls):
        return None
    if not untouched(module):
        return None
    return (module.weight if cls in LINEAR else module.weight.t()), module.bias


@functools.lru_cache(maxsize=None)
def _known_activation(cls: type) -> str | None:
    return ACTIVATIONS.get(fingerprint(getattr(cls, "forward", None)) or "")


def activation_name(activation: object) -> str | None:
    """What the fused feed-forward calls a module or function, None if it has no such activation."""
    name = submodules.activation_name(activation)
    if name is not None or not isinstance(activation, torch.nn.Module):
        return name
    cls = type(activation)
    known = _known_activation(getattr(cls, "optimized_from", cls))
    if known is None or not untouched(activation):
        return None
    if known != "act":
        return known
    act = activation.act
    if isinstance(act, functools.partial):
        return "gelu_tanh" if act.func is gelu and act.keywords == {"approximate": "tanh"} and not act.args else None
    return submodules.activation_name(act)


def fits(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the kernels take x beside these parameters: of one dtype, unless autocast makes them so."""
    device = x.device.type
    if x.dtype not in DTYPES or (x.dtype == torch.float64 and device != "cpu"):
        return False
    if torch.is_autocast_enabled(device):
        return True
    for p in parameters:
        if p is not None and (p.dtype != x.dtype or p.device != x.device):
            return False
    return True


def feed_forward(
    x: Tensor,
    first: torch.nn.Module,
    activation: object,
    second: torch.nn.Module,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor | None:
    """``residual + second(dropout(activation(first(x))))``; None where the modules have to be called."""
    name, one, two = activation_name(activation), linear_weights(first), linear_weights(second)
    if name is None or one is None or two is None or not fits(x, *one, *two):
        return None
    return _with_residual(
        lambda added: functional.feed_forward(x, *one, *two, name, dropout_p=dropout_p, residual=added), x, residual
    )


def gated_feed_forward(
    x: Tensor,
    gate: tuple[Tensor, Tensor | None] | None,
    up: tuple[Tensor, Tensor | None] | None,
    activation: object,
    second: torch.nn.Module,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor | None:
    """``residual + second(dropout(activation(gate(x)) * up(x)))`` of the first two's weights; None as above."""
    name, down = activation_name(activation), linear_weights(second)
    if name is None or gate is None or up is None or down is None or not fits(x, *gate, *up, *down):
        return None
    biases = {"b_gate": gate[1], "b_up": up[1], "b_down": down[1]}
    return _with_residual(
        lambda added: functional.gated_feed_forward(
            x, gate[0], up[0], down[0], name, dropout_p=dropout_p, residual=added, **biases
        ),
        x,
        residual,
    )


def _with_residual(block, x: Tensor, residual: Tensor | None) -> Tensor:
    """The block's last matmul adds the residual if the two are of one dtype and autocast does not change that."""
    if residual is None or (residual.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)):
        return block(residual)
    return residual + block(None)
