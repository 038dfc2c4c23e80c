"""Activation recomputation (Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174).

A block keeps its input only and runs forward once more in the backward pass: a third more arithmetic, and of all the
blocks' activations those of one at a time. The random generators are put back for the second pass, so dropout drops the
same elements and the gradients are the same to the bit. Applied to a model from outside.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a transformer: the entries of the outermost ModuleLists that hold one class only.

    Raises:
        ValueError: the model has no such list.
    """
    blocks: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1:
            blocks.extend(module)
            return
        for child in module.children():
            search(child)

    search(model)
    if not blocks:
        raise ValueError(f"model: {type(model).__name__} has no ModuleList of equal blocks to recompute")
    return blocks


def recompute_blocks(model: nn.Module) -> int:
    """Makes every block of ``model`` recompute its activations in the backward pass; returns how many blocks that are.

    Parameters, their names and evaluation stay as they are. A block that recomputes already is left alone.
    """
    blocks = find_blocks(model)
    for block in blocks:
        if not isinstance(block.forward, _Recomputed):
            block.forward = _Recomputed(block.forward)  # type: ignore[method-assign]
    return len(blocks)


class _Recomputed:
    """``forward`` of a block, its activations dropped where a backward pass will come."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward
        functools.update_wrapper(self, forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
