"""Checkpoints that are whole or not there, the newest beside a few before it.

A checkpoint is a Hugging Face model directory (config.json, safetensors, in shards where they are large) with the
tokenizer's files and ``training_state.pt`` (optimizer, random number generators, position in the data, settings). Where
ranks have parts of a model, the optimizer's tensors are in ``training_state/``, which all of them write (parts.py). It
is written to a temporary directory, to the disk, with ``manifest.json`` last, which has the size and checksum of every
other file; then the newest, ``checkpoint``, is renamed to ``checkpoint-<its step>``, and the new one takes its place.
A process killed at any moment, or a disk that fills up, leaves the new checkpoint or those before it, never a mixture;
and one whose files were damaged later is found out and passed over.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..data import Tokenizer
from .parallel import Parallel, Part

STATE_FILE = "training_state.pt"
PARTS = "training_state"
MANIFEST_FILE = "manifest.json"
NEWEST = "checkpoint"
MERGED = "merged"
ADAPTER_CONFIG = "adapter_config.json"
MAX_SHARD_SIZE = "5GB"


class CheckpointError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


def save_checkpoint(
    directory: str | Path,
    model: torch.nn.Module,
    tokenizer: Tokenizer | None,
    state: dict[str, Any] | None = None,
    *,
    keep: int = 1,
    weights: dict[str, torch.Tensor] | None = None,
    parts: dict[str, Part] | None = None,
    parallel: Parallel | None = None,
) -> Path:
    """Writes ``model`` (by its ``save_pretrained``), ``tokenizer`` and ``state`` as one.

    Args:
        directory: where; what is there is replaced.
        keep: how many checkpoints there are afterwards: with 2, the one replaced stays as ``<directory>-<its step>``.
        weights: instead of the model's own ``state_dict``, passed on to ``save_pretrained``.
        parts: what this rank has of the tensors that are not in ``state``.
        parallel: the other processes of the job, all of which have to call this; one writes all but the parts.

    Raises:
        CheckpointError: a rank could not write (a full disk, for one); raised by all. Nothing of it is left, and the
            checkpoints before it are.
    """
    parallel = parallel or Parallel()
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory.with_name(f"{directory.name}.writing")
    sums: dict[str, tuple[int, int]] = {}

    def write_whole() -> None:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        given = {} if weights is None else {"state_dict": weights}
        model.save_pretrained(fresh, max_shard_size=MAX_SHARD_SIZE, **given)
        if tokenizer is not None:
            tokenizer.save(fresh)
        if state is not None:
            torch.save(state, fresh / STATE_FILE)

    def write_part() -> dict[str, tuple[int, int]]:
        from .parts import write_parts  # torch.distributed.checkpoint takes a second to import

        return {str(path.relative_to(fresh)): _sums(path) for path in write_parts(fresh / PARTS, parts or {})}

    def finish() -> None:
        _write_manifest(fresh, (state or {}).get("step", 0), sums)
        for path in [*fresh.rglob("*"), fresh]:
            _flush(path)

    try:
        parallel.each(lambda: write_whole() if parallel.writes else None)
        if parts is not None:
            sums = {name: found for of_rank in parallel.each(write_part) for name, found in of_rank.items()}
        parallel.each(lambda: finish() if parallel.writes else None)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' words for a full disk, too
        parallel.each(lambda: shutil.rmtree(fresh, ignore_errors=True) if parallel.writes else None)
        free = shutil.disk_usage(directory.parent).free
        before = f"; {directory} is as it was" if directory.exists() else ""
        raise CheckpointError(
            f"could not write the checkpoint {directory} ({error}); {free / 2**20:,.0f} MiB are free there{before}"
        ) from error
    parallel.each(lambda: _replace(directory, fresh, keep) if parallel.writes else None)
    return directory


def _replace(directory: Path, fresh: Path, keep: int) -> None:
    """Puts ``fresh`` in the place of ``directory``."""
    if directory.exists():
        older = _retired(directory)
        shutil.rmtree(older, ignore_errors=True)
        os.rename(directory, older)
    os.rename(fresh, directory)
    _flush(directory.parent)
    for old in _older(directory)[max(0, keep - 1) :]:
        shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(path: str | Path, *, adapters: bool = False) -> Path:
    """The newest whole checkpoint at ``path`` (the directory itself, or a run that has one in ``checkpoint/``).

    Warns of each that is damaged and passed over.

    Args:
        adapters: a checkpoint may hold a model's adapters alone. Without, such a run's is the one in ``merged/``.

    Raises:
        FileNotFoundError: there is none; the message lists what was looked for.
        ValueError: there are, and every one of them is damaged.
    """
    path = Path(path).expanduser()
    damaged = []
    names = ("config.json", ADAPTER_CONFIG) if adapters else ("config.json",)
    for place in (path, path / NEWEST, *(() if adapters else (path / MERGED,))):
        for candidate in (place, *(_older(place) if place.name == NEWEST else ())):
            if not any((candidate / name).is_file() for name in names):
                continue
            problem = find_damage(candidate)
            if not problem:
                if damaged:
                    said = "; ".join(damaged)
                    warnings.warn(f"fastformer: {said}; going back to {candidate}, before it", stacklevel=2)
                return candidate
            damaged.append(f"the checkpoint {candidate} is damaged: {problem}")
    if damaged:
        raise ValueError("; ".join(damaged) + "; there is no whole one before it")
    raise FileNotFoundError(
        f"no checkpoint at {path}: neither {path / 'config.json'} nor {path / NEWEST / 'config.json'} exists. "
        "`fastformer demo` and `fastformer pretrain` write one"
    )


def restore_checkpoint(run: str | Path) -> Path:
    """The newest whole checkpoint of ``run``, made its ``checkpoint/``: damaged ones that came after it are deleted.

    Raises:
        FileNotFoundError, ValueError: as in :func:`find_checkpoint`.
    """
    found = find_checkpoint(run, adapters=True)
    newest = Path(run).expanduser() / NEWEST
    if found == newest or found.parent != newest.parent:
        return found
    for path in (newest, *_older(newest)):
        if path == found:
            break
        shutil.rmtree(path, ignore_errors=True)
    os.rename(found, newest)
    return newest


def has_checkpoint(run: str | Path) -> bool:
    """Whether there is something in ``run`` to resume, or to be careful with."""
    newest = Path(run).expanduser() / NEWEST
    return newest.is_dir() or bool(_older(newest))


def find_damage(directory: Path) -> str:
    """What is wrong with the files of a checkpoint, in words; "" where they are as they were written.

    A directory without a manifest was not written here, and is taken as it is.
    """
    manifest = directory / MANIFEST_FILE
    if not manifest.is_file():
        return ""
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST_FILE} cannot be read"
    for name, (size, checksum) in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if _checksum(path) != checksum:
            return f"{name} has other contents than were written"
    return ""


def load_state(directory: str | Path) -> dict[str, Any]:
    """What ``save_checkpoint`` was given as ``state``, on the CPU; ``parts`` is where ranks have written theirs.

    Raises:
        FileNotFoundError: the checkpoint holds weights only and cannot be resumed.
    """
    path = Path(directory) / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"cannot resume: {path} does not exist, so {directory} holds weights only")
    state = torch.load(path, map_location="cpu", weights_only=True)
    parts = Path(directory) / PARTS
    return state | {"parts": parts} if parts.is_dir() else state


def random_state() -> dict[str, Any]:
    """States of PyTorch's generators, on the CPU and on every GPU, and of Python's."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`random_state` returned; a GPU's only where there is one."""
    torch.set_rng_state(state["cpu"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _write_manifest(directory: Path, step: int, sums: dict[str, tuple[int, int]]) -> None:
    """``sums`` are those of the files that other ranks wrote, and have read again themselves."""
    files = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
    entries = {name: _sums(path) for name, path in files.items() if name not in sums} | sums
    text = json.dumps({"step": step, "files": entries}, indent=2) + "\n"
    (directory / MANIFEST_FILE).write_text(text, encoding="utf-8")


def _sums(path: Path) -> tuple[int, int]:
    return path.stat().st_size, _checksum(path)


def _checksum(path: Path) -> int:
    """CRC-32: it is to find damage, not a forger, and reads as fast as the disk."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _retired(directory: Path) -> Path:
    """The name ``directory`` gets when another takes its place."""
    try:
        step = int(json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        step = 0
    return directory.with_name(f"{directory.name}-{step}")


def _older(directory: Path) -> list[Path]:
    """The checkpoints that were at ``directory`` before, newest first."""
    pattern = re.compile(re.escape(directory.name) + r"-(\d+)")
    found = []
    if directory.parent.is_dir():
        for path in directory.parent.iterdir():
            match = pattern.fullmatch(path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def _flush(path: Path) -> None:
    """To the disk before the rename, or a power cut could leave the new name on empty files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
