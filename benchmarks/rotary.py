"""rotary_embedding of q and k beside the formula as transformers writes it, and a ``clone()`` of q and k.

q and k have to be read and written: the bytes of one clone of both, and as many again backward. The tables of cosines
and sines are small beside them."""

from __future__ import annotations

import torch

import fastformer.functional as F
from benchmarks.runner import Case, Cost, Problem, clone_of_bytes, compiled, on_backend, timed

OP = "rotary"

HALVES, INTERLEAVED = ("Llama", {"kv_heads": 8}), ("GPT-J", {"kv_heads": 16, "interleaved": True})

CASES = {
    "cpu": [
        Case(shape, dtype, backward, *model, compiled=dtype == "float32")
        for shape, model in (((1, 32, 2048, 128), HALVES), ((2, 16, 1024, 64), INTERLEAVED))
        for dtype in ("float32", "bfloat16")
        for backward in (False, True)
    ],
    "cuda": [
        Case(shape, "bfloat16", backward, *model, compiled=True)
        for shape, model in (((4, 32, 8192, 128), HALVES), ((8, 16, 4096, 256), INTERLEAVED))
        for backward in (False, True)
    ],
    "quick": [
        Case((2, 4, 5, 16), "float32", True, "Llama", {"kv_heads": 2}),
        Case((2, 2, 5, 16), "bfloat16", True, "GPT-J", {"kv_heads": 2, "interleaved": True}),
    ],
}


def setup(case: Case, device: str) -> Problem:
    batch, heads, length, head_dim = case.shape
    make = lambda heads: torch.randn(batch, length, heads, head_dim, device=device).to(case.torch_dtype).transpose(1, 2)  # noqa: E731
    q, k = (
        make(n).requires_grad_(case.backward) for n in (heads, case.options["kv_heads"])
    )  # as projections give them
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angle = torch.arange(length, device=device)[:, None] * frequencies
    return Problem(device, (q, k, angle.cos(), angle.sin()), (q, k), (torch.randn_like(q), torch.randn_like(k)))


def cost(case: Case) -> Cost:
    batch, heads, length, head_dim = case.shape
    elements = batch * (heads + case.options["kv_heads"]) * length * head_dim
    return Cost(bytes=(4 if case.backward else 2) * elements * case.torch_dtype.itemsize)


def ours(case: Case):
    interleaved = case.options.get("interleaved", False)
    return lambda q, k, cos, sin: F.rotary_embedding(q, k, cos, sin, interleaved=interleaved)


def eager(case: Case):
    interleaved = case.options.get("interleaved", False)

    def swapped(x):
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    def run(q, k, cos, sin):
        twice = lambda t: (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)).to(q.dtype)  # noqa: E731
        cos, sin = twice(cos), twice(sin)
        return q * cos + swapped(q) * sin, k * cos + swapped(k) * sin

    return run


PROVIDERS = {
    "ours": timed(ours),
    "eager": timed(eager),
    "compile": compiled(eager),
    "clone": clone_of_bytes(cost),
    "triton": on_backend("triton", OP, ours),
    "cuda": on_backend("cuda", OP, ours),
}
