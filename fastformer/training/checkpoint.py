"""Checkpoints that are whole or not there.

A checkpoint is a Hugging Face model directory (config.json, model.safetensors) with the tokenizer's file and
``training_state.pt`` (optimizer, random number generators, position in the data, settings) beside them. It is written
to a temporary directory next to its place and moved there by a rename, so that a process killed at any moment leaves
the new checkpoint or the one before it, never a mixture.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..data import Tokenizer

STATE_FILE = "training_state.pt"


def save_checkpoint(
    directory: str | Path, model: torch.nn.Module, tokenizer: Tokenizer | None, state: dict[str, Any] | None = None
) -> Path:
    """Writes ``model`` (by its ``save_pretrained``), ``tokenizer`` and ``state`` as one, replacing what was there."""
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory.with_name(f"{directory.name}.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    model.save_pretrained(fresh)
    if tokenizer is not None:
        tokenizer.save(fresh)
    if state is not None:
        torch.save(state, fresh / STATE_FILE)
    for path in [*fresh.iterdir(), fresh]:
        _flush(path)
    previous = _previous(directory)
    if directory.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(directory, previous)
    os.rename(fresh, directory)
    shutil.rmtree(previous, ignore_errors=True)
    return directory


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at ``path`` (the directory itself, or a run that has one in ``checkpoint/``).

    Puts the previous one back where a save was killed between its two renames.

    Raises:
        FileNotFoundError: there is none; the message lists what was looked for.
    """
    path = Path(path).expanduser()
    for candidate in (path, path / "checkpoint"):
        if not candidate.exists() and _previous(candidate).is_dir():
            os.rename(_previous(candidate), candidate)
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(
        f"no checkpoint at {path}: neither {path / 'config.json'} nor {path / 'checkpoint' / 'config.json'} exists. "
        "`fastformer demo` and `fastformer pretrain` write one"
    )


def load_state(directory: str | Path) -> dict[str, Any]:
    """What ``save_checkpoint`` was given as ``state``, on the CPU.

    Raises:
        FileNotFoundError: the checkpoint holds weights only and cannot be resumed.
    """
    path = Path(directory) / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"cannot resume: {path} does not exist, so {directory} holds weights only")
    return torch.load(path, map_location="cpu", weights_only=True)


def random_state() -> dict[str, Any]:
    """States of PyTorch's generators, on the CPU and on every GPU."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`random_state` returned; a GPU's only where there is one."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _previous(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.previous")


def _flush(path: Path) -> None:
    """To the disk before the rename, or a power cut could leave the new name on empty files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
