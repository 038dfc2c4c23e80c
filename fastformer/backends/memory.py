"""Memory for large results that a library call fills."""

from __future__ import annotations

from torch import Tensor

try:
    from .cpu._call import on_huge_pages
except ImportError:  # the extension is not built: a hint that can be done without

    def on_huge_pages(t: Tensor) -> Tensor:
        """``t`` as it is."""
        return t


def empty(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor of ``shape``, of the dtype and device of ``like``; on a CPU on huge pages if large."""
    t = like.new_empty(shape)
    return on_huge_pages(t) if t.device.type == "cpu" else t
