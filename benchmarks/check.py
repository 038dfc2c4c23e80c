"""Correctness of the GPU backends on the device they run on: the first thing ``gpu.py`` asks of a card.

    python benchmarks/check.py layer_norm attention --backend triton

Every operation is called through ``fastformer.functional``, forward and backward, held to one backend, and compared
with the reference backend in float64 on the CPU. The rule is the test suite's: |ours − fp64| ≤ 2 |torch in the same
dtype − fp64| + tiny, in the maximum norm. Freed memory is filled with NaN before each call, so that an output that
was not written shows. Inputs, expectation and comparison live on the CPU: under a memory checker, only our kernels
and copies run on the device."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(p for p in sys.path if p and Path(p).resolve() not in (ROOT, ROOT / "benchmarks"))]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import fastformer  # noqa: E402
from benchmarks.runner import Case, Problem, tensors  # noqa: E402
from fastformer.backends import registry  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "bias gelu", "swiglu")
PADDING, GROUPED = {"padding": 0.5}, {"causal": True, "kv_heads": 1}


def _cases(shapes: list[tuple[int, ...]], *variants: tuple[str, dict[str, Any]]) -> list[Case]:
    return [
        Case(shape, dtype, True, variant, options)
        for shape in shapes
        for variant, options in variants or (("", {}),)
        for dtype in DTYPES
    ]


# Lengths around powers of two, rows that take every kernel variant, row counts that fill no block, the shortest rows.
# (A norm of one element is left out: its gradient is zero, a difference of numbers 300 times as large as the output.)
LONGER = [(5, 63), (64, 1024), (7, 4097), (2, 40000), (1000, 96)]
NORM_ROWS, ROWS = [(3, 3), *LONGER], [(3, 1), *LONGER]
DROPOUT = ("dropout 0.1", {"dropout_p": 0.1})
CASES: dict[str, list[Case]] = {
    "layer_norm": _cases([*NORM_ROWS, (2, 131072)]),
    "add_layer_norm": _cases(NORM_ROWS, ("", {}), DROPOUT),
    "rms_norm": _cases([*NORM_ROWS, (2, 131072)]),
    "add_rms_norm": _cases(NORM_ROWS, ("", {}), DROPOUT),
    "softmax": _cases([*ROWS, (2, 131072)])
    + _cases(
        [(2, 3, 65, 130)],
        *((feature, {"feature": feature}) for feature in ("mask", "causal", "bias")),
    ),
    "activation": _cases(ROWS, *((kind, {}) for kind in ACTIVATIONS)),
    "cross_entropy": _cases([(5, 2), (64, 1000), (9, 50257)])
    + _cases([(7, 1000), (3, 50257)], ("probabilities", {"feature": "probabilities"})),
    "linear_cross_entropy": _cases([(5, 8, 2), (70, 64, 1000), (257, 96, 5001)]),
    # Rows of one element and of many; a vocabulary larger and smaller than the text, few rows with many takers.
    "embedding": _cases(
        [(2, 9, 63), (3, 40, 1024), (2, 300, 96)],
        ("tokens", {"vocabulary": 500}),
        ("everything", {"vocabulary": 50, "positions": 300, "types": 2, "norm": True}),
        ("dropout 0.1", {"vocabulary": 50, "positions": 300, "dropout_p": 0.1}),
    ),
    "rotary": _cases(
        [(2, 4, 70, 64), (1, 2, 300, 128), (2, 2, 9, 20)],
        ("halves", {"kv_heads": 2}),
        ("interleaved", {"kv_heads": 1, "interleaved": True}),
    ),
    "attention": [
        # One query, lengths of no full tile, head dims that are no power of two, several tiles of queries and keys.
        *_cases(
            [(1, 1, 1, 16), (2, 4, 130, 64), (1, 2, 300, 128), (1, 2, 67, 40)], ("", {}), ("causal", {"causal": True})
        ),
        *_cases([(2, 4, 200, 64)], ("padding", PADDING), ("grouped", GROUPED), ("decode", {"queries": 1})),
        *_cases([(1, 2, 2048, 64)], ("causal", {"causal": True})),
        *_cases(
            [(2, 4, 150, 64), (1, 2, 200, 128)],
            ("learned bias", {"bias": "learned"}),
            ("T5 bias", {"bias": "T5"}),
            ("window 50 causal", {"causal": True, "window": 50}),
            ("dropout 0.1 causal", {"causal": True, "dropout": 0.1}),
        ),
    ],
    "decode_attention": [  # no full block of keys, several parts of a sequence, grouped heads, pages
        Case(shape, dtype, False, variant, options)
        for shape in ((2, 4, 130, 64), (1, 8, 1500, 128))
        for variant, options in (
            ("grouped", {"kv_heads": 2}),
            ("3 queries", {"queries": 3}),
            ("pages", {"kv_heads": 2, "page_size": 16}),
        )
        for dtype in DTYPES
    ],
    "feed_forward": _cases(  # tiles and their tails, and widths of several slices
        [(70, 64, 256), (257, 96, 200), (300, 520, 648)], ("", {}), ("residual", {}), ("swiglu", {})
    ),
}
TINY: dict[str, list[Case]] = {
    "layer_norm": _cases([(3, 70)])[:2],
    "add_layer_norm": _cases([(3, 70)], DROPOUT)[:2],
    "rms_norm": _cases([(3, 70)])[:2],
    "add_rms_norm": _cases([(3, 70)], DROPOUT)[:2],
    "softmax": _cases([(3, 70)])[:2],
    "activation": _cases([(3, 70)], ("swiglu", {}))[:2],
    "cross_entropy": _cases([(3, 70)])[:2],
    "linear_cross_entropy": _cases([(70, 16, 40)])[:2],
    "embedding": _cases([(2, 5, 70)], ("norm", {"vocabulary": 9, "positions": 6, "types": 2, "norm": True}))[:2],
    "rotary": _cases([(2, 2, 5, 20)], ("interleaved", {"kv_heads": 1, "interleaved": True}))[:2],
    "attention": _cases([(1, 2, 20, 16)], ("causal", {"causal": True}))[:2]
    + _cases([(1, 2, 20, 16)], ("p", PADDING))[:1],
    "decode_attention": [Case((1, 2, 20, 16), "float32", False, "pages", {"kv_heads": 1, "page_size": 8})],
    "feed_forward": _cases([(5, 16, 32)])[:2],
}
# What the registry calls the fused part, and the optional features the cases use.
KERNELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "add_layer_norm": ("add_layer_norm", ("dropout",)),
    "add_rms_norm": ("add_rms_norm", ("dropout",)),
    "embedding": ("embedding", ("norm", "dropout")),
    "attention": (
        "attention",
        ("causal", "key_padding_mask", "grouped_heads", "bias", "relative_bias", "window", "dropout"),
    ),
    "feed_forward": ("activation", ("bias", "gate")),
}
OPS = tuple(CASES)
HUGE = ("layer_norm", "softmax", "activation")  # also checked beyond 2^31 elements


@dataclass(frozen=True)
class Check:
    """One compared tensor: the largest error, what the rule allows, and whether two runs gave the same bits."""

    op: str
    backend: str
    case: str
    result: str
    error: float
    allowed: float
    repeatable: bool = True

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # NaN is not


def run(function: Callable, problem: Problem, backend: str | None, seed: int = 0) -> tuple[Tensor, ...]:
    """Results and gradients of ``function``, held to ``backend``, on the CPU."""
    torch.manual_seed(seed)
    # In autograd's own thread for a device the choice of backend would not be seen.
    with fastformer.backend(backend), torch.autograd.set_multithreading_enabled(False):
        outs = tensors(function(*problem.args))
        grads = torch.autograd.grad(outs, problem.wrt, problem.douts) if problem.wrt else ()
    return tuple(t.detach().cpu() for t in (*outs, *grads))


def moved(problem: Problem, device: str, dtype: torch.dtype | None = None) -> Problem:
    """A copy of a problem on another device, its floating-point tensors in another dtype."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        to = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return value.detach().to(device=device, dtype=to, copy=True).requires_grad_(value.requires_grad)

    copies = {id(value): convert(value) for value in problem.args}
    return replace(
        problem,
        device=device,
        args=tuple(copies[id(value)] for value in problem.args),
        wrt=tuple(copies[id(value)] for value in problem.wrt),
        douts=tuple(convert(value) for value in problem.douts),
    )


def poison(like: tuple[Tensor, ...], device: str) -> None:
    """Fills memory that the next allocations of these sizes will be given with NaN."""
    blocks = [torch.full(t.shape, float("nan"), dtype=t.dtype, device=device) for t in like if t.is_floating_point()]
    blocks += [torch.full_like(block, float("nan")) for block in blocks]
    del blocks


def check_case(module: ModuleType, op: str, case: Case, backend: str, device: str) -> list[Check]:
    """Compares every result and gradient of one case."""
    torch.manual_seed(1)
    problem = module.setup(case, "cpu")
    expected = run(module.ours(case), moved(problem, "cpu", torch.float64), "reference")
    if problem.random:  # the mask is defined to be the reference's; torch's own is another
        usual = run(module.ours(case), problem, "reference")
    else:
        usual = run(module.eager(case), problem, None)
    poison(expected, device)
    results = run(module.ours(case), moved(problem, device), backend)
    again = run(module.ours(case), moved(problem, device), backend)
    names = [f"out{i}" for i in range(len(results) - len(problem.wrt))] + [f"grad{i}" for i in range(len(problem.wrt))]
    checks = []
    scale = max(
        (t.abs().max().item() for t in problem.douts), default=0.0
    )  # of what a gradient that is zero is a difference of
    for name, got, second, wanted, torchs in zip(names, results, again, expected, usual):
        size = wanted.abs().max().item() if wanted.numel() else 0.0
        tiny = 16 * torch.finfo(torch.float32).eps * max(size, scale) + torch.finfo(got.dtype).eps / 2 * size
        allowed = 2 * _distance(torchs, wanted) + tiny
        bits = [t.contiguous().view(torch.uint8) for t in (got, second)] if got.dim() else (got, second)
        same = torch.equal(*bits)
        checks.append(Check(op, backend, case.id, name, _distance(got, wanted), allowed, same))
    return checks


def check_huge(module: ModuleType, op: str, backend: str, device: str, rows: int = (1 << 19) + 8) -> list[Check]:
    """More than 2^31 elements (rows of 4096): the last rows must be what those rows give alone."""
    case = Case((rows, 4096), "bfloat16", False, "gelu" if op == "activation" else "")
    problem = module.setup(case, device)
    last = replace(problem, args=tuple(t[-8:] if t.dim() and len(t) == case.shape[0] else t for t in problem.args))
    with fastformer.backend(backend), torch.no_grad():
        got = module.ours(case)(*problem.args)[-8:].cpu().double()
    with fastformer.backend("reference"), torch.no_grad():
        wanted = module.ours(case)(*(t.cpu().double() for t in last.args))
    return [Check(op, backend, f"{rows}x4096", "out0", _distance(got, wanted), 2**-7 * wanted.abs().max().item())]


def main(argv: list[str] | None = None) -> int:
    """Checks the operations named; returns 1 where one is wrong, 0 also where a backend lacks one (it says so)."""
    parser = argparse.ArgumentParser(prog="benchmarks/check.py", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"default all: {', '.join(OPS)}")
    parser.add_argument("--backend", choices=("triton", "cuda", "cpu"), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a few small cases, for a memory checker or an interpreter")
    parser.add_argument("--json", type=Path, help="write the checks there as well")
    args = parser.parse_args(argv)
    if set(args.ops) - set(OPS):
        parser.error(f"{', '.join(sorted(set(args.ops) - set(OPS)))}: no such operation; there are {', '.join(OPS)}")
    checks, failures, missing = [], [], {}
    for op in args.ops or OPS:
        module = importlib.import_module(f"benchmarks.{op}")
        kernel, features = KERNELS.get(op, (op, ()))
        for case in (TINY if args.tiny else CASES)[op]:
            used = (*features, case.options["feature"]) if "feature" in case.options else features
            reason = registry.refusal(args.backend, kernel, args.device, case.torch_dtype, used)
            if reason:
                missing.setdefault(f"{op}: {reason}", None)
                continue
            try:
                found = check_case(module, op, case, args.backend, args.device)
            except Exception as error:
                failures.append(f"{op} {args.backend} {case.id}: {type(error).__name__}: {str(error)[:300]}")
                print(f"FAILED {failures[-1]}", flush=True)
                continue
            checks += found
            report(found)
        if not args.tiny and args.device == "cuda" and op in HUGE:
            if registry.refusal(args.backend, kernel, args.device, torch.bfloat16, features) is None:
                checks += (found := check_huge(module, op, args.backend, args.device))
                report(found)
    for line in missing:
        print(f"{args.backend} has no {line}")
    wrong = [c for c in checks if not c.ok]
    unrepeatable = sorted({c.op for c in checks if not c.repeatable})
    print(
        f"{args.backend}: {len(checks)} results compared, {len(wrong)} wrong, {len(failures)} calls failed"
        + (f"; not bitwise repeatable: {', '.join(unrepeatable)}" if unrepeatable else "")
    )
    if args.json:
        rows = [{**vars(c), "ok": c.ok} for c in checks]
        args.json.write_text(json.dumps({"checks": rows, "failures": failures, "missing": list(missing)}, indent=1))
    return 1 if wrong or failures else 0


def report(checks: list[Check]) -> None:
    """One line per case; what is wrong in it spelled out."""
    worst = max(checks, key=lambda c: c.error / c.allowed if c.error == c.error else float("inf"))
    print(f"{'ok   ' if all(c.ok for c in checks) else 'WRONG'} {worst.op} {worst.backend} {worst.case}", end="")
    print(f"  worst {worst.result}: {worst.error:.1e} of {worst.allowed:.1e} allowed", flush=True)


def _distance(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape:
        return float("inf")
    return (got.double() - wanted).abs().max().item() if wanted.numel() else 0.0


if __name__ == "__main__":
    sys.exit(main())
