"""linear beside torch's, and beside the float32 matmuls of the same shape: one forward, three with backward.

The shape is (rows, in features, out features); up to 8 rows are what a model computes while it generates. "(in, out)":
the weight lies the other way, as GPT-2's. On a CPU without bfloat16 or float16 instructions torch multiplies these one
element at a time, which takes it seconds for a few hundred rows of a gradient; there fewer are measured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as TF

import fastformer.functional as F
from benchmarks.runner import Case, Cost, Problem, compiled, incomparable, timed
from fastformer.backends import matmul

OP = "linear"
HALF = ("bfloat16", "float16")
TRAINED_ROWS = 64 if matmul.CONVERTED else 512

CASES = {
    "cpu": [
        Case((512, 768, 3072), "float32"),
        Case((512, 768, 3072), "float32", True),
        *(Case((512, 768, 3072), dtype, compiled=dtype == "bfloat16") for dtype in HALF),
        *(Case((TRAINED_ROWS, 768, 3072), dtype, True) for dtype in HALF),
        *(Case((rows, 768, 3072), dtype) for dtype in ("float32", *HALF) for rows in (1, 8)),
        Case((1, 768, 3072), "bfloat16", variant="(in, out)"),
        Case((8, 768, 3072), "float32", variant="(in, out)"),
        Case((8, 576, 49152), "float32"),  # SmolLM2's vocabulary
        Case((1, 768, 50257), "bfloat16", compiled=True),  # the vocabulary's
    ],
    "cuda": [Case((8192, 4096, 4096), "bfloat16", backward) for backward in (False, True)],
    "quick": [
        Case((3, 16, 20), "bfloat16"),
        Case((3, 16, 20), "float16", variant="(in, out)"),
        Case((20, 16, 20), "bfloat16", True),
    ],
}


def setup(case: Case, device: str) -> Problem:
    rows, width, out = case.shape
    make = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    weight = make(width, out).t() if case.variant == "(in, out)" else make(out, width)
    args = (make(rows, width), weight / width**0.5, make(out))
    args = tuple(t.to(case.torch_dtype).detach().requires_grad_(case.backward) for t in args)
    return Problem(device, args, wrt=args, douts=(make(rows, out).to(case.torch_dtype),))


def cost(case: Case) -> Cost:
    rows, width, out = case.shape
    passes, size = 3 if case.backward else 1, case.torch_dtype.itemsize
    return Cost(bytes=passes * size * (rows * width + width * out + rows * out), flops=passes * 2 * rows * width * out)


def ours(case: Case):
    return F.linear


def eager(case: Case):
    return TF.linear


@incomparable
def matmuls(case: Case, problem: Problem):
    x, w, _ = (t.detach().float() for t in problem.args)
    dout = problem.douts[0].float()

    def run():
        x @ w.t()
        if case.backward:
            dout @ w
            dout.t() @ x

    return run


PROVIDERS = {"ours": timed(ours), "eager": timed(eager), "compile": compiled(eager), "float32 matmuls": matmuls}
