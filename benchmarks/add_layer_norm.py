"""add_layer_norm, the residual add, dropout and layer norm of a transformer block, beside the same three calls of
torch.

One pass reads x and residual and writes the sum and its norm: four tensors. Backward reads dout, dsummed and the sum
and writes one gradient, or with dropout two (x's and the residual's then differ)."""

from __future__ import annotations

import torch
import torch.nn.functional as TF

import fastformer.functional as F
from benchmarks.rows import sweep
from benchmarks.runner import Case, Cost, Problem, clone_of_bytes, compiled, on_backend, timed

OP = "add_layer_norm"
DROPOUT = {"dropout_p": 0.1}

CASES = {
    "cpu": [
        Case((8192, 1024), dtype, backward, variant, options, compiled=dtype == "float32" and (backward or not options))
        for variant, options in (("", {}), ("dropout 0.1", DROPOUT))
        for dtype in ("float32", "bfloat16")
        for backward in (False, True)
    ]
    + sweep(),
    "cuda": [
        Case(((1 << 26) // n, n), "bfloat16", backward, variant, options, compiled=n == 4096)
        for n in (1024, 4096, 16384)
        for variant, options in (("", {}), ("dropout 0.1", DROPOUT))
        for backward in (False, True)
    ],
    "quick": [Case((4, 48), "float32", True), Case((4, 48), "bfloat16", True, "dropout 0.1", DROPOUT)],
}


def setup(case: Case, device: str) -> Problem:
    make = lambda *shape: torch.randn(*shape, device=device).to(case.torch_dtype).requires_grad_(case.backward)  # noqa: E731
    args = (make(*case.shape), make(*case.shape), make(case.cols), make(case.cols))
    douts = (torch.randn_like(args[0]), torch.randn_like(args[0]))
    return Problem(device, args, wrt=args, douts=douts, random=bool(case.options))


def cost(case: Case) -> Cost:
    tensor = case.shape[0] * case.cols * case.torch_dtype.itemsize
    backward = (5 if case.options else 4) if case.backward else 0
    return Cost(bytes=(4 + backward) * tensor)


def ours(case: Case):
    p = case.options.get("dropout_p", 0.0)
    return lambda x, residual, w, b: F.add_layer_norm(x, residual, (case.cols,), w, b, dropout_p=p)


def eager(case: Case):
    p = case.options.get("dropout_p", 0.0)

    def run(x, residual, w, b):
        summed = residual + (TF.dropout(x, p) if p else x)
        return TF.layer_norm(summed, (case.cols,), w, b), summed

    return run


PROVIDERS = {
    "ours": timed(ours),
    "eager": timed(eager),
    "compile": compiled(eager),
    "clone": clone_of_bytes(cost),
    "triton": on_backend("triton", OP, ours, "dropout"),
    "cuda": on_backend("cuda", OP, ours, "dropout"),
}
