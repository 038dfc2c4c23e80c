"""What the trainer asks of the other processes of a job. This is the answer where there are none.

The trainer calls these methods and no function of torch.distributed, so data parallel, sharded and tensor parallel
training are subclasses of :class:`Parallel`, and a single process pays nothing.

Each rank gets its own rows of every batch. The loss a rank sends backward is scaled by ``gradient_scale`` and by its
share of the targets that all ranks score in the step, so that the gradients, once reduced, are those of the one large
batch, however the targets are spread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .config import ParallelConfig

T = TypeVar("T")


class Part(NamedTuple):
    """What a rank has of a tensor.

    Attributes:
        size: of the whole tensor.
        boxes: where in the whole each box begins, and a view of it in this rank's memory.
    """

    size: torch.Size
    boxes: list[tuple[tuple[int, ...], Tensor]]


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

    def each(self, function: Callable[[], T]) -> list[T]:
        """What ``function`` returns on every process of the job, in order; an error of one is raised on all."""
        return [function()]

    def scaler(self, device_type: str, enabled: bool) -> torch.amp.GradScaler:
        """The scaler of float16's loss; a step that it skips, all ranks skip."""
        return torch.amp.GradScaler(device_type, enabled=enabled)

    def holds_part(self) -> bool:
        """Whether a rank has parts of the parameters only, which :meth:`whole` puts together."""
        return False

    def part(self, name: str, tensor: Tensor) -> Part:
        """Where in the whole what this rank has of ``tensor``, cut up as the parameter ``name``, belongs."""
        return Part(tensor.shape, [((0,) * tensor.dim(), tensor)])

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
        """The optimizer's whole tensors by parameter name, such that any number of ranks can load them; None for those
        that are in :meth:`optimizer_parts`."""
        state = {
            name: {key: self._saved(name, value) if value.dim() else value for key, value in optimizer.state[p].items()}
            for name, p in model.named_parameters()
            if p in optimizer.state
        }
        return {"state": state}

    def _saved(self, name: str, tensor: Tensor) -> Tensor | None:
        return None if self.holds_part() else self.whole(name, tensor)

    def optimizer_parts(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Part]:
        """What this rank has of the optimizer's tensors."""
        return {
            f"{key}/{name}": self.part(name, value)
            for name, p in model.named_parameters()
            for key, value in optimizer.state.get(p, {}).items()
            if value.dim()
        }

    def load_optimizer_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], parts: Path | None = None
    ) -> None:
        """Puts back what :meth:`optimizer_state` returned, and from the directory ``parts`` what is None there.

        Raises:
            ValueError: it is of other parameters.
        """
        parameters, saved = dict(model.named_parameters()), state["state"]
        if unknown := sorted(saved.keys() - parameters.keys()):
            raise ValueError(f"optimizer: saved for other parameters, such as {', '.join(unknown[:5])}")
        missing = {}
        for name, values in saved.items():
            p = parameters[name]
            mine = optimizer.state[p] = {}
            for key, value in values.items():
                if value is None:
                    mine[key] = torch.empty_like(p, requires_grad=False)
                    missing[f"{key}/{name}"] = self.part(name, mine[key])
                else:
                    mine[key] = self.share(name, value, p) if value.dim() else value.to(p.device, copy=True)
        read_missing(missing, parts)


@contextmanager
def processes(config: ParallelConfig, device: str) -> Iterator[Parallel]:
    """:func:`.distributed.connect`, whose import takes a second, only where there may be several processes."""
    if config.strategy == "none" and os.environ.get("WORLD_SIZE", "1") == "1":
        yield Parallel()
        return
    from .distributed import connect

    with connect(config, device) as parallel:
        yield parallel


def read_missing(missing: dict[str, Part], parts: Path | None) -> None:
    """Fills ``missing``, if there is something, from the directory ``parts`` of a checkpoint.

    Raises:
        ValueError: there is no such directory, or it has no such tensors.
    """
    if not missing:
        return
    if parts is None:
        raise ValueError(f"state: has no {next(iter(missing))}, which is in files of its own; read it by load_state")
    from .parts import read_parts  # torch.distributed.checkpoint takes a second to import

    read_parts(parts, missing)
