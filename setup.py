"""Builds the extension modules; everything else about the package is in pyproject.toml.

    fastformer._C       csrc/python/bindings.cpp + csrc/cpu, each kernel file once per instruction set
    fastformer._C_wide  the same with 64-byte vectors in AVX2 instructions and bfloat16's products written out, so that
                        what AVX-512 and AMX run is tested on any machine; only with FASTFORMER_WIDE_EMULATION=1
    fastformer._cuda    csrc/cuda, where nvcc is found

The compile and link lines go into one build.ninja, so a rebuild touches only what changed. No torch headers, so one
build serves every torch version.

    python setup.py build_ext --inplace     build beside the sources, for development

Environment: CXX, CUDACXX, FASTFORMER_CUDA=0 (never) or 1 (an error without nvcc), FASTFORMER_CUDA_ARCHS="90a" (default
"80 90a"), FASTFORMER_WIDE_EMULATION=1, MAX_JOBS.
"""

import fcntl
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit(
        "fastformer needs Python 3.10 or newer; this is {}.{} ({}). Install a newer Python and use it, for example: "
        "make demo PYTHON=python3.12".format(sys.version_info[0], sys.version_info[1], sys.executable)
    )

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# No -ffast-math: kernels rely on infinities and on NaN passing through.
CXX_FLAGS = "-std=c++17 -O3 -fopenmp -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast"
NVCC_FLAGS = "-std=c++17 -O3 --use_fast_math -cudart static -Xcompiler -fPIC,-fvisibility=hidden"

# ptxas's remarks on speed have a number in brackets and are shown.
PTXAS_STATISTICS = "^ptxas info +: +[^ (]|bytes stack frame"

# Flags of each instruction set, least demanding first. This is also the link order: where two objects hold the same
# inline function (a std:: template, say) the linker keeps the first, which then runs on every machine.
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = AVX2 + " -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
AVX512_BF16 = AVX512 + " -mavx512bf16"
AMX = AVX512_BF16 + " -mamx-tile -mamx-bf16"
ISA_FLAGS = {
    "generic": "-DFF_ISA=generic -DFF_VEC_BYTES=16 -DFF_ENTRY",
    "avx2": "-DFF_ISA=avx2 -DFF_VEC_BYTES=32 " + AVX2,
    "avx512": "-DFF_ISA=avx512 -DFF_VEC_BYTES=64 " + AVX512,
    "avx512_bf16": "-DFF_ISA=avx512_bf16 -DFF_VEC_BYTES=64 -DFF_BF16_DOT=1 " + AVX512_BF16,
    "amx": "-DFF_ISA=amx -DFF_VEC_BYTES=64 -DFF_BF16_DOT=2 " + AMX,
}
# -O1: these run in tests alone, and vectors of two registers take five times as long to compile at -O3.
WIDE_FLAGS = {
    "avx512": "-DFF_ISA=avx512 -DFF_VEC_BYTES=64 -Wno-psabi -O1 " + AVX2,
    "avx512_bf16": "-DFF_ISA=avx512_bf16 -DFF_VEC_BYTES=64 -DFF_BF16_DOT=1 -Wno-psabi -O1 " + AVX2,
    "amx": "-DFF_ISA=amx -DFF_VEC_BYTES=64 -DFF_BF16_DOT=2 -Wno-psabi -O1 " + AVX2,
}
# The files with bfloat16 products; on those instruction sets everything else runs AVX-512's code.
BF16_ISAS = ("avx512_bf16", "amx")
BF16_SOURCES = ("attention.cpp", "attention_backward.cpp")


class BuildError(Exception):
    """A message with the remedy; shown without a traceback."""


def enabled(variable):
    return os.environ.get(variable, "0").lower() not in ("", "0", "off", "false", "no")


def find_compiler():
    """A C++17 compiler with OpenMP: $CXX, else the first of g++, c++, clang++ that works."""
    # g++ first: its OpenMP runtime, libgomp.so.1, is the one PyTorch's wheels load, so both share one pool of threads.
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    program = (
        "#include <omp.h>\n#include <optional>\nint main() { return !std::optional<int>(omp_get_max_threads()); }\n"
    )
    tried = []
    for name in candidates:
        command = shlex.split(name)
        if not shutil.which(command[0]):
            tried.append(f"{name}: not found")
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(program)
            probe = subprocess.run(
                [*command, "-std=c++17", "-fopenmp", str(source), "-o", str(source.with_suffix(""))],
                capture_output=True,
                text=True,
            )
        if probe.returncode == 0:
            return name
        message = probe.stderr.strip().splitlines()
        tried.append(f"{name}: {message[-1] if message else 'failed'}")
    raise BuildError(
        "no C++17 compiler with OpenMP (" + "; ".join(tried) + ").\n"
        "  Debian, Ubuntu: sudo apt-get install g++     Fedora: sudo dnf install gcc-c++     conda: conda install gxx\n"
        "  A compiler elsewhere: CXX=/path/to/g++ pip install ."
    )


def knows_bf16(cxx):
    """Whether the compiler has the bfloat16 instructions: GCC from 11 on, Clang from 12 on."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() {}\n")
        command = [*shlex.split(cxx), *AMX.split(), "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def find_nvcc():
    """The path of nvcc, or None (with one line that says so)."""
    wanted = os.environ.get("FASTFORMER_CUDA", "auto").lower()
    if wanted in ("0", "off", "false", "no"):
        print("fastformer: FASTFORMER_CUDA=0, so no CUDA kernels are built")
        return None
    homes = [os.environ.get(v) for v in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), *(home and os.path.join(home, "bin", "nvcc") for home in homes[:2])]
    candidates += ["nvcc", os.path.join(homes[2], "bin", "nvcc")]
    for candidate in candidates:
        if candidate and shutil.which(candidate):
            return shutil.which(candidate)
    if wanted not in ("", "auto"):
        raise BuildError("FASTFORMER_CUDA=1, but nvcc was not found. Set CUDA_HOME to the CUDA toolkit's folder.")
    print("fastformer: no nvcc, so no CUDA kernels are built (a GPU still runs the Triton ones)")
    return None


def find_ninja():
    if shutil.which("ninja"):
        return shutil.which("ninja")
    try:
        import ninja
    except ImportError:
        raise BuildError("ninja is missing. pip install ninja") from None
    return os.path.join(ninja.BIN_DIR, "ninja")


def pybind11_include():
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is missing. pip install pybind11") from None
    return pybind11.get_include()


def is_x86_64():
    return platform.machine().lower() in ("x86_64", "amd64")


def cuda_sources():
    """Every file of the CUDA module; empty as long as it has no kernels or no bindings."""
    kernels, bindings = sorted((CSRC / "cuda").glob("*.cu")), CSRC / "python" / "bindings_cuda.cpp"
    return [bindings, *sorted((CSRC / "cuda").glob("*.cpp")), *kernels] if kernels and bindings.exists() else []


def cpu_sources():
    return [CSRC / "python" / "bindings.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]


class Ninja:
    """The text of a build.ninja: one edge per object, one per module."""

    def __init__(self, folder, cxx, nvcc):
        launcher = shutil.which("ccache")
        prefix = launcher + " " if launcher else ""
        # For the bindings alone: in pip's isolated builds pybind11 lies in a new place every time.
        includes = [sysconfig.get_paths()["include"], pybind11_include()]
        self.python_flags = " ".join("-I" + shlex.quote(str(path)) for path in includes)
        self.folder = folder
        self.edges = []  # (is a .cu, bytes of the source, text)
        self.bf16 = is_x86_64() and knows_bf16(cxx)
        self.lines = [
            "ninja_required_version = 1.5",
            "rule cxx",
            f"  command = {prefix}{cxx} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = C++ $out",
            "rule link",
            # -Bsymbolic: two of these modules in one process never call into each other.
            f"  command = {cxx} -shared -fopenmp -Wl,-Bsymbolic -o $out $in",
            "  description = link $out",
        ]
        if nvcc:
            nvcc = shlex.quote(nvcc)
            self.lines += [
                "rule nvcc",
                # The flags and what ptxas says of each kernel stay in a file, for backends/cuda/resources.py.
                f"  command = echo '$nvcc_flags' >$out.log; "
                f"{prefix}{nvcc} $flags -Xptxas -v -MD -MF $out.d -c $in -o $out >>$out.log 2>&1; status=$$?; "
                f"sed 1d $out.log | grep -Ev '{PTXAS_STATISTICS}'; exit $$status",
                "  depfile = $out.d\n  deps = gcc\n  description = nvcc $out",
                "rule nvlink",
                f"  command = {nvcc} -shared -cudart static -Xcompiler -fPIC -o $out $in",
                "  description = link $out",
            ]

    def escape(self, path):
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def file_name(self, module):
        return module + sysconfig.get_config_var("EXT_SUFFIX")

    def object(self, source, variant):
        return f"{variant}/{source.parent.name}/{source.name}.o"

    def compile(self, rule, source, variant, flags):
        out = self.object(source, variant)
        if source.parent.name == "python":
            flags += (
                " -O1 " + self.python_flags
            )  # they pass arguments on; at -O3 they are the longest step of the build
        text = f"build {out}: {rule} {self.escape(source)}\n  flags = {flags}"
        self.edges.append((rule == "nvcc", source.stat().st_size, text))
        return out

    def link(self, rule, module, objects):
        self.edges.append((False, 0, f"build {self.file_name(module)}: {rule} {' '.join(objects)}"))

    def cpu_module(self, module, wide=False):
        variant = "wide" if wide else "cpu"
        isas = ISA_FLAGS if is_x86_64() else {"generic": ISA_FLAGS["generic"]}
        if is_x86_64():  # runs on processors from before AVX2 (2013) only: half the compile time is worth more there
            isas = {**isas, "generic": isas["generic"] + " -O1"}
        once = f"{CXX_FLAGS} -DFF_MODULE={module}" + (" -DFF_ISA_ALWAYS_SUPPORTED" if wide else "")
        if self.bf16:
            once += " -DFF_BF16_ISAS"
            isas = {**isas, "generic": isas["generic"] + " -DFF_BF16_ISAS"}
        bindings, *sources = cpu_sources()
        kernels = [s for s in sources if s.name != "cpu.cpp"]
        objects = [self.compile("cxx", s, variant, once) for s in (bindings, CSRC / "cpu" / "cpu.cpp")]
        for isa, flags in isas.items():
            if isa in BF16_ISAS and not self.bf16:
                continue
            of_isa = [s for s in kernels if isa not in BF16_ISAS or s.name in BF16_SOURCES]
            if not wide:
                objects += [self.compile("cxx", s, isa, f"{CXX_FLAGS} {flags}") for s in of_isa]
            elif isa in WIDE_FLAGS:
                objects += [self.compile("cxx", s, f"wide_{isa}", f"{CXX_FLAGS} {WIDE_FLAGS[isa]}") for s in of_isa]
            else:  # the objects of _C serve
                objects += [self.object(s, isa) for s in of_isa]
        self.link("link", module, objects)

    def cuda_module(self, module):
        archs = os.environ.get("FASTFORMER_CUDA_ARCHS", "80 90a").split()
        gencode = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)
        if "80" in archs:  # and as PTX, for cards newer than this list
            gencode += " -gencode=arch=compute_80,code=compute_80"
        flags = f"{NVCC_FLAGS} {gencode} -DFF_MODULE={module}"
        self.lines.append(f"nvcc_flags = {flags}")
        self.link("nvlink", module, [self.compile("nvcc", s, "cuda", flags) for s in cuda_sources()])

    def build(self):
        # ninja starts jobs in this order: the longest first, so that no core is left alone with one at the end.
        edges = [text for *_, text in sorted(self.edges, key=lambda edge: edge[:2], reverse=True)]
        path, text = self.folder / "build.ninja", "\n".join([*self.lines, *edges]) + "\n"
        if not path.exists() or path.read_text() != text:
            scratch = path.with_suffix(".tmp")
            scratch.write_text(text)
            scratch.replace(path)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = os.environ.get("MAX_JOBS", str(cores))
        if subprocess.run([find_ninja(), "-C", str(self.folder), "-j", jobs]).returncode:
            raise BuildError(
                "compiling failed; see the first error above. FASTFORMER_CUDA=0 leaves the CUDA files out."
            )


class NinjaBuild(build_ext):
    def build_extensions(self):
        try:
            self.compile_all()
        except BuildError as error:
            print(f"\nfastformer: {error}\n", file=sys.stderr)
            sys.exit(1)

    def compile_all(self):
        compiler, nvcc = find_compiler(), find_nvcc() if cuda_sources() else None
        # Not build_temp: pip gives an editable install a fresh one each time, and nothing would be incremental.
        folder = ROOT / "build" / sysconfig.get_config_var("SOABI")
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would write the same objects
            self.compile_and_copy(Ninja(folder, compiler, nvcc), nvcc)

    def compile_and_copy(self, ninja, nvcc):
        built = []
        for extension in self.extensions:
            module = extension.name.rpartition(".")[2]
            if module == "_cuda":
                if not nvcc:
                    continue
                ninja.cuda_module(module)
            else:
                ninja.cpu_module(module, wide=module == "_C_wide")
            built.append(extension)
        ninja.build()
        self.extensions[:] = built  # what setuptools then copies and lists: only modules that exist
        for extension in built:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ninja.folder / ninja.file_name(extension.name.rpartition(".")[2]), target)


def extensions():
    cpu = [str(s.relative_to(ROOT)) for s in cpu_sources()]
    modules = [Extension("fastformer._C", cpu)]
    if enabled("FASTFORMER_WIDE_EMULATION") and is_x86_64():
        modules.append(Extension("fastformer._C_wide", cpu))
    if cuda_sources():
        modules.append(Extension("fastformer._cuda", [str(s.relative_to(ROOT)) for s in cuda_sources()]))
    return modules


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
