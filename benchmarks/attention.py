"""attention beside ``F.scaled_dot_product_attention``: on a GPU beside each of its backends by name.

Operations counted: two matmuls of 2 Sq Sk D per head forward (half of that when causal), two and a half times as many
backward (five matmuls).
"""

from __future__ import annotations

import torch
import torch.nn.functional as TF
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastformer.functional as F
from benchmarks.runner import Case, Cost, Problem, Unavailable, on_backend, rehearsing, timed

OP = "attention"
CAUSAL = {"causal": True}

# Shapes are (B, H, S, D). Options: causal, padding (share of the keys ignored), kv_heads, queries (Sq, where not S).
CASES = {
    "cpu": [
        *(
            Case((2, 12, 1024, 64), dtype, backward, "causal", CAUSAL)
            for dtype in ("float32", "bfloat16")
            for backward in (False, True)
        ),
        Case((2, 12, 1024, 64), "float32", False, "full"),
        Case((2, 12, 512, 64), "float32", False, "padding", {"padding": 0.25}),
        Case((2, 12, 512, 64), "float32", True, "padding", {"padding": 0.25}),
        Case((2, 12, 512, 64), "float32", True, "causal 4 kv heads", {"causal": True, "kv_heads": 4}),
        Case((12, 4, 64, 32), "float32", True, "causal small", CAUSAL),  # the demo's
        Case((8, 12, 512, 64), "float32", False, "decode", {"queries": 1}),
    ],
    "cuda": [
        *(
            Case((max(1, 16384 // s), 2048 // d, s, d), "bfloat16", backward, variant, options)
            for d in (64, 128)
            for s in (1024, 4096, 16384)
            for variant, options in (("causal", CAUSAL), ("full", {}))
            for backward in (False, True)
        ),
        Case((1, 16, 32768, 128), "bfloat16", False, "causal", CAUSAL),
        Case((4, 32, 4096, 128), "bfloat16", True, "causal 8 kv heads", {"causal": True, "kv_heads": 8}),
        Case((8, 16, 2048, 64), "bfloat16", True, "padding", {"padding": 0.25}),
    ],
    "quick": [
        Case((1, 2, 10, 8), "float32", True, "causal", CAUSAL),
        Case((1, 2, 10, 8), "float32", False, "padding", {"padding": 0.25}),
        Case((1, 2, 10, 8), "bfloat16", True, "causal 1 kv head", {"causal": True, "kv_heads": 1}),
        Case((1, 2, 10, 8), "float32", False, "decode", {"queries": 1}),
    ],
}


def setup(case: Case, device: str) -> Problem:
    batch, heads, length, dim = case.shape
    queries, kv_heads = case.options.get("queries", length), case.options.get("kv_heads", heads)
    make = lambda h, s: torch.randn(batch, h, s, dim, device=device).to(case.torch_dtype).requires_grad_(case.backward)  # noqa: E731
    q, k, v = make(heads, queries), make(kv_heads, length), make(kv_heads, length)
    mask = None
    if "padding" in case.options:  # sequence b has its last padding * b / B of the keys ignored, the first none
        kept = length - (torch.arange(batch, device=device) + 1) * (length * case.options["padding"] / batch)
        mask = torch.arange(length, device=device) >= kept[:, None]
    return Problem(device, (q, k, v, mask), wrt=(q, k, v), douts=(torch.randn_like(q),))


def cost(case: Case) -> Cost:
    batch, heads, length, dim = case.shape
    queries, kv_heads = case.options.get("queries", length), case.options.get("kv_heads", heads)
    matmul = 2 * batch * heads * queries * length * dim // (2 if case.options.get("causal") else 1)
    tensors = 2 * batch * dim * (heads * queries + kv_heads * length) * case.torch_dtype.itemsize
    # Backward reads all four and dout and writes three gradients.
    return Cost(bytes=3 * tensors if case.backward else tensors, flops=(7 if case.backward else 2) * matmul)


def ours(case: Case):
    causal = case.options.get("causal", False)
    return lambda q, k, v, mask: F.attention(q, k, v, causal=causal, key_padding_mask=mask)


def eager(case: Case):
    causal, grouped = case.options.get("causal", False), "kv_heads" in case.options

    def run(q, k, v, mask):
        visible = None if mask is None else ~mask[:, None, None, :]
        return TF.scaled_dot_product_attention(q, k, v, visible, is_causal=causal, enable_gqa=grouped)

    return run


def sdpa(backend: SDPBackend):
    """torch's function held to one of its backends."""

    def build(case: Case, problem: Problem):
        if problem.device == "cpu" and not rehearsing():
            raise Unavailable("measured on GPUs")
        batch, heads, length, _ = case.shape
        if backend is SDPBackend.MATH and batch * heads * length**2 > 1 << 32:
            raise Unavailable("its score matrix would need over 8 GB")
        call = timed(eager)(case, problem)

        def run():
            with sdpa_kernel(backend):
                return call()

        try:
            run()
        except RuntimeError as error:
            if "No viable backend" in str(error) or "No available kernel" in str(error):
                raise Unavailable("does not cover this case") from None
            raise
        return run

    return build


PROVIDERS = {
    "ours": timed(ours),
    "eager": timed(eager),
    "flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "math": sdpa(SDPBackend.MATH),
    "triton": on_backend("triton", OP, ours),
    "cuda": on_backend("cuda", OP, ours),
}
