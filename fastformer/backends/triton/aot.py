"""Compiles every configuration of every kernel for GPUs this machine does not have, and reads what came out.

    python -m fastformer.backends.triton.aot [--op layer_norm] [--capability 90] [--jobs 2] [--json table.json]

prints one line per build: registers per thread, local-memory instructions (a build with any has run out of registers:
it "spills"), stack, shared memory, matrix instructions. The exit status is 1 if a build spills, lacks the matrix
instructions it should have, needs more shared memory than the GPU has, or does not compile.

Triton carries its own ptxas and cuobjdump, so neither a GPU nor a CUDA toolkit is needed.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..registry import OPS
from . import interpreting
from .launch import Configuration

J, R = TypeVar("J"), TypeVar("R")
CAPABILITIES = (80, 90)
# Bytes of shared memory one program may use. The tables for sm_80 also serve sm_86 and sm_89, which have 99 KiB.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
MATRIX_INSTRUCTIONS = re.compile(r"\b(HGMMA|HMMA)\b")
LOCAL_MEMORY_INSTRUCTIONS = re.compile(r"\b(LDL|STL)\b")


@dataclass(frozen=True)
class Build:
    """What the compiler made of one configuration."""

    label: str
    capability: int
    num_warps: int
    num_stages: int
    registers: int = 0
    """Per thread."""
    stack: int = 0
    """Bytes per thread."""
    spills: int = 0
    """Instructions that load from or store to local memory."""
    shared: int = 0
    """Bytes per program."""
    matrix: str = ""
    """The matrix instruction in use, HMMA or HGMMA (Hopper's wgmma), or nothing."""
    seconds: float = 0.0
    problem: str = ""
    """Why the build must not be shipped; empty if it may."""


def compile_one(configuration: Configuration, capability: int) -> Build:
    """Compiles one configuration for ``sm_<capability>`` and inspects the machine code."""
    if interpreting():
        raise RuntimeError("Triton runs its interpreter in this process; unset TRITON_INTERPRET to compile")
    start = time.perf_counter()
    head = (configuration.label, capability, configuration.num_warps, configuration.num_stages)
    source = ASTSource(
        configuration.kernel, configuration.signature(), configuration.constexprs(), configuration.attributes()
    )
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages, **configuration.options}
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # ptxas and MLIR raise many types; any of them is this build's result
        lines = str(error).strip().splitlines() or [""]
        return Build(*head, problem=f"does not compile: {type(error).__name__}: {lines[-1][:200]}")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, machine_code = _cuobjdump("-res-usage", cubin), _cuobjdump("-sass", cubin)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no register count: {usage!r}")
    registers, stack = (int(group) for group in match.groups())
    spills = len(LOCAL_MEMORY_INSTRUCTIONS.findall(machine_code))
    matrix = "/".join(sorted(set(MATRIX_INSTRUCTIONS.findall(machine_code))))
    shared = kernel.metadata.shared
    problem = ""
    if spills:
        problem = f"spills: {spills} local-memory instructions, {stack} bytes of stack"
    elif shared > SHARED_LIMIT[capability]:
        problem = f"needs {shared} bytes of shared memory; sm_{capability} tables may use {SHARED_LIMIT[capability]}"
    elif configuration.tensor_cores and not matrix:
        problem = "has no matrix instructions"
    return Build(*head, registers, stack, spills, shared, matrix, time.perf_counter() - start, problem)


def _cuobjdump(flag: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, cubin], check=True, capture_output=True, text=True).stdout


# column_sum: the second stage that several operations share; linear_activation: a matmul of feed_forward's
KERNEL_FILES = (*OPS, "linear_activation", "column_sum")


def configurations(files: Iterable[str] = KERNEL_FILES) -> Iterator[Configuration]:
    """Every configuration in the named files of this package, and one of each kernel with sizes and strides of 1."""
    for name in files:
        own = list(importlib.import_module(f"{__package__}.{name}").configurations())
        yield from own
        yield from _sizes_of_one(own)


def _sizes_of_one(chosen: Iterable[Configuration]) -> Iterator[Configuration]:
    # At run time an integer argument that equals 1 becomes a constant, and constants have fewer methods than values: a
    # kernel may compile for every size but that one. Once for each set of features is enough.
    seen = set()
    for configuration in chosen:
        kernel = configuration.kernel
        absent = tuple(name for name, kind in configuration.types.items() if kind is None)
        variant = (kernel, absent, *(value for value in configuration.constants.values() if isinstance(value, bool)))
        if variant in seen:
            continue
        seen.add(variant)
        kinds = configuration.signature()
        sizes = [p.name for p in kernel.params if kinds[p.name] == "i32" and not p.do_not_specialize]
        ones = dict.fromkeys((name for name in sizes if name not in configuration.above_one), 1)
        yield replace(
            configuration, label=f"{configuration.label} sizes of 1", constants={**configuration.constants, **ones}
        )


def jobs_for(
    chosen: Iterable[Configuration], capabilities: Iterable[int] = CAPABILITIES
) -> list[tuple[Configuration, int]]:
    """Each configuration with each capability that uses it."""
    return [(c, sm) for c, sm in itertools.product(chosen, capabilities) if sm in c.capabilities]


def in_processes(function: Callable[[J], R], jobs: Iterable[J], processes: int) -> Iterator[R]:
    """``function`` of each job, in order, as results come in."""
    if processes == 1:
        yield from map(function, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(function, jobs)


def _compile_indexed(job: tuple[tuple[str, ...], tuple[int, ...], int]) -> Build:
    files, capabilities, index = job
    return compile_one(*jobs_for(configurations(files), capabilities)[index])


def compile_all(
    files: Iterable[str] = KERNEL_FILES,
    capabilities: Iterable[int] = CAPABILITIES,
    select: str = "",
    processes: int = 1,
) -> Iterator[Build]:
    """Builds everything whose label matches the regular expression ``select``, in order, as results come in."""
    files, capabilities = tuple(files), tuple(capabilities)
    wanted = [i for i, (c, _) in enumerate(jobs_for(configurations(files), capabilities)) if re.search(select, c.label)]
    # Kernels do not pickle, so a worker gets the place of its configuration in the list and makes the list itself.
    yield from in_processes(_compile_indexed, [(files, capabilities, i) for i in wanted], processes)


def header() -> str:
    """The column titles of :func:`row`."""
    return f"{'kernel':58s} {'sm':>3s} {'warps':>5s} {'stages':>6s} {'regs':>4s} {'spills':>6s} {'shared':>7s}  matrix"


def row(build: Build) -> str:
    """One line of the table."""
    return (
        f"{build.label:58s} {build.capability:3d} {build.num_warps:5d} {build.num_stages:6d} {build.registers:4d} "
        f"{build.spills:6d} {build.shared:7d}  {build.matrix:6s} {build.problem}"
    ).rstrip()


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m fastformer.backends.triton.aot", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--op", action="append", choices=KERNEL_FILES, help="only this operation (may be repeated)")
    parser.add_argument(
        "--capability", action="append", type=int, choices=CAPABILITIES, help="only this GPU generation"
    )
    parser.add_argument("--select", default="", help="only labels that match this regular expression")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile at the same time")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    print(header())
    builds = []
    files, capabilities = options.op or KERNEL_FILES, options.capability or CAPABILITIES
    for build in compile_all(files, capabilities, options.select, options.jobs):
        print(row(build), flush=True)
        builds.append(build)
    bad = [build for build in builds if build.problem]
    print(f"{len(builds)} builds, {len(bad)} with a problem")
    if options.json:
        options.json.write_text(json.dumps([asdict(build) for build in builds], indent=1) + "\n")
    return 1 if bad or not builds else 0


if __name__ == "__main__":
    sys.exit(main())
