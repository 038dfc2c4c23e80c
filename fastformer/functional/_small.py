"""Calls that take longer than their arithmetic, and the two short ways they go.

Without a derivative, one C++ function checks and runs an eager call of ordinary CPU tensors (csrc/python/plain.h):
the general way's Python takes 5 to 10 microseconds, PyTorch's whole layer_norm of 64 numbers 4.

With a derivative there is no such way: a node of autograd's graph written in Python takes 10 to 20 microseconds,
forward and backward. PyTorch's own function, whose node is C++, runs instead where the registry says so. It is asked
first and checks its arguments itself; where it refuses, the general way says what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..backends import registry
from ._doors import through_operator


def eager_cpu(x: object) -> bool:
    """Whether ``x`` is an ordinary CPU tensor, nothing watches this call, and no other backend is asked for."""
    return not through_operator() and type(x) is Tensor and x.is_cpu and registry.overridden() in (None, "cpu")


def without_dropout(dropout_p: float, training: bool) -> bool:
    """Whether nothing is dropped, by a probability that is one."""
    return dropout_p == 0 or (not training and 0 < dropout_p <= 1)


def torch_instead(name: str, x: Tensor, function: Callable[..., Any], *args: Any) -> Any:
    """``function(x, *args)``, PyTorch's ``name``, if x is small enough and PyTorch takes the arguments; else None."""
    return attempt(function, x, *args) if registry.prefers_torch(name, x.numel()) else None


def attempt(function: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """``function(x, *args)``, a tensor or several, in x's dtype; None if it takes exception to its arguments."""
    if not x.is_floating_point():
        return None
    try:
        out = function(x, *args)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None
    first = out if isinstance(out, Tensor) else out[0]
    return out if first.dtype == x.dtype else None  # autocast may have had another in mind
