"""linear_cross_entropy at GPT-2's size and vocabulary, beside torch's linear and cross_entropy, torch.compile, and the
three matmuls alone (one forward). The shape is (rows, width, classes).

On a CPU without bfloat16 products torch multiplies one element at a time, which takes it minutes for 1024 rows; there
fewer are measured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as TF

import fastformer.functional as F
from benchmarks.runner import Case, Cost, Problem, Unavailable, compiled, incomparable, on_backend, timed

OP = "linear_cross_entropy"
BFLOAT16_ROWS = 1024 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 32

CASES = {
    "cpu": [
        Case((1024, 768, 50257), "float32"),
        Case((1024, 768, 50257), "float32", True, compiled=True),
        Case((BFLOAT16_ROWS, 768, 50257), "bfloat16", True),
        Case((768, 128, 96), "float32", True),  # the demo's
    ],
    "cuda": [
        Case((8192, width, classes), "bfloat16", backward, compiled=True)
        for width, classes in ((768, 50257), (4096, 128256))
        for backward in (False, True)
    ],
    "quick": [Case((9, 16, 97), "float32", True), Case((9, 16, 97), "bfloat16")],
}


def setup(case: Case, device: str) -> Problem:
    rows, width, classes = case.shape
    x = torch.randn(rows, width, device=device).to(case.torch_dtype)
    w = (torch.randn(classes, width, device=device) / width**0.5).to(case.torch_dtype)
    target = torch.randint(classes, (rows,), device=device)
    args = (x.requires_grad_(case.backward), w.requires_grad_(case.backward))
    return Problem(device, (*args, target), wrt=args, douts=(torch.ones((), device=device).to(case.torch_dtype),))


def cost(case: Case) -> Cost:
    rows, width, classes = case.shape
    return Cost(flops=(6 if case.backward else 2) * rows * width * classes)


def ours(case: Case):
    return F.linear_cross_entropy


def eager(case: Case):
    return lambda x, w, target: TF.cross_entropy(TF.linear(x, w), target)


@incomparable
def matmuls(case: Case, problem: Problem):
    x, w, _ = (t.detach() for t in problem.args)
    if case.dtype == "bfloat16" and problem.device == "cpu" and BFLOAT16_ROWS < 1024:
        raise Unavailable("this CPU has no bfloat16 products")
    logits = x @ w.t()

    def run():
        x @ w.t()
        if case.backward:
            logits @ w
            logits.t() @ x

    return run


def liger(case: Case, problem: Problem):
    if problem.device != "cuda":
        raise Unavailable("measured on GPUs")
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise Unavailable(str(error)) from None
    return timed(lambda case: liger_fused_linear_cross_entropy)(case, problem)


PROVIDERS = {
    "ours": timed(ours),
    "eager": timed(eager),
    "compile": compiled(eager),
    "matmuls": matmuls,
    "triton": on_backend("triton", OP, ours),
    "liger": liger,
}
