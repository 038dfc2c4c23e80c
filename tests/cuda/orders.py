"""The kernels of tests/cuda/kernels as a library for ctypes, and the modes in which the emulator runs them."""

import ctypes
from pathlib import Path

from fastformer.backends.cuda import emulation

KERNELS = Path(__file__).resolve().parent / "kernels"
# Every order of threads, with asynchronous operations done at once, at the last moment, and now one way, now the other.
MODES = [(order, completion) for order in emulation.ORDERS for completion in ("at_once", "late", "mixed")]

_POINTER, _INT, _BOOL = ctypes.c_void_p, ctypes.c_int, ctypes.c_bool
_FUNCTIONS = {
    "run_basics": [_INT, _INT, _POINTER, _POINTER],
    "run_gemm_sm80": [_INT, _BOOL, _POINTER, _POINTER, _POINTER, _INT, _INT, _INT],
    "run_gemm_sm90": [_INT, _POINTER, _POINTER, _POINTER, _INT, _INT, _INT],
    "run_product": [_INT, _BOOL, _INT, _POINTER, _POINTER, _POINTER],
    "run_bulk": [_INT, _POINTER, _POINTER, _POINTER, _INT],
}


class Kernels:
    """The library's functions as attributes; pointers are integers."""

    def __init__(self, flags: str = "", files: tuple[str, ...] | None = None):
        sources = sorted(KERNELS.glob("*.cu")) if files is None else [KERNELS / name for name in files]
        sources += [emulation.CSRC / "emulation" / "emulator.cpp", emulation.CSRC / "cuda" / "cuda.cpp"]
        self._library = ctypes.CDLL(str(emulation.build(sources, "kernels.so", flags)))
        for name, types in _FUNCTIONS.items():
            if hasattr(self._library, name):
                function = getattr(self._library, name)
                function.argtypes, function.restype = types, _INT
                setattr(self, name, function)
        self.configure = self._library.configure
        self.configure.argtypes, self.configure.restype = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint], _BOOL
        self.late_operations = self._library.late_operations
        self.late_operations.restype = ctypes.c_uint64
        self._library.ff_last_error.restype = ctypes.c_char_p

    def error(self) -> str:
        """The message of the last call that failed."""
        return self._library.ff_last_error().decode()
