"""Modules that keep some of their linear layers next to each other in memory, so that those are one matmul.

The layers stay what they are, a weight and a bias each, in the state and for an optimizer. Their values move into one
piece of memory when the module is made, moved, converted, copied or unpickled; loading a state and optimizer steps
write into it. Where the memory no longer follows, because a layer or a parameter was replaced, layers run one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..functional._joined import joined, joined_linear
from ._plain import is_plain
from .linear import Linear

LINEAR = (torch.nn.Linear, Linear)


class JoinedLayers(torch.nn.Module):
    """Base of such a module.

    Attributes:
        joined_layers: names of the linear layers, with inputs of one size.
    """

    joined_layers: ClassVar[tuple[str, ...]]

    def join(self) -> None:
        """Moves the layers' values into one piece of memory, unless they are in one or cannot be."""
        layers = [getattr(self, name) for name in self.joined_layers]
        if all(is_plain(layer, *LINEAR) for layer in layers):
            _join([layer.weight for layer in layers])
            _join([layer.bias for layer in layers])

    def joined_output(self, x: Tensor) -> Tensor | None:
        """The outputs of all the layers for x ``(*, in_features)``, side by side in one ``(*, sum of out_features)``;
        None where they have to be called one by one."""
        layers = [getattr(self, name) for name in self.joined_layers]
        if not all(is_plain(layer, *LINEAR) for layer in layers):
            return None
        return joined_linear(x, [layer.weight for layer in layers], [layer.bias for layer in layers])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.join()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:  # copies and unpickled ones
        super().__setstate__(state)
        self.join()


def _join(parameters: list[torch.nn.Parameter]) -> None:
    first = parameters[0]
    for p in parameters:
        # Subclasses are distributed or quantised, and what has no memory yet is joined when it is given some.
        if type(p) is not torch.nn.Parameter or p.is_meta or p.dtype != first.dtype or p.device != first.device:
            return
        if p.shape[1:] != first.shape[1:]:
            return
    if len({id(p) for p in parameters}) < len(parameters) or joined(*parameters) is not None:
        return
    with torch.no_grad():
        whole = torch.cat(tuple(parameters))
    for p, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        p.data = part
