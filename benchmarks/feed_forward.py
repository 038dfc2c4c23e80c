"""feed_forward beside torch's linear, GELU, linear, and beside its matmuls alone: two forward, six with backward; and
the gated form ("swiglu"), whose first matmul is twice as wide where its two weights lie next to each other. "triton"
and "cuda": ours with their own first matmul, the activation inside it.

The shape is (rows, width, hidden width). "residual" adds the block's input to its output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as TF

import fastformer.functional as F
from benchmarks.runner import Call, Case, Cost, Problem, Unavailable, compiled, incomparable, on_backend, timed
from fastformer.backends import linear_activation

OP = "feed_forward"
GPT2 = (2048, 768, 3072)

CASES = {
    "cpu": [
        *(Case(GPT2, d, b, compiled=d == "float32" and b) for d in ("float32", "bfloat16") for b in (False, True)),
        Case(GPT2, "float32", True, "residual"),
        Case((2048, 768, 2048), "float32", False, "swiglu"),
        Case((2048, 768, 2048), "float32", True, "swiglu"),
        Case((512, 768, 3072), "bfloat16", False),
        Case((768, 128, 512), "float32", True),  # the demo's
    ],
    "cuda": [
        *(
            Case((16384, width, hidden), "bfloat16", backward, compiled=True)
            for width, hidden in ((768, 3072), (4096, 16384))
            for backward in (False, True)
        ),
        *(Case((16384, 4096, 11008), "bfloat16", backward, "swiglu", compiled=True) for backward in (False, True)),
    ],
    "quick": [
        Case((6, 16, 32), "float32", True),
        Case((6, 16, 32), "bfloat16"),
        Case((6, 16, 32), "float32", True, "residual"),
        Case((6, 16, 32), "float32", True, "swiglu"),
    ],
}


def setup(case: Case, device: str) -> Problem:
    rows, width, hidden = case.shape
    make = lambda *shape: torch.randn(*shape, device=device) / shape[-1] ** 0.5  # noqa: E731
    x, w2 = make(rows, width) * width**0.5, make(width, hidden)
    if case.variant == "swiglu":
        both = make(2 * hidden, width).to(case.torch_dtype)
        args = (x, *both.chunk(2), w2)
    else:
        args = (x, make(hidden, width), make(hidden), w2, make(width))
    args = tuple(t.to(case.torch_dtype).detach().requires_grad_(case.backward) for t in args)
    return Problem(device, args, wrt=args, douts=(torch.randn_like(args[0]),))


def cost(case: Case) -> Cost:
    rows, width, hidden = case.shape
    matmuls = 3 if case.variant == "swiglu" else 2
    return Cost(flops=(3 if case.backward else 1) * matmuls * 2 * rows * width * hidden)


def ours(case: Case):
    return {
        "": F.feed_forward,
        "residual": lambda x, *weights: F.feed_forward(x, *weights, residual=x),
        "swiglu": F.gated_feed_forward,
    }[case.variant]


def eager(case: Case):
    def block(x, w1, b1, w2, b2):
        return TF.linear(TF.gelu(TF.linear(x, w1, b1)), w2, b2)

    return {
        "": block,
        "residual": lambda x, *weights: x + block(x, *weights),
        "swiglu": lambda x, w_gate, w_up, w_down: TF.linear(TF.silu(TF.linear(x, w_gate)) * TF.linear(x, w_up), w_down),
    }[case.variant]


@incomparable
def matmuls(case: Case, problem: Problem):
    x, *rest = (t.detach() for t in problem.args)
    w1, w2 = (torch.cat(rest[:2]), rest[2]) if case.variant == "swiglu" else (rest[0], rest[2])
    before = x @ w1.t()
    after = before[:, : w2.shape[1]].contiguous()
    (dout,) = problem.douts

    def run():
        x @ w1.t()
        after @ w2.t()
        if case.backward:
            dout @ w2
            dout.t() @ after
            before @ w1
            before.t() @ x

    return run


def fused(backend: str):
    def build(case: Case, problem: Problem) -> Call:
        run = on_backend(backend, linear_activation.OP, ours)(case, problem)
        x, w1, second, w2, *_ = problem.args
        reason = linear_activation.refusal(backend, x, w1, second if case.variant == "swiglu" else None, w2)
        if reason:
            raise Unavailable(reason)
        return run

    return build


PROVIDERS = {
    "ours": timed(ours),
    "eager": timed(eager),
    "compile": compiled(eager),
    "matmuls": matmuls,
    "triton": fused("triton"),
    "cuda": fused("cuda"),
}
