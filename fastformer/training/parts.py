"""A run's state as the ranks of a job hold it: each writes its own part, and any number of them read theirs.

On the disk is a torch.distributed.checkpoint: a file of each rank with the boxes that it has of every tensor, and an
index of all boxes by the tensors' names and places. A reader takes from it the boxes that overlap its own, so another
number of ranks, or another strategy, needs nothing but other boxes. A DTensor cannot describe all that a rank may have,
such as some rows of its share of q, k and v, which lie in one parameter side by side; boxes can.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from .parallel import Part

INDEX = ".metadata"
CONTENTS = (
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
)
"""Besides torch.distributed.checkpoint.metadata and dtypes, what an index is made of."""


def write_parts(directory: Path, parts: dict[str, Part]) -> list[Path]:
    """Writes ``parts`` (by name) of every rank; each has to call this. Returns the files of this rank.

    What several ranks have is written by one of them.

    Raises:
        OSError: a rank could not write, or boxes overlap; the same error on every rank.
    """
    planner = _Writing(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.save(parts, storage_writer=dcp.FileSystemWriter(directory), planner=planner)
    except dcp.api.CheckpointException as error:  # no Exception
        said = "; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items())
        raise OSError(said) from error
    return sorted(directory.glob(f"__{torch.distributed.get_rank()}_*"))


def read_parts(directory: Path, parts: dict[str, Part]) -> None:
    """Fills the boxes of ``parts`` (by name) from what :func:`write_parts` left; each rank for itself.

    Raises:
        ValueError: a tensor is not there, or not all of it, or it is of another size.
    """
    reader, index = dcp.FileSystemReader(directory), _read_index(directory)
    items = []
    for name, part in parts.items():
        saved = index.state_dict_metadata.get(name)
        if not isinstance(saved, TensorStorageMetadata):
            raise ValueError(f"cannot resume: {directory} has no {name}")
        if saved.size != part.size:
            raise ValueError(f"cannot resume: {name} is {tuple(saved.size)} in {directory}, {tuple(part.size)} here")
        found = create_read_items_for_chunk_list(name, saved, [_chunk(*box) for box in part.boxes])
        if sum(item.lengths.numel() for item in found) != sum(box.numel() for _, box in part.boxes):
            raise ValueError(f"cannot resume: {directory} has not all of {name}")
        items += found
    reader.set_up_storage_reader(index, True)
    reader.read_data(LoadPlan(items), _Reading(parts)).wait()


class _Writing(dcp.DefaultSavePlanner):
    """Writes boxes of tensors; the default would write tensors."""

    state_dict: dict[str, Part]

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, (size, boxes) in self.state_dict.items():
            for begin, box in boxes:
                data = TensorWriteData(_chunk(begin, box), TensorProperties.create_from_tensor(box), size)
                items.append(WriteItem(MetadataIndex(name, torch.Size(begin)), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        boxes = self.state_dict[index.fqn].boxes
        return next(box for begin, box in boxes if torch.Size(begin) == index.offset)


class _Reading(dcp.DefaultLoadPlanner):
    """Fills boxes in place; what is read is decided before."""

    def __init__(self, parts: dict[str, Part]) -> None:
        super().__init__()
        self.parts = parts

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.parts[index.fqn].boxes[index.index or 0][1]


def _chunk(begin: tuple[int, ...], box: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(begin), box.size())


def _read_index(directory: Path) -> Metadata:
    with (directory / INDEX).open("rb") as file:
        return _Index(file).load()


class _Index(pickle.Unpickler):
    """Torch keeps the index as a pickle, which could run anything: only what belongs in it is loaded."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in CONTENTS or (module == Metadata.__module__ and "." not in name):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return PurePath  # where it was written, which nobody asks
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in the index of a checkpoint")
