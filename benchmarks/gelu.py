"""gelu, exact and by tanh, beside torch's, torch.compile, and a ``clone()`` of the bytes it cannot avoid moving.

Forward moves two tensors; backward reads dout and x and writes one: five together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as TF

import fastformer.functional as F
from benchmarks.rows import sweep
from benchmarks.runner import Case, Cost, Problem, clone_of_bytes, compiled, on_backend, timed

OP = "gelu"
EXACT, TANH = {"approximate": "none"}, {"approximate": "tanh"}

CASES = {
    "cpu": [
        *(
            Case((8192, 1024), d, b, "exact", EXACT, d == "float32" and b)
            for d in ("float32", "bfloat16")
            for b in (False, True)
        ),
        *(Case((8192, 1024), d, True, "tanh", TANH) for d in ("float32", "bfloat16")),
        *sweep(options=EXACT),
    ],
    "cuda": [
        Case((1 << 15, 4096), "bfloat16", backward, variant, options, compiled=True)
        for variant, options in (("exact", EXACT), ("tanh", TANH))
        for backward in (False, True)
    ],
    "quick": [Case((4, 48), "float32", True, "exact", EXACT), Case((4, 48), "bfloat16", False, "tanh", TANH)],
}


def setup(case: Case, device: str) -> Problem:
    x = torch.randn(case.shape, device=device).to(case.torch_dtype).requires_grad_(case.backward)
    return Problem(device, (x,), wrt=(x,), douts=(torch.randn_like(x),))


def cost(case: Case) -> Cost:
    tensor = case.shape[0] * case.cols * case.torch_dtype.itemsize
    return Cost(bytes=(5 if case.backward else 2) * tensor)


def ours(case: Case):
    return lambda x: F.gelu(x, case.options["approximate"])


def eager(case: Case):
    return lambda x: TF.gelu(x, approximate=case.options["approximate"])


PROVIDERS = {
    "ours": timed(ours),
    "eager": timed(eager),
    "compile": compiled(eager),
    "clone": clone_of_bytes(cost),
    "triton": on_backend("triton", OP, ours),
    "cuda": on_backend("cuda", OP, ours),
}
