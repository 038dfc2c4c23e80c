"""Which kernel runs a feed-forward's first matmul with the activation inside, if any.

Otherwise the matmul is the library's, and what follows it the registry's "activation". :data:`DEFAULT` is empty: on no
device has a measurement shown that one of these is faster.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import registry

OP = "linear_activation"
FUSED = ("cuda", "triton")  # asked for by name
DEFAULT: dict[str, str] = {}  # device type -> one of FUSED


def chosen(x: Tensor) -> str | None:
    """The one that is asked for, or runs by default, where it can."""
    name = registry.overridden() or DEFAULT.get(x.device.type)
    return name if name in FUSED else None


def refusal(name: str, x: Tensor, w1: Tensor, w_up: Tensor | None, w2: Tensor | None) -> str | None:
    """Why backend ``name`` has no kernel for x ``(*, K)``, w1, w_up ``(F, K)`` and, where gradients are wanted, w2
    ``(K, F)``; None if it has one."""
    reason = registry.refusal(name, OP, x.device.type, x.dtype, ())
    if reason is None:
        of_module = getattr(registry.load(name, OP), "refusal", None)
        if of_module is not None:
            reason = of_module(x.reshape(-1, x.shape[-1]), w1, w_up, w2)
    return reason


def select(x: Tensor, w1: Tensor, w_up: Tensor | None, w2: Tensor | None) -> ModuleType | None:
    """The module with that kernel's ``forward`` and ``backward``, or None: the library's matmul."""
    name = chosen(x)
    if name is None or refusal(name, x, w1, w_up, w2) is not None:
        return None
    return registry.load(name, OP)
