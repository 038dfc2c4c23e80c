"""layer_norm beside torch's, torch.compile, and a ``clone()`` of the bytes it cannot avoid moving.

Forward reads x and writes out: the bytes of one clone. Backward reads dout and x and writes dx, so forward and backward
together move five tensors, two and a half clones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as TF

import fastformer.functional as F
from benchmarks.rows import sweep
from benchmarks.runner import Case, Cost, Problem, Unavailable, clone_of_bytes, compiled, on_backend, timed

OP = "layer_norm"
DTYPES = ("float32", "bfloat16")

CASES = {
    "cpu": [Case((8192, 1024), d, backward, compiled=True) for d in DTYPES for backward in (False, True)] + sweep(),
    # 256 MiB a tensor, five times a large L2 cache, at the row lengths that take different kernels.
    "cuda": [
        Case(((1 << 27) // n, n), "bfloat16", backward, compiled=n in (1024, 16384))
        for n in (4096, 16384, 1024, 65536, 262144, 256)
        for backward in (False, True)
    ],
    "quick": [Case((4, 48), "float32", True), Case((4, 48), "bfloat16")],
}


def setup(case: Case, device: str) -> Problem:
    x = torch.randn(case.shape, device=device).to(case.torch_dtype).requires_grad_(case.backward)
    weight = torch.randn(case.cols, device=device).to(case.torch_dtype).requires_grad_(case.backward)
    bias = torch.randn(case.cols, device=device).to(case.torch_dtype).requires_grad_(case.backward)
    return Problem(device, (x, weight, bias), wrt=(x, weight, bias), douts=(torch.randn_like(x),))


def cost(case: Case) -> Cost:
    tensor = case.shape[0] * case.cols * case.torch_dtype.itemsize
    return Cost(bytes=(5 if case.backward else 2) * tensor)


def ours(case: Case):
    return lambda x, weight, bias: F.layer_norm(x, (case.cols,), weight, bias)


def eager(case: Case):
    return lambda x, weight, bias: TF.layer_norm(x, (case.cols,), weight, bias)


def liger(case: Case, problem: Problem):
    if problem.device != "cuda":
        raise Unavailable("measured on GPUs")
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError as error:
        raise Unavailable(str(error)) from None
    return timed(lambda case: lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-5))(case, problem)


PROVIDERS = {
    "ours": timed(ours),
    "eager": timed(eager),
    "compile": compiled(eager),
    "clone": clone_of_bytes(cost),
    "triton": on_backend("triton", OP, ours),
    "cuda": on_backend("cuda", OP, ours),
    "liger": liger,
}
