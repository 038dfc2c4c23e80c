"""Chooses the tiles of attention_tiles.py and rewrites the tables: on a GPU by time, without one by compiling alone.

    python -m fastformer.backends.triton.tune --op attention                 prints what it would choose, and the times
    python -m fastformer.backends.triton.tune --op attention --write         rewrites the table of this GPU's family
    python -m fastformer.backends.triton.tune --op attention --quick         16-bit data and the commonest head sizes
    python -m fastformer.backends.triton.tune --op attention --compile-only --family 90      needs no GPU

For each line of the table and each kernel, the candidates are the present tile and those nearest to it. One is accepted
if everything that aot.py builds of it compiles without a spill and within the family's shared memory, which worker
processes find out before anything is measured; if its results are the reference backend's; and if its time, the median
of CUDA events around whole calls, summed over attention_problems.SHAPES, is the least. The present tile stays unless
another is more than 2% faster. ``--compile-only`` replaces only tiles that do not compile, by the nearest that do.

Triton keeps what it compiled, so a run that was interrupted starts again where it stopped. After ``--write``,
``python -m fastformer.backends.triton.aot --op attention`` and the GPU tests check the whole table.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from . import aot, attention_problems, interpreting
from .aot import in_processes
from .attention_builds import builds
from .attention_tiles import CLASSES, TILES, Key, Tile, Tiles, family
from .launch import capability

BLOCKS_Q, BLOCKS_K, WARPS, STAGES = (16, 32, 64, 128), (32, 64, 128), (4, 8, 16), (1, 2, 3, 4)
GAIN = 0.98  # a tile replaces the present one if it takes less than this part of its time
NEARBY = 60  # candidates to try to compile, at most
QUICK_DIMS, QUICK_CLASSES = (64, 128), ("plain", "bias")


class Slot(NamedTuple):
    """One entry of a table."""

    family: int
    key: Key
    kernel: str
    """A field of :class:`Tiles`."""

    def __str__(self) -> str:
        itemsize, dim, features = self.key
        return f"sm_{self.family} {8 * itemsize}-bit D={dim} {features} {self.kernel}"


class Choice(NamedTuple):
    """What was found for a slot."""

    slot: Slot
    present: Tile
    present_seconds: float
    """NaN if it was not measured."""
    tile: Tile | None
    """None: there is none that compiles and computes the right result."""
    seconds: float
    refused: dict[Tile, str]
    """Why not, of the candidates that were looked at and cannot be used."""


def slots(
    families: Iterable[int],
    itemsizes: Iterable[int],
    dims: Iterable[int],
    classes: Iterable[str],
    kernels: Iterable[str],
) -> list[Slot]:
    """The entries of the tables that these name."""
    wanted = set(itemsizes), set(dims), set(classes)
    return [
        Slot(f, key, kernel)
        for f in families
        for key, line in TILES[f].items()
        if all(part in names for part, names in zip(key, wanted, strict=True))
        for kernel in kernels
        if getattr(line, kernel) is not None
    ]


def candidates(present: Tile, kernel: str, most: int) -> list[Tile]:
    """``present`` and the ``most`` tiles nearest to it: a block of twice or half the size is one step away, one with
    other warps one and a half, one with another stage two. Of equally near ones, the larger first."""

    own = 1 if kernel == "backward_k" else 0

    def steps(tile: Tile) -> tuple[float, ...]:
        q, k, warps = (abs(math.log2(a / b)) for a, b in zip(tile[:3], present))
        distance = q + k + 1.5 * warps + 2 * abs(tile.num_stages - present.num_stages)
        return distance, -tile.block_q * tile.block_k, -tile[own], -tile.num_warps

    tiles = [Tile(q, k, w, s) for q in BLOCKS_Q for k in BLOCKS_K for w in WARPS for s in STAGES]
    if kernel == "backward_distance_bias":
        tiles = [tile for tile in tiles if tile.block_q == tile.block_k]
    return [present, *sorted((tile for tile in tiles if tile != present), key=steps)[:most]]


def problem(slot: Slot, tile: Tile) -> str:
    """Why ``tile`` cannot be shipped for ``slot`` according to the compiler, or ""."""
    for configuration in builds(slot.family, slot.key, slot.kernel, tile):
        build = aot.compile_one(configuration, slot.family)
        if build.problem:
            return f"{build.problem} ({build.label})"
    return ""


def compiled(
    slot: Slot, tiles: Iterable[Tile], most: int, problem: Callable[[Slot, Tile], str] = problem
) -> tuple[list[Tile], dict[Tile, str]]:
    """The first ``most`` of ``tiles`` that compile, and why others on the way do not."""
    good: list[Tile] = []
    refused: dict[Tile, str] = {}
    for tile in tiles:
        if len(good) == most:
            break
        reason = problem(slot, tile)
        if reason:
            refused[tile] = reason
        else:
            good.append(tile)
    return good, refused


def choose(
    slot: Slot,
    present: Tile,
    good: list[Tile],
    refused: Mapping[Tile, str],
    wrong: Callable[[Slot, Tile], str],
    measure: Callable[[Slot, Tile], float],
) -> Choice:
    """The fastest of ``good`` whose results are right. ``wrong`` says what is wrong with them, or "", ``measure`` how
    many seconds they take."""
    refused = dict(refused)
    seconds: dict[Tile, float] = {}
    for tile in good:
        reason = wrong(slot, tile)
        if reason:
            refused[tile] = reason
        else:
            seconds[tile] = measure(slot, tile)
    present_seconds = seconds.get(present, math.nan)
    if not seconds:
        return Choice(slot, present, present_seconds, None, math.nan, refused)
    tile = min(seconds, key=seconds.__getitem__)
    if present in seconds and seconds[tile] >= GAIN * present_seconds:
        tile = present
    return Choice(slot, present, present_seconds, tile, seconds[tile], refused)


# ---- the table -------------------------------------------------------------------------------------------------------


def table_path(sm_family: int) -> Path:
    """The file of the family's table."""
    return Path(__file__).with_name(f"attention_tiles_sm{sm_family}.py")


def with_choices(table: Mapping[Key, Tiles], choices: Iterable[Choice]) -> dict[Key, Tiles]:
    """``table`` with the tiles that were chosen."""
    changed = dict(table)
    for choice in choices:
        if choice.tile is not None:
            changed[choice.slot.key] = changed[choice.slot.key]._replace(**{choice.slot.kernel: choice.tile})
    return changed


def rendered(table: Mapping[Key, Tiles], sm_family: int, source: str) -> str:
    """The text of a table's file. ``source``: how its tiles were chosen, one line."""
    lines = [
        f'"""Attention tiles of the sm_{sm_family} family; attention_tiles.py says what the numbers mean.',
        "",
        source,
        "Written by ``python -m fastformer.backends.triton.tune --op attention --write``.",
        '"""',
        "",
        "# (bytes per element, head_dim, features): (block_q, block_k, warps, stages) of forward, backward_q,",
        "# backward_k and, where there are biases, of backward_bias and backward_distance_bias",
        "LINES: dict[tuple[int, int, str], tuple[tuple[int, int, int, int], ...]] = {",
    ]
    for key, tiles in table.items():
        itemsize, dim, features = key
        entries = ", ".join(str(tuple(tile)) for tile in tiles if tile is not None)
        lines.append(f'    ({itemsize}, {dim}, "{features}"): ({entries}),')
    return "\n".join([*lines, "}", ""])


def replace_file(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` in one step: whoever reads it meanwhile gets the old file or the new one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, path.stat().st_mode if path.exists() else 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


# ---- the command -----------------------------------------------------------------------------------------------------


Job = tuple[Slot, list[Tile], int]  # the arguments of :func:`compiled`
Compiled = tuple[list[Tile], dict[Tile, str]]  # and what it returns
Compile = Callable[[list[Job], int], Iterator[Compiled]]


def _compiled_here(job: Job) -> Compiled:
    return compiled(*job)


def compile_candidates(jobs: list[Job], processes: int) -> Iterator[Compiled]:
    """:func:`compiled` of each job, in order, as results come in."""
    return in_processes(_compiled_here, jobs, processes)


def header() -> str:
    """The column titles of :func:`row`."""
    return f"{'entry':46s} {'present':>16s} {'us':>9s} {'chosen':>16s} {'us':>9s}  refused"


def row(choice: Choice) -> str:
    """One line of what is printed."""

    def shown(tile: Tile | None, seconds: float) -> str:
        time = "-" if math.isnan(seconds) else f"{seconds * 1e6:.1f}"
        return f"{'none' if tile is None else '/'.join(map(str, tile)):>16s} {time:>9s}"

    tile = "=" if choice.tile == choice.present else choice.tile
    reason = choice.refused.get(choice.present, "")
    chosen = f"{'=':>16s}{'':10s}" if tile == "=" else shown(choice.tile, choice.seconds)
    note = f"{len(choice.refused)}" + (f"; the present tile: {reason}" if reason else "")
    return f"{choice.slot!s:46s} {shown(choice.present, choice.present_seconds)} {chosen}  {note}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m fastformer.backends.triton.tune", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--op", required=True, choices=("attention",), help="the operation whose tiles are chosen")
    parser.add_argument("--write", action="store_true", help="rewrite the table; otherwise only print")
    parser.add_argument("--quick", action="store_true", help="16-bit data, D of 64 and 128, four candidates each")
    parser.add_argument("--compile-only", action="store_true", help="without a GPU: replace what does not compile")
    parser.add_argument("--family", type=int, choices=tuple(TILES), help="with --compile-only: which table")
    parser.add_argument("--itemsize", action="append", type=int, choices=(2, 4), help="only these (may be repeated)")
    parser.add_argument("--dim", action="append", type=int, help="only this head size")
    parser.add_argument("--features", action="append", choices=CLASSES, help="only this class of features")
    parser.add_argument("--kernel", action="append", choices=Tiles._fields, help="only this kernel")
    parser.add_argument("--candidates", type=int, default=12, help="how many tiles to measure for each entry")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile at the same time")
    options = parser.parse_args(arguments)
    if interpreting():
        print("Triton runs its interpreter in this process; unset TRITON_INTERPRET to compile", file=sys.stderr)
        return 2
    if options.compile_only != (options.family is not None):
        parser.error("--compile-only and --family belong together: a GPU says itself which table is its own")
    if not options.compile_only and not torch.cuda.is_available():
        print(
            "There is no GPU here to measure on: torch sees no CUDA device. "
            "--compile-only --family 80 (or 90) replaces tiles that do not compile.",
            file=sys.stderr,
        )
        return 2
    return tune(options)


def tune(
    options: argparse.Namespace,
    compile_candidates: Compile = compile_candidates,
    wrong: Callable[[Slot, Tile], str] | None = None,
    measure: Callable[[Slot, Tile], float] | None = None,
) -> int:
    """What :func:`main` does after its checks; tests replace the compiler, the comparison and the clock."""
    device = None if options.compile_only else torch.device("cuda", torch.cuda.current_device())
    sm_family = options.family if device is None else family(capability(device))
    chosen = slots(
        [sm_family],
        options.itemsize or ((2,) if options.quick else (2, 4)),
        options.dim or (QUICK_DIMS if options.quick else {dim for _, dim, _ in TILES[sm_family]}),
        options.features or (QUICK_CLASSES if options.quick else CLASSES),
        options.kernel or Tiles._fields,
    )
    wrong = wrong or (lambda slot, tile: attention_problems.wrong(*slot, tile, device))
    measure = measure or (lambda slot, tile: attention_problems.measure(*slot, tile, device))
    most = 1 if options.compile_only else 4 if options.quick else options.candidates
    jobs = []
    for slot in chosen:
        present = TILES[sm_family][slot.key].tile(slot.kernel)
        jobs.append((slot, candidates(present, slot.kernel, NEARBY), most))
    print(header())
    choices = []
    results: Iterable[Compiled] = compile_candidates(jobs, options.jobs)
    if device is not None:
        results = list(results)  # the compiler and the clock should not share the machine
    for (slot, (present, *_), _), (good, refused) in zip(jobs, results, strict=True):
        if device is None:
            choice = Choice(slot, present, math.nan, good[0] if good else None, math.nan, refused)
        else:
            choice = choose(slot, present, good, refused, wrong, measure)
        choices.append(choice)
        print(row(choice), flush=True)
    changed = [choice for choice in choices if choice.tile not in (None, choice.present)]
    missing = [choice for choice in choices if choice.tile is None]
    print(f"{len(choices)} entries, {len(changed)} changed, {len(missing)} for which nothing was found")
    if options.write and changed:
        path = table_path(sm_family)
        replace_file(path, rendered(with_choices(TILES[sm_family], changed), sm_family, source(options)))
        print(f"wrote {path}")
    return 1 if missing or not choices else 0


def source(options: argparse.Namespace) -> str:
    """How the tiles were chosen, for the top of a table."""
    versions = f"triton {triton.__version__}, torch {torch.__version__}"
    today = datetime.date.today().isoformat()
    if options.compile_only:
        return f"Chosen by compiling alone, on {today} with {versions}: none of them was measured."
    return f"Chosen on one {torch.cuda.get_device_name()}, on {today} with {versions}."


if __name__ == "__main__":
    sys.exit(main())
