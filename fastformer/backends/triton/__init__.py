"""Kernels in Triton (Tillet, Kung, Cox 2019): CUDA devices, or the CPU through Triton's interpreter for tests.

Set ``TRITON_INTERPRET=1`` before Triton is first imported to run on CPU tensors; the interpreter is then mended for
bfloat16 (see interpreter.py). Every configuration of every kernel is also compiled without a GPU by aot.py.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

INSTALL = "pip install triton"


def interpreting() -> bool:
    """Whether Triton functions defined in this process run in the interpreter."""
    import triton

    # triton.jit looks at the flag when it decorates, so what counts is what it made of Triton's own functions, not
    # what the environment says now.
    return not isinstance(triton.language.zeros, triton.runtime.JITFunction)


@functools.cache
def unavailable(device: str) -> str | None:
    """Why this backend cannot run on ``device`` ("cpu", "cuda", ...), or None."""
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed ({INSTALL})"
    if device == "cuda":
        return None if torch.cuda.is_available() else "torch sees no CUDA device"
    if device == "cpu":
        return (
            None if interpreting() else "runs on a CPU only in Triton's interpreter (TRITON_INTERPRET=1 before import)"
        )
    return f"no kernels for {device!r} devices"


if importlib.util.find_spec("triton") is not None and interpreting():
    from . import interpreter

    interpreter.apply()
