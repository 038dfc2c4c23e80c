"""What the trainer asks of the other processes of a job. This is the answer where there are none.

The trainer calls these methods and no function of torch.distributed, so data parallel, sharded and tensor parallel
training are subclasses of :class:`Parallel`, and a single process pays nothing.

Each rank gets its own rows of every batch. The loss a rank sends backward is scaled by ``gradient_scale`` and by its
share of the targets that all ranks score in the step, so that the gradients, once reduced, are those of the one large
batch, however the targets are spread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Parallel:
    """One process.

    Attributes:
        rank, world_size: this process among those that take different rows of a batch.
        writes: this process writes files and shows progress.
        gradient_scale: what the loss is multiplied by: the number of ranks where gradients are averaged over them, 1
            where they are added up.
    """

    rank: int = 0
    world_size: int = 1
    writes: bool = True
    gradient_scale: float = 1.0

    def prepare(self, model: nn.Module) -> nn.Module:
        """What the objective calls instead of ``model``: wrapped or sharded. Comes before the optimizer is made."""
        return model

    @contextmanager
    def accumulating(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Around forward and backward of one of a step's batches; gradients have to be reduced after the ``last``."""
        yield

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` added up over the ranks, on every rank."""
        return tensor

    def total(self, number: int) -> int:
        """``number`` added up over the ranks, on every rank."""
        return number

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on some rank: what one decides by its clock or a signal, all have to do."""
        return flag

    def same(self, number: float) -> float:
        """The first rank's ``number``, on every rank."""
        return number

    def clip(self, parameters: list[nn.Parameter], largest: float) -> Tensor:
        """Scales the gradients so that their norm, over all shards, is at most ``largest``; returns it as it was."""
        return nn.utils.clip_grad_norm_(parameters, largest).detach()

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in order of rank, on the rank that writes (elsewhere the list may be empty)."""
        return [value]

    def weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        """The whole state of ``model``, gathered, for its ``save_pretrained``; None where the model holds it itself."""
        return None

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state of ``optimizer``, gathered, such that any number of ranks can load it."""
        return optimizer.state_dict()

    def load_optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Puts back what :meth:`optimizer_state` returned."""
        optimizer.load_state_dict(state)

    def barrier(self) -> None:
        """Waits until every rank is here."""
