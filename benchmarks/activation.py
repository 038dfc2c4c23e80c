"""relu, gelu (exact and tanh), silu and SwiGLU beside torch's, torch.compile, and a ``clone()`` of the bytes they
cannot avoid moving.

Forward moves two tensors; backward reads dout and x and writes one: five together. "swiglu" is silu(gate) * up: three
tensors forward, eight together. "bias gelu" adds a bias, whose gradient comes from the same pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as TF

import fastformer.functional as F
from benchmarks.goals import SWEEP
from benchmarks.rows import sweep
from benchmarks.runner import Case, Cost, Problem, clone_of_bytes, compiled, on_backend, timed

OP = "activation"
GATED = ("swiglu",)

CASES = {
    "cpu": [
        *(
            Case((8192, 1024), d, b, "gelu", compiled=d == "float32" and b)
            for d in ("float32", "bfloat16")
            for b in (False, True)
        ),
        *(
            Case((8192, 1024), d, True, kind)
            for kind in ("gelu_tanh", "silu", "relu", "bias gelu", "swiglu")
            for d in ("float32", "bfloat16")
        ),
        *sweep(),  # of gelu
    ],
    "cuda": [
        Case((1 << 15, 4096), "bfloat16", backward, kind, compiled=True)
        for kind in ("gelu", "gelu_tanh", "silu", "swiglu")
        for backward in (False, True)
    ],
    "quick": [
        Case((4, 48), "float32", True, "gelu"),
        Case((4, 48), "bfloat16", False, "gelu_tanh"),
        Case((4, 48), "float32", True, "swiglu"),
    ],
}


def setup(case: Case, device: str) -> Problem:
    second = {"swiglu": case.shape, "bias gelu": case.shape[1:]}.get(case.variant)
    shapes = (case.shape,) if second is None else (case.shape, second)
    args = tuple(torch.randn(s, device=device).to(case.torch_dtype).requires_grad_(case.backward) for s in shapes)
    return Problem(device, args, wrt=args, douts=(torch.randn_like(args[0]),))


def cost(case: Case) -> Cost:
    tensor = case.shape[0] * case.cols * case.torch_dtype.itemsize
    forward, backward = (3, 5) if case.variant in GATED else (2, 3)
    return Cost(bytes=(forward + backward if case.backward else forward) * tensor)


def kind(case: Case) -> str:
    return "gelu" if case.variant == SWEEP else case.variant


def ours(case: Case):
    return {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, "tanh"),
        "silu": F.silu,
        "relu": F.relu,
        "bias gelu": lambda x, b: F.bias_activation(x, b, "gelu"),
        "swiglu": F.gated_activation,
    }[kind(case)]


def eager(case: Case):
    return {
        "gelu": TF.gelu,
        "gelu_tanh": lambda x: TF.gelu(x, approximate="tanh"),
        "silu": TF.silu,
        "relu": TF.relu,
        "bias gelu": lambda x, b: TF.gelu(x + b),
        "swiglu": lambda gate, up: TF.silu(gate) * up,
    }[kind(case)]


PROVIDERS = {
    "ours": timed(ours),
    "eager": timed(eager),
    "compile": compiled(eager),
    "clone": clone_of_bytes(cost),
    "triton": on_backend("triton", OP, ours),
    "cuda": on_backend("cuda", OP, ours),
}
