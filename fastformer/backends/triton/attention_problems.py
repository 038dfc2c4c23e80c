"""Calls of attention on which tune.py tries a tile: a small one, whose results it compares, and large ones to time."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..attention_options import Options
from ..reference import attention as reference
from . import attention
from .attention_builds import COMBINATIONS
from .attention_tiles import TILES, Key, Tile, tiles_on

SHAPES = ((16, 1024), (1, 4096))
"""(sequences, positions) that are timed, as much work each, with :func:`heads_of` heads."""
CALLS = 10
"""Of these the median counts."""

_TIMED = {"plain": ("causal",), "window": ("causal", "softcap", "window"), "bias": ("bias", "dropout")}
_RELATIVE = ("key_padding_mask", "relative_bias", "dropout")
_DTYPES = {2: (torch.bfloat16, torch.float16), 4: (torch.float32,)}
# A tile changes the order of a sum, which is some roundings, and nothing else; a block left out is far more than that.
ROUNDINGS = {2: 4, 4: 64}


class Call(NamedTuple):
    """The arguments of one call of attention and of its backward."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    options: Options
    needs: tuple[bool, bool]


def features_of(key: Key, kernel: str) -> tuple[str, ...]:
    """The features of the calls that stand for a line of a table."""
    features = COMBINATIONS["all"][0] if key[2] == "all" else _TIMED[key[2]]
    return _RELATIVE if kernel == "backward_distance_bias" and key[2] == "bias" else features


def heads_of(dim: int) -> int:
    """How many heads of size ``dim`` a timed call has."""
    return min(16, 2048 // dim)


def make(
    key: Key, kernel: str, dtype: torch.dtype, batch: int, heads: int, length: int, device: torch.device | str
) -> Call:
    """A call with the features of one line of a table, with random data that are the same every time."""
    features, dim = features_of(key, kernel), key[1]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    q, k, v, dout = (normal(batch, heads, length, dim) for _ in range(4))
    fields: dict[str, object] = {"causal": "causal" in features}
    if "key_padding_mask" in features:
        fields["key_padding_mask"] = (torch.arange(length, device=device) >= length - length // 8).expand(batch, -1)
    if "mask" in features:
        visible = torch.rand((1, 1, length, length), generator=generator, device=device) < 0.9
        fields["mask"] = visible
    if "bias" in features:
        fields["bias"] = normal(1, heads, length, length)
    if "relative_bias" in features:
        fields["distance_bias"] = normal(heads, 257, dtype=torch.float32)
    if "alibi" in features:
        fields["alibi_slopes"] = normal(1, heads, dtype=torch.float32).abs() / 8
    if "window" in features:
        fields["window_left"] = length // 2
    if "softcap" in features:
        fields["softcap"] = 20.0
    if "dropout" in features:
        fields |= {"dropout_p": 0.1, "seed": 1}
    needs = kernel == "backward_bias", kernel == "backward_distance_bias"
    return Call(q, k, v, dout, Options(dim**-0.5, **fields), needs)  # type: ignore[arg-type]


@contextmanager
def trying(sm_family: int, key: Key, kernel: str, tile: Tile) -> Iterator[None]:
    """Inside, calls use ``tile`` for one entry of a table."""
    table = TILES[sm_family]
    present = table[key]
    table[key] = present._replace(**{kernel: tile})
    tiles_on.cache_clear()
    try:
        yield
    finally:
        table[key] = present
        tiles_on.cache_clear()


def _results(kernels: object, call: Call, kernel: str, out: Tensor, lse: Tensor) -> list[Tensor]:
    """What one kernel computes of ``call``."""
    if kernel == "forward":
        return list(kernels.forward(call.q, call.k, call.v, call.options))  # type: ignore[attr-defined]
    gradients = kernels.backward(  # type: ignore[attr-defined]
        call.dout, None, call.q, call.k, call.v, out, lse, call.options, call.needs
    )
    names = {
        "backward_q": ("dq",),
        "backward_k": ("dk", "dv"),
        "backward_bias": ("dbias",),
        "backward_distance_bias": ("ddistance_bias",),
    }
    return [getattr(gradients, name) for name in names[kernel]]


def _double(call: Call) -> Call:
    tensors = [t.double() if t is not None and t.is_floating_point() else t for t in call.options.tensors()]
    q, k, v, dout = (t.double() for t in call[:4])
    return Call(q, k, v, dout, call.options.with_tensors(tensors), call.needs)


def wrong(sm_family: int, key: Key, kernel: str, tile: Tile, device: torch.device | str) -> str:
    """What is wrong with the kernel's results with ``tile``, or "": they are compared with the reference in float64,
    on sequences of no whole number of blocks, and with those of a second run, bit for bit."""
    for dtype in _DTYPES[key[0]]:
        call = make(key, kernel, dtype, 1, 2, 2 * max(tile.block_q, tile.block_k) + 17, device)
        exact_call = _double(call)
        out, lse = reference.forward(*exact_call[:3], exact_call.options)
        exact = _results(reference, exact_call, kernel, out, lse)
        try:
            with trying(sm_family, key, kernel, tile):
                ours = _results(attention, call, kernel, out.to(dtype), lse.float())
                again = _results(attention, call, kernel, out.to(dtype), lse.float())
        except OutOfResources as error:  # a GPU may have less than others of its family
            return str(error)
        allowed = ROUNDINGS[key[0]] * torch.finfo(dtype).eps
        for one, two, expected in zip(ours, again, exact, strict=True):
            if not torch.equal(one, two):
                return f"two runs differ in {dtype}"
            reason = difference(one.double(), expected, allowed)
            if reason:
                return f"{reason} in {dtype}"
    return ""


def difference(ours: Tensor, exact: Tensor, allowed: float) -> str:
    """What tells ``ours`` from ``exact`` beside rounding, or ""; ``allowed``: the relative error in the 2-norm."""
    finite = exact.isfinite()
    if not torch.equal(ours[~finite], exact[~finite]):
        return "infinities differ"
    ours, exact = ours[finite], exact[finite]
    error = (ours - exact).norm() / exact.norm()
    if not error <= allowed:  # also NaN
        return f"relative error {error:.2g}, allowed {allowed:.2g}"
    largest = (ours - exact).abs().max() / exact.abs().max()
    return "" if largest <= 4 * allowed else f"one element off by {largest:.2g} of the largest"


@functools.lru_cache(1)  # the candidates of one entry come one after the other
def _large(key: Key, kernel: str, dtype: torch.dtype, device: torch.device | str) -> list[tuple[Call, Tensor, Tensor]]:
    calls = [make(key, kernel, dtype, batch, heads_of(key[1]), length, device) for batch, length in SHAPES]
    return [(call, *attention.forward(call.q, call.k, call.v, call.options)) for call in calls]


def measure(sm_family: int, key: Key, kernel: str, tile: Tile, device: torch.device | str) -> float:
    """Seconds that a call takes on the GPU with ``tile``, summed over :data:`SHAPES`: of forward, or of the whole
    backward, in which the other kernels keep their tiles."""
    total = 0.0
    dtype = _DTYPES[key[0]][0]
    for call, out, lse in _large(key, kernel, dtype, device):
        with trying(sm_family, key, kernel, tile):
            total += _seconds(functools.partial(_results, attention, call, kernel, out, lse))
    return total


def _seconds(run: Callable[[], object]) -> float:
    for _ in range(3):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(CALLS)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3
