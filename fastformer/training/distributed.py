"""Training on several processes, started by ``torchrun``: data parallel, fully sharded, tensor parallel.

    ddp     every rank has the whole model and some rows of the batch; gradients are averaged while backward runs
    fsdp    weights, gradients and optimizer state are spread over the ranks too; a block's weights are gathered when it
            runs (Rajbhandari et al., ZeRO, arXiv:1910.02054, stage 3; torch's ``fully_shard``)
    tp      every layer is split over the ranks, :mod:`.tensor_parallel`; several such groups are data parallel

With ``parallel.tensor`` = T, ranks r T … r T + T - 1 share the layers and read the same rows; ddp or fsdp is between
those groups. The global batch, the order of the data and the first weights are the same for any number of ranks, so
the losses are too, but for rounding and for dropout, which each group draws for its own rows.

A checkpoint has the weights as whole tensors, put together on the first rank. With fsdp and tp every rank writes what
it has of the optimizer's state, with its place in the whole; any number of ranks and any strategy can resume from it.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..nn import RelativePositionBias
from .config import DTYPES, ParallelConfig, resolve_device
from .parallel import Parallel, Part
from .recompute import find_blocks
from .tensor_parallel import Piece, tensor_parallel

T = TypeVar("T")

# A rank whose connection broke waits so long, in which torchrun notices and names the rank that is the reason.
SECONDS_FOR_THE_LAUNCHER = 5.0
BROKEN_CONNECTION = ("closed by peer", "reset by peer", "broken pipe", "connection was likely closed")


@contextmanager
def connect(config: ParallelConfig, device: str = "auto") -> Iterator[Parallel]:
    """The processes that ``torchrun`` started, for a :class:`.Trainer`'s ``parallel``; inside, they are connected.

    An error inside is handed to ``torchrun``, which ends the other ranks and prints it.

    Args:
        config: how they share the work; with strategy "none" there is one process.
        device: as ``run.device``.

    Raises:
        ValueError: a strategy without ``torchrun`` or the other way round, or sizes that do not fit.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    count = int(os.environ["WORLD_SIZE"]) if launched else 1
    if config.strategy == "none":
        if count > 1:
            raise ValueError(
                f"parallel.strategy: none, but there are {count} processes, which would each do the same; "
                "use ddp, fsdp or tp"
            )
        yield Parallel()
        return
    if not launched:
        raise ValueError(
            f"parallel.strategy: {config.strategy} needs several processes; start them with "
            "`torchrun --nproc-per-node N -m fastformer ...`"
        )
    gpu = resolve_device(device).type == "cuda"
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    handler = get_error_handler()
    handler.initialize()
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(minutes=config.timeout_minutes)
        )
        yield Distributed(config, "cuda" if gpu else "cpu")
    except Exception as error:
        if any(words in str(error).lower() for words in BROKEN_CONNECTION):
            time.sleep(SECONDS_FOR_THE_LAUNCHER)
        handler.record_exception(error)
        raise
    dist.destroy_process_group()


class Distributed(Parallel):
    """The processes of a job, torch.distributed being initialised.

    ``rank`` and ``world_size`` are those of the groups that read different rows.

    Args:
        config: strategy and sizes.
        device_type: "cpu" or "cuda", where the tensors are.

    Raises:
        ValueError: the ranks cannot be divided so.
    """

    def __init__(self, config: ParallelConfig, device_type: str) -> None:
        count = dist.get_world_size()
        tensor = config.tensor or (count if config.strategy == "tp" else 1)
        if count % tensor:
            raise ValueError(f"parallel.tensor: {tensor} does not divide the {count} processes")
        mesh = init_device_mesh(device_type, (count // tensor, tensor), mesh_dim_names=("data", "tensor"))
        self.config = config
        self.data, self.tensor = mesh["data"], mesh["tensor"]
        self.rank, self.world_size = self.data.get_local_rank(), self.data.size()
        self.writes = dist.get_rank() == 0
        self.gradient_scale = float(self.world_size)  # both ddp and fsdp average
        self.sharded = config.strategy == "fsdp"
        self.pieces: dict[str, Piece] = {}
        self._split: set[int] = set()  # ids of the parameters that tensor parallel ranks share

    def prepare(self, model: nn.Module, device: torch.device) -> nn.Module:
        """``model`` on ``device``, split and sharded in place, or wrapped; the first rank's weights go to all."""
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
        if self.rank:
            torch.manual_seed((torch.initial_seed() + 1_000_003 * self.rank) % 2**63)
        if self.tensor.size() > 1:
            self.pieces = tensor_parallel(model, self.tensor)
        if self.sharded:
            self._shard(model)  # moves one block at a time
        model.to(device)
        self._split = {id(p) for name, p in model.named_parameters() if name in self.pieces}
        if self.sharded or self.world_size == 1:
            return model
        return DistributedDataParallel(model, process_group=self.data.get_group(), gradient_as_bucket_view=True)

    def _shard(self, model: nn.Module) -> None:
        dtype = DTYPES[self.config.gather_dtype]
        policy = MixedPrecisionPolicy() if dtype == torch.float32 else MixedPrecisionPolicy(dtype, torch.float32)
        options: dict[str, Any] = {"mesh": self.data, "reshard_after_forward": True, "mp_policy": policy}
        # About outputs that are changed in place, which no layer does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        for block in find_blocks(model):
            # T5's first block lends its table to the others, so it is gathered with what all share.
            if not any(isinstance(module, RelativePositionBias) for module in block.modules()):
                fully_shard(block, **options)
        name = type(model).__name__
        fully_shard(model, **options)
        type(model).__name__ = name  # which goes into config.json

    @contextmanager
    def accumulating(self, model: nn.Module, last: bool) -> Iterator[None]:
        """With ddp gradients are reduced after the last batch; with fsdp after each, or they would be held whole."""
        if last or not isinstance(model, DistributedDataParallel):
            yield
        else:
            with model.no_sync():
                yield

    def sum(self, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=self.data.get_group())
        return tensor

    def total(self, number: int) -> int:
        return int(self.sum(torch.tensor(number)))

    def any(self, flag: bool) -> bool:
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags)
        return bool(flags)

    def same(self, number: float) -> float:
        first = torch.tensor(number, dtype=torch.float64)
        dist.broadcast(first, 0)
        return float(first)

    def first(self, function: Callable[[], T]) -> T:
        result = [function() if self.writes else None]
        dist.broadcast_object_list(result, 0)
        return result[0]  # type: ignore[return-value]

    def clip(self, parameters: list[nn.Parameter], largest: float) -> Tensor:
        if not self.sharded and self.tensor.size() == 1:
            return super().clip(parameters, largest)
        split, common = [], []
        for p in parameters:
            if p.grad is not None:
                (split if id(p) in self._split else common).append(_local(p.grad))
        norms = torch.stack([nn.utils.get_total_norm(grads) for grads in (split, common) if grads])
        squares = norms.square()
        squares[-1] /= self.tensor.size() if common else 1  # every rank of a group has them
        for mesh in (self.data,) * self.sharded + (self.tensor,):
            dist.all_reduce(squares, group=mesh.get_group())
        norm = squares.sum().sqrt()
        torch._foreach_mul_(split + common, (largest / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.data.get_group())
        return values

    def each(self, function: Callable[[], T]) -> list[T]:
        own: Exception | None = None
        done: tuple[T | None, str] = (None, "")
        try:
            done = (function(), "")
        except Exception as error:
            own, done = error, (None, str(error) or type(error).__name__)
        of_all: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_all, done)
        if own is not None:
            raise own
        if said := [f"rank {rank}: {message}" for rank, (_, message) in enumerate(of_all) if message]:
            raise RuntimeError("; ".join(said))
        return [result for result, _ in of_all]

    def scaler(self, device_type: str, enabled: bool) -> torch.amp.GradScaler:
        return (_Scaler if self.holds_part() else torch.amp.GradScaler)(device_type, enabled=enabled)

    def holds_part(self) -> bool:
        return self.sharded or self.tensor.size() > 1

    def part(self, name: str, tensor: Tensor) -> Part:
        local, size, begin = _local(tensor), list(tensor.shape), [0] * tensor.dim()
        if isinstance(tensor, DTensor):  # some of the rows, as many on each rank but the last ones
            begin[0] = min(self.rank * -(-size[0] // self.world_size), size[0])
        if name not in self.pieces:
            return Part(torch.Size(size), [(tuple(begin), local)] if local.numel() else [])
        (dim, count), length = self.pieces[name]
        mine, every = size[dim] // count, length // count  # of q, k or v, which lie side by side: this rank's and all
        first = min(self.tensor.get_local_rank() * -(-every // self.tensor.size()), every)
        boxes = []
        for index in range(count):
            low = max(begin[dim], index * mine)
            high = min(begin[dim] + local.shape[dim], (index + 1) * mine)
            if low < high and local.numel():
                place = (*begin[:dim], index * every + first + low - index * mine, *begin[dim + 1 :])
                boxes.append((place, local.narrow(dim, low - begin[dim], high - low)))
        size[dim] = length
        return Part(torch.Size(size), boxes)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if name in self.pieces:
            split, size = self.pieces[name]
            tensor = split.gather(tensor, self.tensor, size)
        return tensor.cpu() if self.writes else torch.empty(0)

    def share(self, name: str, whole: Tensor, like: Tensor) -> Tensor:
        if name in self.pieces:
            whole = self.pieces[name].split.share(whole.to(like.device), self.tensor)
        if isinstance(like, DTensor):
            whole = whole.to(like.device)
            return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
        return super().share(name, whole, like)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Scaler(torch.amp.GradScaler):
    """Ranks that have parts of the gradient all take a step, or, where one has an infinite part, all skip it."""

    def _unscale_grads_(self, *args: Any, **kwargs: Any) -> dict[torch.device, Tensor]:
        found = super()._unscale_grads_(*args, **kwargs)
        for infinite in found.values():
            dist.all_reduce(infinite, dist.ReduceOp.MAX)  # not a sum: fused optimizers skip at 1
        return found
