"""Mends Triton 3.6's interpreter (``TRITON_INTERPRET=1``) so that it can be trusted as a test of these kernels.

The interpreter runs a kernel program by program on NumPy arrays. NumPy has no bfloat16, so it keeps the bit patterns as
uint16, and there it goes wrong without saying so:

- arithmetic and comparisons on bfloat16 add, multiply and order the *bit patterns* as integers;
- float32 -> bfloat16 truncates, where the hardware rounds to nearest even;
- ``tl.dot`` multiplies the bit patterns of bfloat16 operands;
- ``tl.sum`` and ``tl.max`` reduce bit patterns.

With NumPy >= 2.4 it also fails outright, because ``int()`` of an array with one element and one dimension became an
error. And it is slow: every call of one Triton function by another patches the whole language module anew, which is a
third of the time of a small kernel; every value makes its type, and the types of its shape, anew; the check for
overflow runs eight tensor operations beside each one it checks. And NumPy warns where a GPU silently gives inf or NaN.
:func:`apply` replaces exactly these pieces, and turns on one check that is there: an integer operation that overflows
32 bits, as an offset into a large tensor may, raises. Atomic operations on bfloat16 stay broken; no kernel here uses
them. The replacements are checked on their own in tests/triton/test_interpreter.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock

_applied = False


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) -> float32, exactly."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bit patterns (uint16), rounded to nearest even; NaN stays NaN."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _is_bfloat16(handle: stock.TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _mend_conversions() -> None:
    convert = stock._convert_float

    def mended(data, source, target, rounding_mode):
        if source == tl.bfloat16 and target == tl.float32:
            return widen(data)
        if source == tl.float32 and target == tl.bfloat16:
            return narrow(data)
        return convert(data, source, target, rounding_mode)

    stock._convert_float = mended
    cast = stock.InterpreterBuilder.cast_impl

    def cast_impl(self, handle, target):
        # bfloat16 <-> integers, float16 and float64 go through float32; the stock code converts the bit pattern.
        if _is_bfloat16(handle) and target.scalar != tl.bfloat16:
            handle = stock.TensorHandle(widen(handle.data), tl.float32)
            return handle if target.scalar == tl.float32 else cast(self, handle, target)
        if target.scalar == tl.bfloat16 and not _is_bfloat16(handle):
            return stock.TensorHandle(narrow(handle.data.astype(np.float32)), tl.bfloat16)
        return cast(self, handle, target)

    stock.InterpreterBuilder.cast_impl = cast_impl
    stock.InterpreterBuilder.get_bf16 = lambda self, value: stock.TensorHandle(
        narrow(np.array([value], np.float32)), tl.bfloat16
    )


def _mend_arithmetic() -> None:
    binary, unary = stock.InterpreterBuilder.binary_op, stock.InterpreterBuilder.unary_op

    def binary_op(self, left, right, op: Callable):
        if not (_is_bfloat16(left) and _is_bfloat16(right)):
            return binary(self, left, right, op)
        result = op(widen(left.data), widen(right.data))
        if result.dtype == np.bool_:
            return stock.TensorHandle(result, tl.int1)
        return stock.TensorHandle(narrow(result), tl.bfloat16)

    def unary_op(self, operand, op: Callable):
        if not _is_bfloat16(operand):
            return unary(self, operand, op)
        return stock.TensorHandle(narrow(op(widen(operand.data))), tl.bfloat16)

    stock.InterpreterBuilder.binary_op = binary_op
    stock.InterpreterBuilder.unary_op = unary_op
    stock.InterpreterBuilder.create_fneg = lambda self, operand: self.unary_op(operand, np.negative)


def _mend_dot() -> None:
    dot = stock.InterpreterBuilder.create_dot

    def float32(handle):  # which holds every product of two bfloat16 exactly, as tensor cores do
        return stock.TensorHandle(widen(handle.data), tl.float32) if _is_bfloat16(handle) else handle

    stock.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, float32(a), float32(b), *rest)


def _mend_reductions() -> None:
    reduce = stock.ReduceOps.apply_impl

    def apply_impl(self, inputs):
        if len(inputs) != 1 or inputs[0].dtype.scalar != tl.bfloat16:
            return reduce(self, inputs)
        wide = stock.ReduceOps.to_tensor(self, widen(inputs[0].handle.data), tl.float32)
        result = reduce(self, (wide,))
        result = result[0] if isinstance(result, (list, tuple)) else result
        kind = tl.block_type(tl.bfloat16, result.type.shape) if result.type.is_block() else tl.bfloat16
        return tl.tensor(stock.TensorHandle(narrow(result.handle.data), tl.bfloat16), kind)

    stock.ReduceOps.apply_impl = apply_impl


def _mend_scalars() -> None:
    patch = stock._patch_lang_tensor

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    stock._patch_lang_tensor = patch_tensor


def _mend_patching() -> None:
    patch = stock._patch_lang
    patched: set[frozenset[int]] = set()  # sets of language modules patched since the current launch began

    def patch_language(fn):
        modules = frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
        if modules in patched:
            return stock._LangPatchScope()
        scope = patch(fn)
        if not patched:  # the launch itself: what it patched is put back when it ends
            restore = scope.restore

            def restore_all():
                patched.clear()
                restore()

            scope.restore = restore_all
        patched.add(modules)
        return scope

    stock._patch_lang = patch_language


def _mend_warnings() -> None:
    run = stock.GridExecutor.__call__

    def call(self, *arguments, **options):
        with np.errstate(all="ignore"):
            return run(self, *arguments, **options)

    stock.GridExecutor.__call__ = call


def _mend_types() -> None:
    """Each shape is checked and wrapped once; nothing writes into what values then share."""
    make_block, numpy_dtype = tl.block_type.__init__, functools.cache(stock._get_np_dtype)

    @functools.cache
    def block_of(shape: tuple[int, ...]) -> tl.block_type:
        block = tl.block_type.__new__(tl.block_type)
        make_block(block, tl.int32, list(shape))
        return block

    @functools.cache
    def shape_of(shape: tuple[int, ...]) -> tuple[tl.tuple, tl.constexpr]:
        return tl.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(int(np.prod(shape)))

    @functools.cache
    def name_of(shape: tuple[int, ...], element: str) -> str:
        return f"<{shape}, {element}>"

    def init_block(self, element_ty: tl.dtype, shape: Iterable) -> None:
        key = tuple(n.value if isinstance(n, tl.constexpr) else n for n in shape)
        block = block_of(key)
        self.element_ty, self.shape, self.numel = element_ty, block.shape, block.numel
        self.name = name_of(key, element_ty.name)

    def init_tensor(self, handle, type: tl.dtype) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_of(tuple(type.shape.values) if type.is_block() else ())

    def dtype_of(type: tl.dtype) -> np.dtype:
        scalar = type.scalar
        return np.dtype(np.uint64) if scalar.is_ptr() else numpy_dtype(scalar)

    tl.block_type.__init__ = init_block
    tl.tensor.__init__ = init_tensor
    stock._get_np_dtype = dtype_of


def _check_overflow() -> None:
    """Integer operations raise where 32 bits (or fewer) do not hold their result."""
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self, left: tl.tensor, right: tl.tensor, operation: Callable) -> None:
        kind, name = left.type.scalar, operation.__name__
        if kind.int_bitwidth >= 64:
            return
        result = operations[name](left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
        inside = kind.get_int_min_value() <= result.min() and result.max() <= kind.get_int_max_value()
        assert inside, f"int{kind.int_bitwidth} overflow detected for operation {name}"

    stock.interpreter_builder.options = stock.InterpreterOptions(debug=True)
    TritonSemantic.binary_op_sanitize_overflow_impl = check


def apply() -> None:
    """Mends the interpreter of this process, once."""
    global _applied
    if _applied:
        return
    _applied = True
    _mend_conversions()
    _mend_arithmetic()
    _mend_dot()
    _mend_reductions()
    _mend_scalars()
    _mend_patching()
    _mend_warnings()
    _mend_types()
    _check_overflow()
