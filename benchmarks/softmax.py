"""softmax over rows beside torch's, torch.compile, and a ``clone()`` of the bytes it cannot avoid moving.

Forward moves two tensors; backward reads dout and the result and writes one: five together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as TF

import fastformer.functional as F
from benchmarks.runner import Case, Cost, Problem, clone_of_bytes, compiled, on_backend, timed

OP = "softmax"

CASES = {
    "cpu": [
        Case((8192, 1024), dtype, backward, compiled=dtype == "float32" and backward)
        for dtype in ("float32", "bfloat16")
        for backward in (False, True)
    ],
    "cuda": [
        Case(((1 << 27) // n, n), "bfloat16", backward, compiled=n in (1024, 16384))
        for n in (256, 1024, 4096, 16384, 65536, 262144)
        for backward in (False, True)
    ],
    "quick": [Case((4, 48), "float32", True), Case((4, 48), "bfloat16")],
}


def setup(case: Case, device: str) -> Problem:
    x = torch.randn(case.shape, device=device).to(case.torch_dtype).requires_grad_(case.backward)
    return Problem(device, (x,), wrt=(x,), douts=(torch.randn_like(x),))


def cost(case: Case) -> Cost:
    tensor = case.shape[0] * case.cols * case.torch_dtype.itemsize
    return Cost(bytes=(5 if case.backward else 2) * tensor)


def ours(case: Case):
    return lambda x: F.softmax(x, -1)


def eager(case: Case):
    return lambda x: TF.softmax(x, -1)


PROVIDERS = {
    "ours": timed(ours),
    "eager": timed(eager),
    "compile": compiled(eager),
    "clone": clone_of_bytes(cost),
    "triton": on_backend("triton", OP, ours),
    "cuda": on_backend("cuda", OP, ours),
}
