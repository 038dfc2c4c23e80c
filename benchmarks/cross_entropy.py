"""cross_entropy at GPT-2's vocabulary and at the demo's, beside torch's and torch.compile.

Forward has to read the logits, and their gradient has to be written: two tensors, or three with probabilities to read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as TF

import fastformer.functional as F
from benchmarks.rows import sweep
from benchmarks.runner import Case, Cost, Problem, Unavailable, compiled, on_backend, timed

OP = "cross_entropy"

PROBABILITIES = {"feature": "probabilities"}

CASES = {
    "cpu": [
        Case((1024, 50257), "float32"),
        Case((1024, 50257), "float32", True, compiled=True),
        Case((1024, 50257), "bfloat16", True),
        Case((768, 96), "float32", True),
        Case((1024, 10000), "float32", True, "probabilities", PROBABILITIES),
        *sweep(),
    ],
    "cuda": [
        Case(((1 << 28) // n, n), "bfloat16", backward, compiled=n == 50257)
        for n in (50257, 128256, 32000, 4096, 262144)
        for backward in (False, True)
    ],
    "quick": [
        Case((4, 97), "float32", True),
        Case((4, 97), "bfloat16"),
        Case((4, 97), "float32", True, "probabilities", PROBABILITIES),
    ],
}


def setup(case: Case, device: str) -> Problem:
    logits = torch.randn(case.shape, device=device).to(case.torch_dtype).requires_grad_(case.backward)
    if case.options:
        target = torch.randn(case.shape, device=device).softmax(1).to(case.torch_dtype)
    else:
        target = torch.randint(case.cols, case.shape[:1], device=device)
    return Problem(device, (logits, target), wrt=(logits,), douts=(torch.ones((), device=device).to(case.torch_dtype),))


def cost(case: Case) -> Cost:
    tensors = 1 + case.backward + bool(case.options)
    return Cost(bytes=tensors * case.shape[0] * case.cols * case.torch_dtype.itemsize)


def ours(case: Case):
    return F.cross_entropy


def eager(case: Case):
    return TF.cross_entropy


def liger(case: Case, problem: Problem):
    if problem.device != "cuda" or case.options:
        raise Unavailable("measured on GPUs")
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError as error:
        raise Unavailable(str(error)) from None
    # It writes the gradient over the logits, so each call gets its own copy, which is then part of its time.
    return timed(lambda case: lambda logits, target: liger_cross_entropy(logits.clone(), target))(case, problem)


def on(backend: str):
    return lambda case, problem: on_backend(backend, OP, ours, *case.options.values())(case, problem)


PROVIDERS = {
    "ours": timed(ours),
    "eager": timed(eager),
    "compile": compiled(eager),
    "triton": on("triton"),
    "cuda": on("cuda"),
    "liger": liger,
}
