"""rms_norm beside torch's, torch.compile, and a ``clone()`` of the bytes it cannot avoid moving: layer_norm's, in the
same cases."""

from __future__ import annotations

import torch
import torch.nn.functional as TF

import fastformer.functional as F
from benchmarks.layer_norm import CASES as CASES
from benchmarks.layer_norm import cost
from benchmarks.runner import Case, Problem, Unavailable, clone_of_bytes, compiled, on_backend, timed

OP = "rms_norm"
EPS = 1e-6


def setup(case: Case, device: str) -> Problem:
    x = torch.randn(case.shape, device=device).to(case.torch_dtype).requires_grad_(case.backward)
    weight = torch.randn(case.cols, device=device).to(case.torch_dtype).requires_grad_(case.backward)
    return Problem(device, (x, weight), wrt=(x, weight), douts=(torch.randn_like(x),))


def ours(case: Case):
    return lambda x, weight: F.rms_norm(x, (case.cols,), weight, EPS)


def eager(case: Case):
    return lambda x, weight: TF.rms_norm(x, (case.cols,), weight, EPS)


def liger(case: Case, problem: Problem):
    if problem.device != "cuda":
        raise Unavailable("measured on GPUs")
    try:
        from liger_kernel.transformers.functional import liger_rms_norm
    except ImportError as error:
        raise Unavailable(str(error)) from None
    # not in place: it would write over the gradient that every provider is given
    return timed(lambda case: lambda x, w: liger_rms_norm(x, w, EPS, in_place=False))(case, problem)


PROVIDERS = {
    "ours": timed(ours),
    "eager": timed(eager),
    "compile": compiled(eager),
    "clone": clone_of_bytes(cost),
    "triton": on_backend("triton", OP, ours),
    "cuda": on_backend("cuda", OP, ours),
    "liger": liger,
}
