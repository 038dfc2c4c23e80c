"""Shapes that every row operation is measured at on a CPU beside its main one: "never slower" is about all of them.

From one short row, where a call costs more than its kernel, to a few rows of 131,072 columns and 65,536 rows of 1,024.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.runner import Case

SHAPES = ((1, 64), (1, 4096), (1, 131072), (16, 1024), (256, 64), (256, 16384), (4096, 256), (64, 131072), (65536, 64))
LARGEST = (65536, 1024)
SWEEP = "sweep"


def sweep(dtypes: Iterable[str] = ("float32", "bfloat16"), **case: Any) -> list[Case]:
    """Forward, and forward with backward, at every shape in every dtype; ``case`` goes into each :class:`Case`.

    torch.compile, whose C++ compiler takes some ten seconds a case, is a peer at two of them.
    """
    cases = [
        Case(shape, dtype, backward, SWEEP, compiled=shape in ((16, 1024), (256, 16384)) and dtype == "float32", **case)
        for shape in SHAPES
        for dtype in dtypes
        for backward in (False, True)
    ]
    return [*cases, Case(LARGEST, "float32", True, SWEEP, **case)]
