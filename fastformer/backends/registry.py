"""Which backend runs a call.

Every operation exists in up to four backends, ``fastformer/backends/<backend>/<op>.py``, with the same two functions
(``forward``, ``backward``). A backend file declares what it covers::

    DTYPES = frozenset({torch.float32, torch.bfloat16})
    FEATURES = frozenset({"dropout"})          # optional parts of the operation it implements

and :func:`select` walks the order of :data:`PREFERENCE` for the call's device until one covers dtype and features. The
choice is cached per (op, device, dtype, features), so a call pays one dictionary lookup.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
OPS = (
    "layer_norm",
    "add_layer_norm",
    "rms_norm",
    "add_rms_norm",
    "softmax",
    "activation",
    "cross_entropy",
    "embedding",
    "rotary",
    "linear_cross_entropy",
    "attention",
    "decode_attention",
)

# Fastest first, per device and, where a measurement says otherwise, per operation. benchmarks/ prints the numbers
# behind each line; a CUDA device's order is the expected one until `make gpu` has run there.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}
PREFERENCE_BY_OP: dict[tuple[str, str], tuple[str, ...]] = {}
# Where a gradient is wanted on a CPU, PyTorch's own function is the faster one up to this many elements: a node of
# autograd's graph written in Python takes 10 to 20 microseconds, forward and backward, longer than the arithmetic.
# feed_forward, counted by its hidden elements and with or without a gradient, is two of PyTorch's linears up to there.
TORCH_UP_TO: dict[str, int] = {
    "layer_norm": 131072,
    "add_layer_norm": 65536,
    "relu": 1 << 20,
    "silu": 65536,
    "cross_entropy": 16384,
    "feed_forward": 16384,
}


class UnsupportedError(ValueError):
    """The backend that was asked for by name cannot run this call."""


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call, and what each of the others answered."""

    op: str
    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}"]
        lines += [f"  {name:10s} {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


_override: ContextVar[str | None] = ContextVar("fastformer_backend", default=None)
_strict: ContextVar[bool] = ContextVar("fastformer_strict", default=False)
_cache: dict[tuple, ModuleType] = {}
_warned: set[tuple] = set()


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


if os.environ.get("FASTFORMER_BACKEND"):
    _override.set(_check_name(os.environ["FASTFORMER_BACKEND"], "FASTFORMER_BACKEND"))


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Run every call inside on the named backend; a call it cannot run raises. ``None`` restores the choice.

    >>> with fastformer.backend("reference"):
    ...     fastformer.functional.layer_norm(x, (1024,))
    """
    token = _override.set(_check_name(name, "name") if name is not None else None)
    try:
        yield
    finally:
        _override.reset(token)


def overridden() -> str | None:
    """The backend that an override asks for at the moment, or None."""
    return _override.get()


@contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """Inside, a call that no fused kernel supports raises instead of running the reference."""
    token = _strict.set(enabled)
    try:
        yield
    finally:
        _strict.reset(token)


def load(name: str, op: str) -> ModuleType | None:
    """The file of one operation in one backend, or None if there is none."""
    try:
        return importlib.import_module(f"fastformer.backends.{name}.{op}")
    except ModuleNotFoundError as error:
        if error.name in (f"fastformer.backends.{name}.{op}", f"fastformer.backends.{name}"):
            return None
        raise


def refusal(name: str, op: str, device: str, dtype: torch.dtype, features: tuple[str, ...]) -> str | None:
    """Why backend ``name`` cannot run the call, or None if it can."""
    package = importlib.import_module(f"fastformer.backends.{name}")
    reason = package.unavailable(device)
    if reason:
        return reason
    module = load(name, op)
    if module is None:
        return "not implemented for this operation"
    if dtype not in module.DTYPES:
        accepted = ", ".join(sorted(str(d).removeprefix("torch.") for d in module.DTYPES))
        return f"dtype {str(dtype).removeprefix('torch.')} is not one of {accepted}"
    missing = [f for f in features if f not in module.FEATURES]
    if missing:
        return f"does not implement {', '.join(missing)}"
    return None


def preference(op: str, device: str) -> tuple[str, ...]:
    """Backends to try for ``op`` on ``device``, fastest first."""
    return PREFERENCE_BY_OP.get((op, device)) or PREFERENCE.get(device, ("reference",))


def select(op: str, device: str, dtype: torch.dtype, features: tuple[str, ...] = ()) -> ModuleType:
    """The backend module (with ``forward`` and ``backward``) that runs this call.

    Args:
        op: one of :data:`OPS`.
        device: ``tensor.device.type``.
        dtype: of the main input.
        features: optional parts of the operation this call uses, such as ``"dropout"``.

    Raises:
        UnsupportedError: an override (or :func:`strict`) asks for a backend that cannot run the call.
    """
    override, is_strict = _override.get(), _strict.get()
    key = (op, device, dtype, features, override, is_strict)
    module = _cache.get(key)
    if module is None:
        module = _cache[key] = _select(op, device, dtype, features, override, is_strict)
    return module


def _select(
    op: str, device: str, dtype: torch.dtype, features: tuple[str, ...], override: str | None, is_strict: bool
) -> ModuleType:
    if override is not None:
        reason = refusal(override, op, device, dtype, features)
        if reason:
            raise UnsupportedError(f"{op}: backend {override!r} was asked for and cannot run this call: {reason}")
        module = load(override, op)
        assert module is not None
        return module
    reasons = {}
    for name in preference(op, device):
        reasons[name] = refusal(name, op, device, dtype, features)
        if reasons[name] is not None:
            continue
        module = load(name, op)
        assert module is not None
        if name == "reference":
            why = "; ".join(f"{n}: {r}" for n, r in reasons.items() if r)
            message = f"fastformer.{op}: no fused kernel for {device} {dtype} {list(features)}: {why or 'none exists'}"
            if is_strict:
                raise UnsupportedError(message)
            if (op, device, dtype, features) not in _warned:
                _warned.add((op, device, dtype, features))
                warnings.warn(message + ". Running the PyTorch reference.", stacklevel=4)
        return module
    raise UnsupportedError(f"{op}: no backend runs {device} {dtype} {list(features)}: {reasons}")


def prefers_torch(function: str, elements: int) -> bool:
    """Whether ``function`` of so many elements, with a gradient, is left to PyTorch."""
    return elements <= TORCH_UP_TO.get(function, -1) and _override.get() is None


def report_unfused(op: str, what: str) -> None:
    """Says once that a call of ``op`` runs PyTorch because no kernel covers ``what``; an error under :func:`strict`."""
    message = f"fastformer.{op}: no fused kernel for {what}"
    if _strict.get():
        raise UnsupportedError(message)
    if (op, what) not in _warned:
        _warned.add((op, what))
        warnings.warn(message + ". Running PyTorch's own.", stacklevel=3)


def explain(op: str, device: str, dtype: torch.dtype, features: tuple[str, ...] = ()) -> Explanation:
    """What :func:`select` would answer, with each backend's reason. Runs nothing and warns about nothing."""
    reasons, chosen = {}, None
    override = _override.get()
    order = (override,) if override else preference(op, device)
    for name in BACKENDS:
        reason = refusal(name, op, device, dtype, features)
        if reason is None and name not in order:
            reason = f"{override!r} is asked for" if override else f"not used for {device} tensors"
        reasons[name] = reason or "can run this call"
    for name in order:
        if reasons[name] == "can run this call":
            chosen = name
            reasons[name] = "chosen"
            break
    return Explanation(op, chosen or "none", reasons)
