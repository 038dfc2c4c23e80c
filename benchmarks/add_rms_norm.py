"""add_rms_norm, the residual add, dropout and RMS norm of a Llama or T5 block, beside the same three calls of torch.
The bytes and the cases are add_layer_norm's."""

from __future__ import annotations

import torch
import torch.nn.functional as TF

import fastformer.functional as F
from benchmarks.add_layer_norm import CASES as CASES
from benchmarks.add_layer_norm import cost
from benchmarks.runner import Case, Problem, clone_of_bytes, compiled, on_backend, timed

OP = "add_rms_norm"
EPS = 1e-6


def setup(case: Case, device: str) -> Problem:
    make = lambda *shape: torch.randn(*shape, device=device).to(case.torch_dtype).requires_grad_(case.backward)  # noqa: E731
    args = (make(*case.shape), make(*case.shape), make(case.cols))
    douts = (torch.randn_like(args[0]), torch.randn_like(args[0]))
    return Problem(device, args, wrt=args, douts=douts, random=bool(case.options))


def ours(case: Case):
    p = case.options.get("dropout_p", 0.0)
    return lambda x, residual, w: F.add_rms_norm(x, residual, (case.cols,), w, EPS, dropout_p=p)


def eager(case: Case):
    p = case.options.get("dropout_p", 0.0)

    def run(x, residual, w):
        summed = residual + (TF.dropout(x, p) if p else x)
        return TF.rms_norm(summed, (case.cols,), w, EPS), summed

    return run


PROVIDERS = {
    "ours": timed(ours),
    "eager": timed(eager),
    "compile": compiled(eager),
    "clone": clone_of_bytes(cost),
    "triton": on_backend("triton", OP, ours, "dropout"),
    "cuda": on_backend("cuda", OP, ours, "dropout"),
}
