"""softmax over rows beside torch's, torch.compile, and a ``clone()`` of the bytes it cannot avoid moving.

Forward moves two tensors; backward reads dout and the result and writes one: five together. Attention scores with a
scale and a mask take torch three operations; the mask itself is small.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as TF

import fastformer.functional as F
from benchmarks.rows import sweep
from benchmarks.runner import Case, Cost, Problem, clone_of_bytes, compiled, on_backend, timed

OP = "softmax"

MASK, CAUSAL, BIAS = ({"feature": feature} for feature in ("mask", "causal", "bias"))

CASES = {
    "cpu": [
        Case((8192, 1024), dtype, backward, compiled=dtype == "float32" and backward)
        for dtype in ("float32", "bfloat16")
        for backward in (False, True)
    ]
    + [
        Case((4, 12, 512, 512), "float32", True, variant, options)
        for variant, options in (("padding mask", MASK), ("causal", CAUSAL), ("bias of each head", BIAS))
    ]
    + sweep(),
    "cuda": [
        Case(((1 << 27) // n, n), "bfloat16", backward, compiled=n in (1024, 16384))
        for n in (4096, 16384, 1024, 65536, 262144, 256)
        for backward in (False, True)
    ],
    "quick": [
        Case((4, 48), "float32", True),
        Case((4, 48), "bfloat16"),
        *(Case((2, 3, 5, 9), "float32", True, options["feature"], options) for options in (MASK, CAUSAL, BIAS)),
    ],
}
SCALE = 0.125  # of attention scores


def setup(case: Case, device: str) -> Problem:
    x = torch.randn(case.shape, device=device).to(case.torch_dtype).requires_grad_(case.backward)
    dout = torch.randn_like(x)
    added = case.options.get("feature")
    if added is None:
        return Problem(device, (x,), wrt=(x,), douts=(dout,))
    batch, heads, queries, keys = case.shape
    if added == "causal":
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    elif added == "mask":
        lengths = torch.randint(keys // 2, keys, (batch, 1, 1, 1), device=device)
        mask = torch.arange(keys, device=device) < lengths
    else:
        mask = torch.randn(heads, queries, keys, device=device).to(case.torch_dtype).requires_grad_(case.backward)
    wrt = (x, mask) if added == "bias" else (x,)
    return Problem(device, (x, mask), wrt=wrt, douts=(dout,))


def cost(case: Case) -> Cost:
    tensor = math.prod(case.shape) * case.torch_dtype.itemsize
    return Cost(bytes=(5 if case.backward else 2) * tensor)


def ours(case: Case):
    added = case.options.get("feature")
    if added is None:
        return lambda x: F.softmax(x, -1)
    if added == "causal":
        return lambda x, mask: F.softmax(x, -1, scale=SCALE, causal=True)
    return lambda x, mask: F.softmax(x, -1, scale=SCALE, mask=mask)


def eager(case: Case):
    added = case.options.get("feature")
    if added is None:
        return lambda x: TF.softmax(x, -1)
    if added == "bias":
        return lambda x, bias: TF.softmax(x * SCALE + bias, -1)
    return lambda x, mask: TF.softmax((x * SCALE).masked_fill(~mask, float("-inf")), -1)


def on(backend: str):
    return lambda case, problem: on_backend(backend, OP, ours, *case.options.values())(case, problem)


PROVIDERS = {
    "ours": timed(ours),
    "eager": timed(eager),
    "compile": compiled(eager),
    "clone": clone_of_bytes(cost),
    "triton": on("triton"),
    "cuda": on("cuda"),
}
