"""Memory for large results that a library call fills."""

from __future__ import annotations

from torch import Tensor

try:
    from .cpu._call import on_huge_pages
except ImportError:  # the extension is not built: a hint that can be done without

    def on_huge_pages(t: Tensor) -> Tensor:
        """``t`` as it is."""
        return t


LARGE = 4 << 20  # bytes: blocks from here on come straight from the system, page by page as they are first written


def empty_if_large(like: Tensor, rows: int, cols: int) -> Tensor | None:
    """:func:`empty` for an ``out=`` on a CPU, or None where the library's own allocation is as good."""
    if like.device.type == "cpu" and rows * cols * like.element_size() >= LARGE:
        return empty(like, rows, cols)
    return None


def empty(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor of ``shape``, of the dtype and device of ``like``; on a CPU on huge pages if large."""
    t = like.new_empty(shape)
    return on_huge_pages(t) if t.device.type == "cpu" else t
