"""What Python costs between a call and its kernel: layer_norm of (8, 64), where the arithmetic takes next to nothing.

``bare`` calls the extension module with tensors that already exist; ours on top of it checks the
arguments, chooses the backend and allocates, and where gradients are needed goes through autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as TF

import fastformer.functional as F
from benchmarks.runner import Case, Cost, Problem, Unavailable, incomparable, timed

OP = "overhead"
INFERENCE, GRADIENT = {"gradient": False}, {"gradient": True}

CASES = {
    "cpu": [
        Case((8, 64), "float32", False, "inference", INFERENCE),
        Case((8, 64), "float32", False, "with gradient", GRADIENT),
        Case((8, 64), "float32", True, "and backward", GRADIENT),
    ],
    "cuda": [
        Case((8, 64), "float32", False, "inference", INFERENCE),
        Case((8, 64), "float32", True, "and backward", GRADIENT),
    ],
    "quick": [Case((8, 64), "float32", False, "inference", INFERENCE), Case((8, 64), "float32", True, "", GRADIENT)],
}


def setup(case: Case, device: str) -> Problem:
    needed = case.options["gradient"]
    args = tuple(torch.randn(*shape, device=device).requires_grad_(needed) for shape in (case.shape, (64,), (64,)))
    return Problem(device, args, wrt=args, douts=(torch.randn(case.shape, device=device),))


def cost(case: Case) -> Cost:
    return Cost()


def ours(case: Case):
    return lambda x, weight, bias: F.layer_norm(x, (case.cols,), weight, bias)


def eager(case: Case):
    return lambda x, weight, bias: TF.layer_norm(x, (case.cols,), weight, bias)


@incomparable
def bare(case: Case, problem: Problem):
    if problem.device != "cpu":
        raise Unavailable("measured on CPUs")
    try:
        from fastformer import _C
    except ImportError as error:
        raise Unavailable(str(error)) from None
    x, weight, bias = (t.detach() for t in problem.args)
    (dout,) = problem.douts
    mean, rstd = torch.empty(len(x)), torch.empty(len(x))
    out, dx, dweight, dbias = (torch.empty_like(t) for t in (x, x, weight, bias))

    def forward():
        _C.layer_norm_forward(x, weight, bias, out, mean, rstd, 1e-5)

    def forward_backward():
        forward()
        _C.layer_norm_backward(dout, x, weight, mean, rstd, dx, dweight, dbias)

    return forward_backward if case.backward else forward


PROVIDERS = {"ours": timed(ours), "eager": timed(eager), "bare": bare}
