"""What the trainer asks of the other processes of a job. This is the answer where there are none.

The trainer calls these methods and no function of torch.distributed, so data parallel, sharded and tensor parallel
training are subclasses of :class:`Parallel`, and a single process pays nothing.

Each rank gets its own rows of every batch. The loss a rank sends backward is scaled by ``gradient_scale`` and by its
share of the targets that all ranks score in the step, so that the gradients, once reduced, are those of the one large
batch, however the targets are spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


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

    def prepare(self, model: nn.Module, device: torch.device) -> nn.Module:
        """What the objective calls instead of ``model``: on ``device``, wrapped or sharded in place. Comes before the
        optimizer is made."""
        return model.to(device)

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

    def first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on the rank that writes, which alone calls it, on every rank."""
        return function()

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in order of rank."""
        return [value]

    def holds_part(self) -> bool:
        """Whether a rank has parts of the parameters only, which :meth:`whole` puts together."""
        return False

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor``, of which this rank has the part that it has of the parameter ``name``, put together on the rank
        that writes; anything elsewhere. All ranks have to call this in the same order."""
        return tensor

    def share(self, name: str, whole: Tensor, like: Tensor) -> Tensor:
        """This rank's part of ``whole``, cut up and placed as ``like``, the parameter ``name``, is."""
        return whole.to(like.device, copy=True)

    def weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        """The whole state of ``model``, for its ``save_pretrained``; None where the model holds it itself."""
        if not self.holds_part():
            return None
        seen: dict[int, Tensor] = {}  # tied parameters have several names
        state = model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            if id(tensor) not in seen:
                seen[id(tensor)] = self.whole(name, tensor.detach())
        return {name: seen[id(tensor)] for name, tensor in state.items()}

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's whole tensors by parameter name, such that any number of ranks can load them."""
        state = {
            name: {key: self.whole(name, value) if value.dim() else value for key, value in optimizer.state[p].items()}
            for name, p in model.named_parameters()
            if p in optimizer.state
        }
        return {"state": state}

    def load_optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Puts back what :meth:`optimizer_state` returned.

        Raises:
            ValueError: it is of other parameters.
        """
        parameters, saved = dict(model.named_parameters()), state["state"]
        if unknown := sorted(saved.keys() - parameters.keys()):
            raise ValueError(f"optimizer: saved for other parameters, such as {', '.join(unknown[:5])}")
        for name, values in saved.items():
            p = parameters[name]
            optimizer.state[p] = {
                key: self.share(name, value, p) if value.dim() else value.to(p.device, copy=True)
                for key, value in values.items()
            }

    def barrier(self) -> None:
        """Waits until every rank is here."""
