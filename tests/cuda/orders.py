"""What tests of emulated kernels share: the modes in which the emulator runs them, outputs between margins, and the
kernels of tests/cuda/kernels as a library for ctypes."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastformer.backends import layout
from fastformer.backends.cuda import emulation

KERNELS = Path(__file__).resolve().parent / "kernels"
# When asynchronous operations happen: at once, at the last moment, and now one way, now the other.
COMPLETIONS = ("at_once", "late", "mixed")
# The same in every order of threads.
MODES = [(order, completion) for order in emulation.ORDERS for completion in COMPLETIONS]


def set_completion(name: str) -> None:
    """When the asynchronous operations of fastformer's emulated kernels happen: one of COMPLETIONS."""
    function = ctypes.CDLL(emulation.load().__file__).ff_emulation_set_completion
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_bool
    assert function(name.encode())


@contextmanager
def running(order: str, completion: str) -> Iterator[None]:
    """Inside, fastformer's emulated kernels run in another mode."""
    emulation.set_order(order)
    set_completion(completion)
    try:
        yield
    finally:
        emulation.set_order("forward")
        set_completion("at_once")


@contextmanager
def guarded_outputs(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> Iterator[None]:
    """What ``modules`` (of backends/cuda) allocate starts as NaN between two margins, untouched at the end."""
    buffers = []

    def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or like.dtype
        count, margin = torch.Size(shape).numel(), 1024
        fill = float("nan") if dtype.is_floating_point else 0xFF
        buffer = torch.full((count + 2 * margin,), fill, dtype=dtype, device=like.device)
        buffers.append((buffer, margin, buffer[:margin].clone()))
        return buffer[margin : margin + count].view(shape)

    def empty_out(q: Tensor, v: Tensor) -> Tensor:
        b, h, s, _ = q.shape
        return empty(q, b, s, h, v.shape[3]).transpose(1, 2)

    def like_in_order(x: Tensor) -> Tensor:
        return empty(x, *x.shape).as_strided(x.shape, layout.dense_like(x).stride())

    guarded = {
        "dense_like": like_in_order,
        "empty": empty,
        "empty_out": empty_out,
        "empty_like_input": lambda t: empty_out(t, t),
    }
    for module in modules:
        for name in guarded.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, guarded[name])
    yield
    for buffer, margin, untouched in buffers:
        for edge in (buffer[:margin], buffer[-margin:]):
            assert torch.equal(edge.view(torch.uint8), untouched.view(torch.uint8)), "a kernel wrote out of bounds"


_POINTER, _INT, _BOOL = ctypes.c_void_p, ctypes.c_int, ctypes.c_bool
_FUNCTIONS = {
    "run_basics": [_INT, _INT, _POINTER, _POINTER],
    "run_cluster": [_INT, _INT, _INT, _INT, _POINTER, _POINTER],
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
