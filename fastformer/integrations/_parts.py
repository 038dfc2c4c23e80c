"""What the fused forwards of other libraries' layers are made of: which modules they may read instead of calling, and
the kernels over them.

A kernel that covers several modules never calls them. That is right only while nothing else depends on the call
(nn/submodules.py). It is asked on every call, because hooks, adapters and dtypes come and go; where the answer is no,
the original forward runs.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import gelu

from .. import functional, nn
from ..functional.activation import elementwise
from ..nn import submodules
from ._proof import fingerprint

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Fused(torch.nn.Module):
    """What stands before an original class in the bases of the class that is made of both (_rules.py)."""

    proof: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Methods of the original class -> fingerprints, one of which is theirs."""
    operations: ClassVar[str] = ""
    """For the report: what computes it now."""
    optimized_from: ClassVar[type]
    """The original class."""

    @staticmethod
    def unless(module: torch.nn.Module) -> str | None:
        """Why an instance of a proved class is left, None if it is not."""
        return None


# ---- whether the kernels may be used ---------------------------------------------------------------------------------


def untouched(*modules: torch.nn.Module) -> bool:
    """Whether calling the modules does nothing but run the forward of their classes."""
    for module in modules:  # a loop, not all(): this runs on every call
        if not submodules.is_plain(module, type(module)):
            return False
    return True


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


# ---- activations -----------------------------------------------------------------------------------------------------

# The forward of activations of transformers; "act" calls its attribute of that name.
_FORMS = {
    "ce934bf3d5007abd": "gelu_tanh",  # NewGELUActivation
    "b0474c49906ffbfa": "gelu_tanh",  # FastGELUActivation
    "a6b769f04fcc0480": "gelu_tanh",  # AccurateGELUActivation
    "8529e0425e7d021e": "silu",  # SiLUActivation
    "0a1fd91c43719ca7": "act",  # GELUActivation, GELUTanh
}


class Activation(Fused):
    """GELU, its tanh approximation or SiLU in one pass."""

    proof = {"forward": tuple(_FORMS)}
    operations = "activation"
    form: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.form = _form(cls.optimized_from)

    def forward(self, input: Tensor) -> Tensor:
        name = _name(self, self.form)
        return elementwise(input, name) if name is not None and fits(input) else super().forward(input)

    @staticmethod
    def unless(module: torch.nn.Module) -> str | None:
        return None if provable_activation(module) else "there is no fused kernel for it"


def activation_name(activation: object) -> str | None:
    """What the fused feed-forward calls a module or function, None if it has to be called."""
    if isinstance(activation, Activation):
        return _name(activation, activation.form) if untouched(activation) else None
    return submodules.activation_name(activation)


def provable_activation(activation: object) -> str | None:
    """:func:`activation_name` once the model is optimized."""
    if isinstance(activation, torch.nn.Module) and not isinstance(activation, Fused):
        form = _form(type(activation))
        if form is not None:
            return _name(activation, form)
    return activation_name(activation)


def _form(cls: type) -> str | None:
    return _FORMS.get(fingerprint(getattr(cls, "forward", None)) or "")


def _name(activation: Any, form: str | None) -> str | None:
    if form != "act":
        return form
    act = activation.act
    if isinstance(act, functools.partial):
        return "gelu_tanh" if act.func is gelu and act.keywords == {"approximate": "tanh"} and not act.args else None
    return submodules.activation_name(act)


# ---- linear layers and blocks of them --------------------------------------------------------------------------------


class Conv1D(Fused):
    """transformers' linear layer with a weight ``(in_features, out_features)``."""

    proof = {"forward": ("06ace03f789ec920",)}
    operations = "linear"

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.t(), self.bias)


def linear_weights(module: torch.nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The weight ``(out_features, in_features)`` and the bias of a linear layer, None if it has to be called."""
    if submodules.is_plain(module, torch.nn.Linear, nn.Linear):
        return module.weight, module.bias
    if isinstance(module, Conv1D) and untouched(module):
        return module.weight.t(), module.bias
    return None


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
