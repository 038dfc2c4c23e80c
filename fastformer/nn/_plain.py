"""Whether a layer may be read instead of called.

Fused blocks take the weights of several layers and never call those. A layer that someone replaced (an adapter, a
quantised one), parametrised or put a hook on has to be called, or what was added to it would silently not happen.
"""

from __future__ import annotations

from torch.nn import Module


def is_plain(module: Module, *types: type[Module]) -> bool:
    """``module`` is exactly one of ``types`` and nothing watches its calls."""
    return type(module) in types and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
