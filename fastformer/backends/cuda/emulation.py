"""Builds csrc/cuda for the CPU with csrc/emulation, so that CUDA kernels run, slowly, where there is no GPU.

:func:`load` compiles what changed (half a minute the first time) into ``build/emulated/<hash>/`` beside the sources
and returns the module ``fastformer._cuda_emulated``, whose functions are those of ``fastformer._cuda`` on
host memory, plus ``set_order(name)``: the order in which threads run, one of :data:`ORDERS`. Needs a C++17 compiler and
pybind11; no CUDA.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulated"
MODULE = "fastformer._cuda_emulated"
ORDERS = ("forward", "reversed", "shuffled", "warps", "warps_reversed", "warps_shuffled")

# -fno-strict-aliasing: kernels look at the same memory as different types, as CUDA allows.
FLAGS = "-std=c++17 -O1 -march=native -fPIC -fvisibility=hidden -fno-strict-aliasing -fno-gnu-unique -w -DFF_EMULATE"


def compiler() -> list[str]:
    """The C++ compiler's command: ``$CXX`` or g++."""
    return shlex.split(os.environ.get("CXX", "g++"))


def _digest(paths: Sequence[Path], extra: str) -> str:
    h = hashlib.sha256(extra.encode())
    for path in paths:
        h.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return h.hexdigest()[:16]


def build(sources: Sequence[Path], name: str, flags: str = "") -> Path:
    """Compiles ``sources`` (.cu or .cpp) for the emulator and links them into ``build/emulated/<hash>/<name>``.

    Objects are kept by the hash of their source, every header of csrc and the compile line.

    Raises:
        RuntimeError: there is no compiler, or it failed; the message has its output.
    """
    command = [*compiler(), *FLAGS.split(), *flags.split()]
    headers = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh") and p.parent.name != "cpu")
    keys = [_digest([source, *headers], " ".join(command)) for source in sources]
    target = BUILD / hashlib.sha256("".join(keys).encode()).hexdigest()[:16] / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = {s: BUILD / "objects" / f"{s.name}.{key}.o" for s, key in zip(sources, keys, strict=True)}
        missing = sorted((s for s in sources if not objects[s].exists()), key=lambda s: s.stat().st_size, reverse=True)

        def compile_one(source: Path) -> None:
            out = objects[source]
            scratch = out.with_suffix(".tmp")
            language = ["-x", "c++"] if source.suffix == ".cu" else []
            _run([*command, *language, "-c", str(source), "-o", str(scratch)])
            scratch.replace(out)

        (BUILD / "objects").mkdir(exist_ok=True)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ThreadPoolExecutor(cores) as pool:  # other processes wait for the lock, so every core is free for this
            list(pool.map(compile_one, missing))
        scratch = target.with_suffix(".tmp")
        _run([*compiler(), "-shared", "-Wl,-Bsymbolic", "-o", str(scratch), *map(str, objects.values())])
        scratch.replace(target)
    return target


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(
            f"emulated CUDA kernels: no compiler {command[0]!r}; install g++ or set CXX to a C++17 compiler"
        ) from None
    if done.returncode:
        raise RuntimeError(f"emulated CUDA kernels: {shlex.join(command)} failed:\n{done.stderr[-4000:]}")


def load() -> ModuleType:
    """The module ``fastformer._cuda_emulated``, built if its sources have changed.

    ``FASTFORMER_EMULATE_ORDER`` sets the initial order.

    Raises:
        ImportError: the csrc folder is not beside the package (a wheel was installed), or pybind11 is missing.
        RuntimeError: compiling failed.
        ValueError: ``FASTFORMER_EMULATE_ORDER`` is not one of :data:`ORDERS`.
    """
    if MODULE in sys.modules:
        return sys.modules[MODULE]
    if not (CSRC / "emulation").is_dir():
        raise ImportError(f"emulated CUDA kernels need fastformer's sources; there is no {CSRC / 'emulation'}")
    try:
        import pybind11
    except ImportError:
        raise ImportError("emulated CUDA kernels need pybind11 to build: pip install pybind11") from None
    python = CSRC / "python" / "bindings_cuda.cpp"
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), *sorted((CSRC / "cuda").glob("*.cpp"))]
    sources += [CSRC / "emulation" / "emulator.cpp", python]
    includes = f"-I{sysconfig.get_paths()['include']} -I{pybind11.get_include()}"
    name = "_cuda_emulated" + sysconfig.get_config_var("EXT_SUFFIX")
    path = build(sources, name, f"-DFF_MODULE=_cuda_emulated {includes}")
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if order := os.environ.get("FASTFORMER_EMULATE_ORDER"):
        module.set_order(order)
    sys.modules[MODULE] = module
    return module


def set_order(name: str) -> None:
    """Makes emulated kernels run their threads in another order; ``name`` is one of :data:`ORDERS`.

    Raises:
        ValueError: there is no such order.
    """
    load().set_order(name)
