"""The kernels without torch: from C through CMake, and from Python through ctypes with only NumPy in the process."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def run(*command, **kwargs) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not installed")
def test_c_program_with_cmake(tmp_path):
    """Configure, build, install; then a separate C11 project finds the package, compiles warning-free and runs."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    library, prefix, program = tmp_path / "library", tmp_path / "prefix", tmp_path / "program"
    launcher = f"-DCMAKE_CXX_COMPILER_LAUNCHER={sys.executable};{HERE / 'launcher.py'}"  # two builds of it, one in CI
    run("cmake", *generator, "-S", ROOT / "csrc", "-B", library, "-DFASTFORMER_CUDA=OFF", launcher)
    run("cmake", "--build", library, "--parallel", "2")
    run("cmake", "--install", library, "--prefix", prefix)
    run("cmake", *generator, "-S", HERE, "-B", program, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", program)
    assert "checked generic" in run(program / "layer_norm")


CTYPES_PROGRAM = """
import ctypes, sys
import numpy as np

lib = ctypes.CDLL(sys.argv[1])

class LayerNormArgs(ctypes.Structure):  # ff_layer_norm_args
    _fields_ = [("dtype", ctypes.c_int), ("param_dtype", ctypes.c_int)]
    _fields_ += [(name, ctypes.c_int64) for name in ("rows", "cols", "x_stride", "dout_stride")]
    _fields_ += [("eps", ctypes.c_double)]
    _fields_ += [(name, ctypes.c_void_p) for name in (
        "x", "weight", "bias", "out", "mean", "rstd", "dout", "dx", "dweight", "dbias", "workspace")]

lib.ff_last_error.restype = ctypes.c_char_p
rng = np.random.default_rng(0)
x, weight, bias = rng.standard_normal((3, 19)), rng.standard_normal(19), rng.standard_normal(19)  # float64: dtype 3
out, mean, rstd = np.empty_like(x), np.empty(3), np.empty(3)
args = LayerNormArgs(dtype=3, param_dtype=3, rows=3, cols=19, x_stride=19, eps=1e-5, x=x.ctypes.data,
                     weight=weight.ctypes.data, bias=bias.ctypes.data, out=out.ctypes.data, mean=mean.ctypes.data,
                     rstd=rstd.ctypes.data)
assert lib.ff_cpu_layer_norm_forward(ctypes.byref(args), None) == 0, lib.ff_last_error()
centred = x - x.mean(1, keepdims=True)
expected = centred / np.sqrt(x.var(1, keepdims=True) + 1e-5) * weight + bias
np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)

args.mean = None  # an rms norm has none
assert lib.ff_cpu_rms_norm_forward(ctypes.byref(args), None) == 0, lib.ff_last_error()
expected = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * weight + bias
np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
assert lib.ff_cpu_layer_norm_forward(ctypes.byref(args), None) == 1 and b"mean, rstd" in lib.ff_last_error()

args.cols = -1
assert lib.ff_cpu_layer_norm_forward(ctypes.byref(args), None) == 1
assert b"cols" in lib.ff_last_error()
assert "torch" not in sys.modules
print("ok")
"""


def test_ctypes_and_numpy_without_torch():
    """The extension module is also a plain shared library with the C functions in it."""
    spec = importlib.util.find_spec("fastformer._C")
    assert spec is not None and spec.origin is not None, "fastformer._C is not built: make build"
    assert run(sys.executable, "-c", CTYPES_PROGRAM, spec.origin, cwd="/").strip() == "ok"
