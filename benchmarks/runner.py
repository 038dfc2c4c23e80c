"""One case of one operation: set up once, every provider on the same inputs, taking turns, medians.

Numbers of two libraries are comparable only if they come from one process, one set of inputs and the same minutes. So
all providers of a case are prepared and warmed up first (that includes compiling), and then take turns: each round
times every provider once, in an order that rotates. pytest-benchmark's ``pedantic`` does the timing: its ``setup``
hook, called untimed before each of its rounds, hands it the next provider in turn, and the recorded times are dealt
back out to the providers. A short call is repeated within a round; each timed round follows one untimed call of the
same provider, unless calls take seconds. Every provider returns fresh outputs, which are freed inside the timed round,
alike for all. A provider that takes minutes to compile or to run is left out, with that reason, and not the whole case.

An operation's file has ``CASES`` ({"cpu": ..., "cuda": ..., "quick": ...}), ``setup(case, device)``, ``PROVIDERS``
(name -> builder) and ``cost(case)``; and perhaps ``smaller(case, device)``: a case whose eager time tells beforehand
whether the peers' calls would take too long, or None.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import JOBS, KERNELS
from benchmarks.machine import CLOCKS

OPS = (*KERNELS, *JOBS)
ROUND_SECONDS = 2e-3  # shorter calls are repeated until a round takes this long
MIN_ROUNDS, MAX_ROUNDS = 3, 30
MAX_REPEATS = 2000
SLOW_SECONDS = 5.0  # calls as long as this have MIN_ROUNDS rounds, need no warming up, and are saved after each round
LONGEST_SECONDS = 120.0  # of a peer's call, as estimated from a smaller case
CAP_SECONDS = 300.0  # of one provider: to be built and called once, compiling included; and for its timed calls
# Relative L2 distance from eager's float32 result beyond which a provider computes something else. Generous: eager
# itself sums gradients of bfloat16 parameters in bfloat16. (The numerics are the test suite's business.)
AGREE = {"float64": 1e-6, "float32": 2e-3, "float16": 5e-2, "bfloat16": 2e-1}

Call = Callable[[], Any]


class Unavailable(Exception):
    """This provider cannot run this case; the message says why."""


class _TooLong(BaseException):  # not an Exception, which torch.compile would catch and go on
    """Raised where a :func:`_at_most` ends."""


@dataclass(frozen=True)
class Case:
    """What is measured: a shape, a dtype, one pass, and what else tells two cases apart.

    Attributes:
        backward: forward and backward together; else forward alone, without gradients.
        variant: for people, and part of the key, such as "causal" or "dropout 0.1".
        options: what ``setup`` and the providers need to know.
        compiled: measure torch.compile as well. On a CPU that costs some ten seconds of C++ compiler per case.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    backward: bool = False
    variant: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    compiled: bool = False

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def passes(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def id(self) -> str:
        parts = ("x".join(map(str, self.shape)), self.dtype, self.passes, self.variant.replace(" ", "_"))
        return "-".join(part for part in parts if part)


@dataclass
class Problem:
    """Inputs of a case, shared by all providers.

    Attributes:
        args: what the providers' functions are called with.
        wrt: tensors to differentiate by, where ``case.backward``.
        douts: gradients of the outputs, where ``case.backward``.
        random: outputs differ from provider to provider (dropout), so they are not compared.
    """

    device: str
    args: tuple[Any, ...]
    wrt: tuple[Tensor, ...] = ()
    douts: tuple[Tensor, ...] = ()
    random: bool = False


@dataclass(frozen=True)
class Cost:
    """The least a case has to do: bytes read plus written, floating-point operations of its matmuls, tokens handled."""

    bytes: int = 0
    flops: int = 0
    items: int = 0

    def limit_seconds(self, ceilings: Mapping[str, float], dtype: str) -> tuple[float, str]:
        """The larger of moving the bytes and doing the operations at the measured rates, and which of them it was."""
        moving = self.bytes / ceilings.get("copy", math.inf)
        computing = self.flops / ceilings.get(f"matmul_{dtype}", math.inf) if self.flops else 0.0
        return (computing, "matmul") if computing > moving else (moving, "bandwidth")


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds; ``spread`` is the interquartile range as a share of the median."""

    median: float
    minimum: float
    spread: float
    rounds: int
    repeats: int

    @classmethod
    def of(cls, samples: list[float], repeats: int) -> Timing:
        quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
        median = statistics.median(samples)
        return cls(median, min(samples), (quartiles[2] - quartiles[0]) / median, len(samples), repeats)


Builder = Callable[[Case, Problem], Call]


# ---- providers -------------------------------------------------------------------------------------------------------


def timed(make: Callable[[Case], Callable[..., Any]]) -> Builder:
    """A provider from ``make(case)``, a function of ``problem.args``: called as it is, or with its backward."""
    return lambda case, problem: _passes(make(case), case, problem)


def compiled(make: Callable[[Case], Callable[..., Any]]) -> Builder:
    """The same function through ``torch.compile``."""

    def build(case: Case, problem: Problem) -> Call:
        if not case.compiled:
            raise Unavailable("measured for the main cases only")
        return _passes(torch.compile(make(case), fullgraph=True), case, problem)

    return build


def on_backend(backend: str, op: str, make: Callable[[Case], Callable[..., Any]], *features: str) -> Builder:
    """Ours on one backend by name: on a GPU, and in a rehearsal through Triton's interpreter or the CUDA emulator."""

    def build(case: Case, problem: Problem) -> Call:
        import fastformer
        from fastformer.backends import registry

        if problem.device == "cpu" and not rehearsing():
            raise Unavailable("measured on GPUs")
        reason = registry.refusal(backend, op, problem.device, case.torch_dtype, features)
        if reason:
            raise Unavailable(reason)
        call = _passes(make(case), case, problem)

        def run() -> Any:
            # Autograd's own thread for a device would not see the choice of backend.
            with fastformer.backend(backend), torch.autograd.set_multithreading_enabled(False):
                return call()

        return run

    return build


def clone_of_bytes(cost: Callable[[Case], Cost]) -> Builder:
    """``clone()`` of as many bytes as the case has to move: n bytes cloned are n read and n written to fresh memory."""

    def build(case: Case, problem: Problem) -> Call:
        x = problem.args[0].detach()
        whole, rest = divmod(cost(case).bytes // (2 * x.element_size()), x.numel())
        part = x.reshape(-1)[:rest]

        def run() -> None:
            for _ in range(whole):
                x.clone()
            if rest:
                part.clone()

        return run

    build.incomparable = True  # type: ignore[attr-defined]
    return build


def incomparable(builder: Builder) -> Builder:
    """Marks a provider that computes something else than the operation, so its result is not compared."""

    def build(case: Case, problem: Problem) -> Call:
        return builder(case, problem)

    build.incomparable = True  # type: ignore[attr-defined]
    return build


def rehearsing() -> bool:
    """Whether the GPU's providers are to run on the CPU, on the interpreter and the emulator."""
    return os.environ.get("FASTFORMER_BENCH_REHEARSE") == "1"


def tensors(*values: Any) -> tuple[Tensor, ...]:
    """The tensors among nested tuples, in order."""
    found: list[Tensor] = []
    for value in values:
        found += [value] if isinstance(value, Tensor) else tensors(*value) if isinstance(value, (tuple, list)) else []
    return tuple(found)


def _passes(function: Callable[..., Any], case: Case, problem: Problem) -> Call:
    args, wrt, douts = problem.args, problem.wrt, problem.douts
    if not case.backward:
        return lambda: function(*args)
    return lambda: torch.autograd.grad(tensors(function(*args)), wrt, douts)


# ---- one case --------------------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """A case ready to be timed: calls by provider, and why the others are not there."""

    calls: dict[str, Call]
    missing: dict[str, str]
    wrong: dict[str, str]


def prepare(module: ModuleType, case: Case, device: str, seed: int = 0, limit: float = math.inf) -> Prepared:
    """Builds and warms up every provider, and compares its result with the eager one.

    Args:
        limit: seconds for all of it; the providers that have none left, or do not end within them, are left out.

    Raises:
        Exception: whatever our own provider raises; a peer that fails is left out, with its message.
    """
    torch.manual_seed(seed)
    started = time.perf_counter()
    problem = module.setup(case, device)
    ready = Prepared({}, {}, {})
    hopeless = _hopeless(module, case, device)
    results: dict[str, tuple[Tensor, ...]] = {}
    for name, build in module.PROVIDERS.items():
        allowed = min(CAP_SECONDS, limit - (time.perf_counter() - started))
        if allowed <= 0 or (hopeless and name != "ours"):
            ready.missing[name] = hopeless or "no time left in this run"
            continue
        try:
            with _at_most(allowed):
                call = build(case, problem)
                result = call()
        except Unavailable as reason:
            ready.missing[name] = str(reason)
            continue
        except _TooLong:
            ready.missing[name] = f"its first call, compiling included, did not end within {allowed:.0f} s"
            continue
        except Exception as error:
            if name == "ours":
                raise
            ready.missing[name] = f"failed: {type(error).__name__}: {_first_line(error)}"
            continue
        ready.calls[name] = call
        if not problem.random and not getattr(build, "incomparable", False):
            results[name] = tensors(result)
    if "eager" in results:
        expected = _expected(module.PROVIDERS["eager"], case, problem, results["eager"])
        for name, result in results.items():
            difference = _difference(result, expected, AGREE[case.dtype])
            if difference:
                ready.wrong[name] = difference
    return ready


def _hopeless(module: ModuleType, case: Case, device: str) -> str:
    """Why the peers' calls are not tried: eager's time in the smaller case that the file names, scaled by the flops."""
    smaller = module.smaller(case, device) if hasattr(module, "smaller") else None
    if smaller is None:
        return ""
    seconds = _estimate(module.PROVIDERS["eager"](smaller, module.setup(smaller, device)), device)
    seconds *= module.cost(case).flops / module.cost(smaller).flops
    if seconds <= LONGEST_SECONDS:
        return ""
    shape = "×".join(map(str, smaller.shape))
    return f"a call would take about {seconds / 60:.0f} minutes here, going by eager's at {shape}"


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises _TooLong inside the block after so long, between two steps of Python: it does not interrupt C++."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return

    def end(signum: int, frame: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)  # and again, should a destructor have swallowed the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _expected(eager: Builder, case: Case, problem: Problem, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The eager result in float32, where the case has a lower precision and its inputs can be converted."""
    if case.torch_dtype.itemsize >= 4:
        return result
    single = {id(t): t.detach().float().requires_grad_(t.requires_grad) for t in problem.args if _is_low(t)}
    convert = lambda values: tuple(single.get(id(t), t.float() if _is_low(t) else t) for t in values)  # noqa: E731
    upcast = replace(problem, args=convert(problem.args), wrt=convert(problem.wrt), douts=convert(problem.douts))
    try:
        return tensors(eager(replace(case, dtype="float32"), upcast)())
    except Exception:  # out of memory, or a module among the inputs: then the dtype's own result has to do
        return result


def _is_low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def measure(
    calls: Mapping[str, Call],
    device: str,
    benchmark: Any,
    seconds: float,
    quick: bool,
    missing: dict[str, str] | None = None,
    progress: Callable[[dict[str, Timing]], Any] | None = None,
) -> dict[str, Timing]:
    """Times the calls in turns with pytest-benchmark's ``benchmark`` fixture, for about ``seconds``.

    Afterwards the fixture's own statistics are those of the first call, the others' are in its ``extra_info``.

    Args:
        missing: gets the reason for every call that takes too long to be timed.
        progress: called with what there is so far after every round, where calls take seconds.
    """
    missing = {} if missing is None else missing
    estimates = _estimates(calls, device, quick, missing)
    names = list(estimates)
    if not names:
        return {}
    slow = not quick and max(estimates.values()) >= SLOW_SECONDS
    repeats = [1 if quick else min(MAX_REPEATS, math.ceil(ROUND_SECONDS / t)) for t in estimates.values()]
    one_round = sum(t * (n + 1) for t, n in zip(estimates.values(), repeats))
    rounds = 2 if quick else MIN_ROUNDS if slow else max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / one_round)))
    order = [(i + turn) % len(names) for turn in range(rounds) for i in range(len(names))]

    def so_far() -> dict[str, Timing]:
        samples: list[list[float]] = [[] for _ in names]
        for i, duration in zip(order, benchmark.stats.stats.data):
            samples[i].append(duration / repeats[i])
        return {name: Timing.of(samples[i], repeats[i]) for i, name in enumerate(names)}

    upcoming = iter(enumerate(order))

    def next_in_turn() -> tuple[tuple[Call, int], dict[str, Any]]:
        turn, i = next(upcoming)
        if slow and progress is not None and turn and turn % len(names) == 0:
            progress(so_far())
        if not quick and not slow:
            calls[names[i]]()
        return (calls[names[i]], repeats[i]), {}

    def repeat(call: Call, times: int) -> None:
        for _ in range(times):
            call()

    benchmark.pedantic(repeat, setup=next_in_turn, rounds=len(order), iterations=1)
    timings, recorded = so_far(), benchmark.stats.stats.data
    recorded[:] = [duration / repeats[0] for i, duration in zip(order, recorded) if i == 0]
    benchmark.extra_info.update({"provider": names[0], "medians": {name: t.median for name, t in timings.items()}})
    return timings


def _estimates(calls: Mapping[str, Call], device: str, quick: bool, missing: dict[str, str]) -> dict[str, float]:
    """About how long each call takes, and into ``missing`` those that are too long to be timed."""
    estimates = {}
    for name, call in calls.items():
        try:
            with _at_most(CAP_SECONDS):
                seconds = 1.0 if quick else _estimate(call, device)
        except _TooLong:
            seconds = math.inf
        if seconds * MIN_ROUNDS <= CAP_SECONDS:
            estimates[name] = seconds
        else:
            missing[name] = f"{MIN_ROUNDS} calls take more than {CAP_SECONDS:.0f} s"
    return estimates


def release(case: Case, device: str) -> None:
    """Gives the memory of a finished case back, and what torch.compile remembers of it."""
    if case.compiled:
        torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def rows(
    op: str, case: Case, timings: Mapping[str, Timing], cost: Cost, ceilings: Mapping[str, float], run: str
) -> list[dict[str, Any]]:
    """One result per provider, as it goes into the JSON.

    The limit is a ``clone()`` of the same bytes where the case has one, timed in the same rounds and, like the rest,
    into memory from the allocator; else it comes from the ceilings.
    """
    limit, bound = cost.limit_seconds(ceilings, case.dtype)
    if "clone" in timings:
        limit, bound = timings["clone"].median, "bandwidth"
    return [
        {
            "op": op,
            "shape": "x".join(map(str, case.shape)),
            "dtype": case.dtype,
            "pass": case.passes,
            "variant": case.variant,
            "provider": name,
            "median_s": timing.median,
            "min_s": timing.minimum,
            "spread": timing.spread,
            "rounds": timing.rounds,
            "repeats": timing.repeats,
            "bytes": cost.bytes,
            "flops": cost.flops,
            "items": cost.items,
            "share_of_limit": limit / timing.median if limit else None,
            "limited_by": bound if limit else None,
            "run": run,
        }
        for name, timing in timings.items()
    ]


def _estimate(call: Call, device: str) -> float:
    clock = CLOCKS[device]
    best, deadline = math.inf, time.perf_counter() + 0.05
    for _ in range(3):
        start = clock()
        call()
        best = min(best, clock() - start)
        if time.perf_counter() > deadline:
            break
    return max(best, 1e-7)


def _difference(result: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> str:
    """What is wrong with a result, or an empty string."""
    if len(result) != len(expected):
        return f"{len(result)} results instead of {len(expected)}"
    for i, (got, wanted) in enumerate(zip(result, expected)):
        if got.shape != wanted.shape:
            return f"result {i} has shape {tuple(got.shape)} instead of {tuple(wanted.shape)}"
        distance = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
        if not distance <= tolerance:
            return f"result {i} is {float(distance):.1e} from eager's (accepted: {tolerance:.0e})"
    return ""


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:200]
