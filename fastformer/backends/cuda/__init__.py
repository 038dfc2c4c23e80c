"""CUDA kernels (csrc/cuda), through the pybind11 module ``fastformer._cuda``.

With ``FASTFORMER_EMULATE=1`` the same kernels run on CPU tensors under csrc/emulation instead: far too slowly to use,
but exactly the code a GPU would run, for tests.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType


def emulated() -> bool:
    """Whether CPU tensors go through the emulator."""
    return os.environ.get("FASTFORMER_EMULATE", "0") not in ("", "0")


@functools.cache
def _load(emulate: bool) -> ModuleType | str:
    """The extension module, or why there is none."""
    try:
        if emulate:
            from . import emulation

            return emulation.load()
        from ... import _cuda

        return _cuda
    except (ImportError, RuntimeError) as error:
        return f"{error}" if emulate else f"fastformer._cuda is not built ({error})"


def library() -> ModuleType:
    """The extension module for this process.

    Raises:
        RuntimeError: it is not there; the message says why.
    """
    module = _load(emulated())
    if isinstance(module, str):
        raise RuntimeError(module)
    return module


def unavailable(device: str) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    wanted = "cpu" if emulated() else "cuda"
    if device != wanted:
        suffix = " while FASTFORMER_EMULATE is set" if emulated() else ""
        return f"runs on {wanted.upper()} tensors{suffix}, not {device}"
    module = _load(emulated())
    return module if isinstance(module, str) else None
