"""The two ways into a kernel.

Eager calls go straight to a backend function, through one thin ``autograd.Function`` where a gradient is needed: an
operator registered in Python costs several microseconds a call, more than a small kernel. Everything that must *see* an
operation rather than run it (``torch.compile``, ``torch.export``, fake tensors, dispatch modes, ``torch.func``) gets
``torch.ops.fastformer.<op>`` instead, defined here from the same forward and backward functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack

PLAIN = (Tensor, torch.nn.Parameter)
_library = torch.library.Library("fastformer", "DEF")
operators: list[str] = []


def through_operator(*tensors: Tensor | None) -> bool:
    """Whether this call has to go through the registered operator."""
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack() or peek_interpreter_stack() is not None:
        return True
    for t in tensors:  # a loop, not any(): this runs on every eager call
        if t is not None and type(t) not in PLAIN:
            return True
    return False


def transforming() -> bool:
    """Whether this call is inside a transform of ``torch.func``."""
    return peek_interpreter_stack() is not None


def needs_grad(*tensors: object) -> bool:
    """Whether autograd has to record a call of these arguments, tensors or, unchecked, anything else."""
    if not torch.is_grad_enabled():
        return False
    for t in tensors:  # a loop, not any(): this runs on every eager call
        if t is not None and getattr(t, "requires_grad", False):
            return True
    return False


def once_differentiable(backward: Callable) -> Callable:
    """torch's decorator of this name for an ``autograd.Function``'s backward, at no cost where nothing is recorded."""
    recorded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def call(ctx, *grads):
        return recorded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return call


def register(schema: str, implementation: Callable, fake: Callable, *, mutates: bool = False) -> Callable:
    """Defines ``fastformer::<schema>`` with one implementation for CPU and CUDA and a shape-only one.

    Returns the operator (``torch.ops.fastformer.<name>.default``).
    """
    name = schema.split("(", 1)[0]
    tags = () if mutates else (torch.Tag.pt2_compliant_tag,)
    _library.define(schema, tags=tags)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"fastformer::{name}", fake, lib=_library)
    operators.append(name)
    return getattr(torch.ops.fastformer, name).default


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Gives the operator ``fastformer::<name>`` its derivative, itself made of registered operators."""
    torch.library.register_autograd(f"fastformer::{name}", backward, setup_context=setup_context, lib=_library)
    _transformed[name] = _transformable(name, backward, setup_context)


def operator(name: str, *args: object) -> Any:
    """Calls ``torch.ops.fastformer.<name>``, under ``torch.func`` transforms as well.

    torch's own registration of a derivative does not reach into ``torch.func.grad`` and ``vmap``; there the operator is
    wrapped once per transform.
    """
    if torch.compiler.is_compiling() or peek_interpreter_stack() is None:
        return getattr(torch.ops.fastformer, name)(*args)
    if name not in _transformed:
        _transformed[name] = _transformable(name, None, None)
    return _transformed[name].apply(*args)


_transformed: dict[str, type[torch.autograd.Function]] = {}


def _transformable(name: str, derivative: Callable | None, setup: Callable | None) -> type[torch.autograd.Function]:
    class Transformable(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return operator(name, *args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            if setup is not None:
                setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx, *grads):
            if derivative is None:
                raise NotImplementedError(f"fastformer.{name}: has no second derivative")
            return derivative(ctx, *grads)

        @staticmethod
        def vmap(info, in_dims, *args):
            # One call per element: right for every operator; none has a use for batching that its rows do not serve.
            calls = []
            for i in range(info.batch_size):
                element = [
                    a.select(d, i) if isinstance(a, Tensor) and d is not None else a
                    for a, d in zip(args, in_dims, strict=True)
                ]
                calls.append(operator(name, *element))
            if isinstance(calls[0], Tensor):
                return torch.stack(calls), 0
            outputs = tuple(torch.stack(column) for column in zip(*calls, strict=True))
            return outputs, (0,) * len(outputs)

    return Transformable


def new_seed() -> Tensor:
    """A dropout seed from torch's CPU generator: reproducible by ``torch.manual_seed``, no device synchronisation."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
