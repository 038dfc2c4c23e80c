"""fastformer: the blocks of a transformer as fused kernels, with the names and signatures of ``torch.nn``.

    import fastformer.nn as nn
    import fastformer.functional as F

Every operation runs on the fastest backend that supports the call; :func:`explain` says which and why,
:func:`backend` overrides it, :func:`strict` turns a silent reference into an error.
"""

from __future__ import annotations

from typing import Any

from . import functional
from .backends.registry import Explanation, UnsupportedError, backend, strict
from .explain import explain
from .version import __version__

__all__ = [
    "Explanation",
    "UnsupportedError",
    "__version__",
    "backend",
    "explain",
    "from_pretrained",
    "functional",
    "integrations",
    "models",
    "nn",
    "optimize",
    "restore",
    "strict",
]


def __getattr__(name: str) -> Any:
    # Modules above `functional` load on first use, so that importing the functions stays cheap.
    if name in ("nn", "models", "generation", "data", "training", "integrations"):
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    if name == "from_pretrained":
        from .models import from_pretrained

        return from_pretrained
    if name in ("optimize", "restore"):
        from .integrations import optimize as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
