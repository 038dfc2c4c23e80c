"""C++ kernels for the CPU (csrc/cpu), through the pybind11 module ``fastformer._C``."""

from __future__ import annotations

try:
    from ... import _C
except ImportError as error:
    _C = None
    _reason: str | None = f"fastformer._C is not built ({error})"
else:
    _reason = None


def unavailable(device: str) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    if device != "cpu":
        return f"runs on CPU tensors, not {device}"
    return _reason
