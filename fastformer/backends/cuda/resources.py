"""What ptxas says about each CUDA kernel: registers, spills, shared memory, and whether its wgmma was serialised.

:func:`compile_kernels` compiles a .cu file off-line (no GPU needed) for the architectures of :data:`ARCHITECTURES` and
returns one :class:`Kernel` per kernel and architecture; :func:`problems` lists what makes a kernel unfit to ship.

    python -m fastformer.backends.cuda.resources     prints the table of every kernel in csrc/cuda
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "resources"
MODULE_BUILD = ROOT / "build" / str(sysconfig.get_config_var("SOABI"))  # setup.py's

ARCHITECTURES = ("80", "90a")
FLAGS = ("-std=c++17", "-O3", "--use_fast_math")

# ptxas warns with these when it cannot keep wgmma asynchronous and inserts waits: the kernel is right, and slow.
SERIALISED = (*(f"C75{n}" for n in range(10, 21)), "instructions are serialized")


@dataclass(frozen=True)
class Kernel:
    """One kernel compiled for one architecture; sizes in bytes, ``shared`` without dynamic shared memory."""

    name: str
    arch: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    serialised: bool = False


def find_nvcc() -> str | None:
    """The path of nvcc: on PATH, or below CUDA_HOME or /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for candidate in ("nvcc", *(os.path.join(home, "bin", "nvcc") for home in homes if home)):
        if path := shutil.which(candidate):
            return path
    return None


def parse(log: str) -> list[Kernel]:
    """The kernels in what ``nvcc -Xptxas -v`` printed, with mangled names.

    Raises:
        ValueError: the log names a kernel and does not say what it uses (another ptxas may word it differently).
    """
    serialised = {
        (match["name"] or "")
        for line in log.splitlines()
        if any(mark in line for mark in SERIALISED)
        for match in [re.search(r"function '(?P<name>[^']+)'|$", line)]
    }
    kernels = []
    sections = re.split(r"Compiling entry function '([^']+)' for 'sm_(\w+)'", log)[1:]
    for name, arch, text in zip(sections[::3], sections[1::3], sections[2::3], strict=True):
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        registers = re.search(r"Used (\d+) registers", text)
        if not spills or not registers:
            raise ValueError(f"ptxas does not say what {name} for sm_{arch} uses:\n{text[:500]}")
        shared = re.search(r"(\d+) bytes smem", text)
        kernels.append(
            Kernel(
                name,
                f"sm_{arch}",
                int(registers[1]),
                int(spills[1]),
                int(spills[2]),
                int(shared[1]) if shared else 0,
                # A warning that names no function is held against every kernel of the file.
                name in serialised or "" in serialised,
            )
        )
    return kernels


def problems(kernels: Iterable[Kernel]) -> list[str]:
    """A line for every kernel that spills registers or whose wgmma is serialised."""
    found = []
    for k in kernels:
        if k.spill_stores or k.spill_loads:
            found.append(f"{k.name} ({k.arch}) spills: {k.spill_stores} bytes stored, {k.spill_loads} loaded")
        if k.serialised:
            found.append(f"{k.name} ({k.arch}): ptxas serialised its wgmma instructions")
    return found


def _readable(names: Sequence[str]) -> list[str]:
    """Demangled and shortened: ``ff::norm_forward<true, __half, float, 8, 4>``; as given where c++filt is missing."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if not tool:
        return list(names)
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"^void |\(.*$", "", line).replace("__nv_bfloat16", "bf16") for line in done.stdout.splitlines()]


def _gencode(architectures: Iterable[str]) -> list[str]:
    return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]


def built_log(source: Path) -> Path | None:
    """What ptxas said when setup.py compiled ``source`` for :data:`ARCHITECTURES`; None if it is out of date.

    The flags may be more than :data:`FLAGS`: how the host's code is compiled, and PTX for later cards.
    """
    compiled = MODULE_BUILD / "cuda" / source.parent.name / f"{source.name}.o"
    log = compiled.with_name(f"{compiled.name}.log")
    if source.parent != CUDA or not (compiled.exists() and log.exists()):
        return None
    given = log.read_text().partition("\n")[0].split()
    machine_code = [flag for flag in given if flag.startswith("-gencode") and ",code=sm_" in flag]
    if not set(FLAGS) <= set(given) or sorted(machine_code) != sorted(_gencode(ARCHITECTURES)):
        return None
    read = [source, *CUDA.glob("*.cuh"), *CUDA.glob("*.h"), *CUDA.parent.glob("*.h"), *CUDA.parent.glob("include/*.h")]
    changed = max(path.stat().st_mtime for path in read)
    return log if changed < min(log.stat().st_mtime, compiled.stat().st_mtime) else None


def compile_kernels(
    source: Path, architectures: Sequence[str] = ARCHITECTURES, flags: Sequence[str] = ()
) -> list[Kernel]:
    """Compiles ``source`` for every architecture and returns its kernels.

    A file that setup.py has just compiled in the same way is not compiled again (:func:`built_log`). Else what ptxas
    said is kept in ``build/resources`` by the hash of the source, the headers of csrc/cuda and the command, so that an
    unchanged file is not compiled twice.

    Raises:
        RuntimeError: there is no nvcc, or the file does not compile; the message has the compiler's output.
    """
    if tuple(architectures) == ARCHITECTURES and not flags and (log := built_log(source)):
        return _kernels(log)
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
    command = [nvcc, *FLAGS, *flags, *_gencode(architectures), "-Xptxas", "-v", "-fatbin"]
    digest = hashlib.sha256("\0".join(command).encode())
    for path in (source, *sorted(CUDA.glob("*.cuh")), *sorted(CUDA.glob("*.h"))):
        digest.update(path.name.encode() + path.read_bytes())
    log = BUILD / f"{source.stem}.{digest.hexdigest()[:16]}.log"
    if not log.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([*command, str(source), "-o", os.devnull], capture_output=True, text=True)
        text = done.stdout + done.stderr
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} {source} failed:\n{text[-4000:]}")
        scratch = log.with_suffix(f".{os.getpid()}")
        scratch.write_text(text)
        scratch.replace(log)
    return _kernels(log)


def _kernels(log: Path) -> list[Kernel]:
    kernels = parse(log.read_text())
    names = _readable([k.name for k in kernels])
    return [Kernel(**{**vars(k), "name": name}) for k, name in zip(kernels, names, strict=True)]


def table(kernels: Iterable[Kernel]) -> str:
    """One Markdown row per kernel and architecture."""
    lines = ["| kernel | arch | registers | spilled bytes | shared bytes |", "|---|---|---:|---:|---:|"]
    for k in sorted(kernels, key=lambda k: (k.name, k.arch)):
        lines.append(f"| `{k.name}` | {k.arch} | {k.registers} | {k.spill_stores + k.spill_loads} | {k.shared} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    kernels = [k for source in sorted(CUDA.glob("*.cu")) for k in compile_kernels(source)]
    print(table(kernels), end="")
    for line in problems(kernels):
        print(line)


if __name__ == "__main__":
    main()
