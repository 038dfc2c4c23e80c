"""feed_forward beside torch's linear, GELU, linear, and beside its matmuls alone: two forward, six with backward.

The shape is (rows, width, hidden width).
"""

from __future__ import annotations

import torch
import torch.nn.functional as TF

import fastformer.functional as F
from benchmarks.runner import Case, Cost, Problem, compiled, incomparable, timed

OP = "feed_forward"

CASES = {
    "cpu": [
        Case((2048, 768, 3072), "float32", False),
        Case((2048, 768, 3072), "float32", True, compiled=True),
        Case((512, 768, 3072), "bfloat16", False),
        Case((768, 128, 512), "float32", True),  # the demo's
    ],
    "cuda": [
        Case((16384, width, hidden), "bfloat16", backward, compiled=True)
        for width, hidden in ((768, 3072), (4096, 16384))
        for backward in (False, True)
    ],
    "quick": [Case((6, 16, 32), "float32", True), Case((6, 16, 32), "bfloat16")],
}


def setup(case: Case, device: str) -> Problem:
    rows, width, hidden = case.shape
    make = lambda *shape: torch.randn(*shape, device=device) / shape[-1] ** 0.5  # noqa: E731
    args = (make(rows, width) * width**0.5, make(hidden, width), make(hidden), make(width, hidden), make(width))
    args = tuple(t.to(case.torch_dtype).requires_grad_(case.backward) for t in args)
    return Problem(device, args, wrt=args, douts=(torch.randn_like(args[0]),))


def cost(case: Case) -> Cost:
    rows, width, hidden = case.shape
    matmul = 2 * rows * width * hidden
    return Cost(flops=(6 if case.backward else 2) * matmul)


def ours(case: Case):
    return F.feed_forward


def eager(case: Case):
    return lambda x, w1, b1, w2, b2: TF.linear(TF.gelu(TF.linear(x, w1, b1)), w2, b2)


@incomparable
def matmuls(case: Case, problem: Problem):
    x, w1, _, w2, _ = (t.detach() for t in problem.args)
    hidden = x @ w1.t()
    (dout,) = problem.douts

    def run():
        x @ w1.t()
        hidden @ w2.t()
        if case.backward:
            dout @ w2
            dout.t() @ hidden
            hidden @ w1
            hidden.t() @ x

    return run


PROVIDERS = {"ours": timed(ours), "eager": timed(eager), "compile": compiled(eager), "matmuls": matmuls}
