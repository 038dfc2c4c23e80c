"""What every kernel file of this backend shares: launching, tile tables, and the description of an off-line build.

Tile sizes are data: each operation keeps its own table and looks it up by row length or head size. Nothing is tuned at
run time, because an autotuned launch costs half as much again on the host and cannot run in the interpreter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = frozenset(TYPES)


class RowTile(NamedTuple):
    """One line of a row operation's table: how a program of the grid covers rows of up to ``columns`` elements."""

    columns: int
    """Rows of at most this many columns use this line."""
    block_rows: int
    """Rows a program holds at once."""
    num_warps: int
    block_cols: int = 0
    """Columns a program holds at once; 0 = the whole row, padded to a power of two."""
    itemsize: int = 4
    """Elements of at most this many bytes use this line."""


UNBOUNDED = 2**62
MIN_BLOCK_COLS = 32  # eight dropout counters make 32 columns (see dropout.py)


@functools.cache
def row_tile(table: tuple[RowTile, ...], cols: int, itemsize: int) -> RowTile:
    """The first line of ``table`` that covers rows of ``cols`` elements, with ``block_cols`` filled in."""
    tile = next(line for line in table if cols <= line.columns and itemsize <= line.itemsize)
    if tile.block_cols == 0:
        tile = tile._replace(block_cols=max(MIN_BLOCK_COLS, triton.next_power_of_2(cols)))
    return tile


@functools.cache
def program_limit(device: torch.device) -> int:
    """How many programs a loop over rows is split into where each leaves a partial sum behind: two per multiprocessor.

    Only the device decides, so a gradient is summed in the same order in every run.
    """
    if device.type == "cuda":
        return 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return 3  # the interpreter: few, so that small tests take the loop more than once


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability as in ``sm_<capability>``: 90 on an H200. The interpreter uses the tables of sm_80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """Enqueues ``kernel`` on the current stream of ``device``; an empty grid is no launch."""
    if 0 in grid:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device, wherever the tensors are
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def unit_stride(x: Tensor) -> Tensor:
    """``x``, copied if its last dimension is not contiguous (an expanded gradient, for example)."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


@dataclass(frozen=True)
class Configuration:
    """One off-line build of a kernel: the types of its arguments and the constants it is specialised for."""

    kernel: Any
    label: str
    """What it computes, for the table: operation, direction, dtype, size."""
    types: dict[str, str | None]
    """Triton type of each pointer and of each scalar that is not int32; None for an argument passed as None."""
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    capabilities: tuple[int, ...] = (80, 90)
    """The ``sm_`` numbers that use this configuration."""
    tensor_cores: bool = False
    """Whether the build must contain matrix instructions."""
    unaligned: frozenset[str] = frozenset()
    """int32 arguments that are not multiples of 16 (all others, and all pointers, are)."""
    above_one: frozenset[str] = frozenset()
    """int32 arguments that are never 1."""
    options: dict[str, Any] = field(default_factory=dict)

    def signature(self) -> dict[str, str]:
        """Argument name -> Triton type, in the kernel's order."""
        constant = {name for name, kind in self.types.items() if kind is None} | set(self.constants)
        return {
            name: "constexpr" if name in constant else self.types.get(name) or "i32" for name in self.kernel.arg_names
        }

    def constexprs(self) -> dict[str, Any]:
        """The values of the arguments whose type is "constexpr"."""
        return {name: None for name, kind in self.types.items() if kind is None} | self.constants

    def attributes(self) -> dict[tuple[int], list[list[Any]]]:
        """Which arguments are multiples of 16, as the run-time launcher would find."""
        return {
            (i,): [["tt.divisibility", 16]]
            for i, (name, kind) in enumerate(self.signature().items())
            if kind.startswith("*") or (kind in ("i32", "i64") and name not in self.unaligned)
        }
