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
from fastformer.functional.attention import relative_position_bucket

OP = "attention"
CAUSAL = {"causal": True}

# Shapes are (B, H, S, D). Options: causal, padding (share of the keys ignored), kv_heads, queries (Sq, where not S),
# bias ("learned": (1, H, S, S) with a gradient; "T5": from a table of 32 buckets with a gradient), window, dropout.
MAIN = (2, 12, 1024, 64)
CASES = {
    "cpu": [
        *(
            Case(MAIN, dtype, backward, "causal", CAUSAL)
            for dtype in ("float32", "bfloat16")
            for backward in (False, True)
        ),
        *(
            Case(MAIN, dtype, True, f"{bias} bias", {"bias": bias})
            for dtype in ("float32", "bfloat16")
            for bias in ("learned", "T5")
        ),
        Case(MAIN, "float32", False, "full"),
        Case(MAIN, "float32", True, "dropout 0.1 causal", {"causal": True, "dropout": 0.1}),
        Case(MAIN, "float32", True, "window 128 causal", {"causal": True, "window": 128}),
        Case((2, 12, 512, 64), "float32", False, "padding", {"padding": 0.25}),
        Case((2, 12, 512, 64), "float32", True, "padding", {"padding": 0.25}),
        Case((2, 12, 512, 64), "float32", True, "causal 4 kv heads", {"causal": True, "kv_heads": 4}),
        Case((12, 4, 64, 32), "float32", True, "causal small", CAUSAL),  # the demo's
        Case((8, 12, 512, 64), "float32", False, "decode", {"queries": 1}),
        *(
            Case((8, 12, 512, 64), dtype, False, "decode padding", {"queries": 1, "padding": 0.25})
            for dtype in ("float32", "bfloat16")
        ),
        # never slower: few and many heads, short and long, narrow and wide
        *(
            Case(shape, dtype, backward, "sweep", {"causal": shape[2] > 64})
            for shape in (
                (1, 1, 16, 64),
                (1, 1, 128, 32),
                (1, 1, 1024, 128),
                (1, 1, 8192, 64),
                (1, 4, 16, 256),
                (1, 4, 512, 256),
                (2, 12, 16, 64),
                (2, 12, 128, 128),
                (8, 12, 64, 64),
                (8, 12, 256, 64),
            )
            for dtype in ("float32", "bfloat16")
            for backward in (False, True)
            if shape[2] < 8192 or not backward
        ),
    ],
    "cuda": [
        *(
            Case((max(1, 16384 // s), 2048 // d, s, d), "bfloat16", backward, variant, options)
            for d in (128, 64)
            for s in (16384, 4096, 1024)
            for variant, options in (("causal", CAUSAL), ("full", {}))
            for backward in (False, True)
        ),
        Case((1, 16, 32768, 128), "bfloat16", False, "causal", CAUSAL),
        Case((4, 32, 4096, 128), "bfloat16", True, "causal 8 kv heads", {"causal": True, "kv_heads": 8}),
        Case((8, 16, 2048, 64), "bfloat16", True, "padding", {"padding": 0.25}),
        Case((4, 16, 4096, 64), "bfloat16", True, "T5 bias", {"bias": "T5"}),
    ],
    "quick": [
        Case((1, 2, 10, 8), "float32", True, "causal", CAUSAL),
        Case((1, 2, 10, 8), "float32", False, "padding", {"padding": 0.25}),
        Case((1, 2, 10, 8), "bfloat16", True, "causal 1 kv head", {"causal": True, "kv_heads": 1}),
        Case((1, 2, 10, 8), "float32", False, "decode", {"queries": 1}),
        Case((2, 2, 10, 8), "float32", False, "decode padding", {"queries": 1, "padding": 0.25}),
        Case((1, 2, 10, 8), "float32", True, "learned bias", {"bias": "learned"}),
        Case((1, 2, 10, 8), "float32", True, "T5 bias", {"bias": "T5"}),
        Case((1, 2, 10, 8), "float32", True, "window 3 causal", {"causal": True, "window": 3}),
    ],
}


def setup(case: Case, device: str) -> Problem:
    batch, heads, length, dim = case.shape
    queries, kv_heads = case.options.get("queries", length), case.options.get("kv_heads", heads)
    make = lambda *shape: torch.randn(shape, device=device).to(case.torch_dtype).requires_grad_(case.backward)  # noqa: E731
    q, k, v = make(batch, heads, queries, dim), *(make(batch, kv_heads, length, dim) for _ in range(2))
    mask = bias = None
    if "padding" in case.options:  # sequence b has its last padding * b / B of the keys ignored, the first none
        kept = length - (torch.arange(batch, device=device) + 1) * (length * case.options["padding"] / batch)
        mask = torch.arange(length, device=device) >= kept[:, None]
    if "bias" in case.options:
        bias = make(1, heads, length, length) if case.options["bias"] == "learned" else make(32, heads)
    wrt = (q, k, v) if bias is None else (q, k, v, bias)
    random = "dropout" in case.options
    return Problem(device, (q, k, v, mask, bias), wrt=wrt, douts=(torch.randn_like(q),), random=random)


def cost(case: Case) -> Cost:
    batch, heads, length, dim = case.shape
    queries, kv_heads = case.options.get("queries", length), case.options.get("kv_heads", heads)
    seen = queries * length // (2 if case.options.get("causal") else 1)
    if "window" in case.options:
        seen = min(seen, queries * case.options["window"])
    tensors = 2 * batch * dim * (heads * queries + kv_heads * length) * case.torch_dtype.itemsize
    # Backward reads all four and dout and writes three gradients.
    flops = (7 if case.backward else 2) * 2 * batch * heads * seen * dim
    return Cost(bytes=3 * tensors if case.backward else tensors, flops=flops)


def ours(case: Case):
    options = {
        "causal": case.options.get("causal", False),
        "window": (case.options.get("window", 0) - 1, -1),
        "dropout_p": case.options.get("dropout", 0.0),
    }
    t5 = case.options.get("bias") == "T5"

    def run(q, k, v, mask, bias):
        more = {"relative_bias": (bias, True, 32, 128)} if t5 else {"bias": bias}
        return F.attention(q, k, v, key_padding_mask=mask, **options, **more)

    return run


def eager(case: Case):
    causal, grouped = case.options.get("causal", False), "kv_heads" in case.options
    window, dropout_p = case.options.get("window"), case.options.get("dropout", 0.0)
    t5, length = case.options.get("bias") == "T5", case.shape[2]

    def run(q, k, v, mask, bias):
        attn_mask = bias
        if mask is not None:
            attn_mask = ~mask[:, None, None, :]
        elif t5:  # as transformers does: a lookup of every distance, a matrix of biases
            attn_mask = bias[buckets.to(bias.device)].permute(2, 0, 1)[None].contiguous()
        elif window:
            attn_mask = visible.to(q.device)
        is_causal = causal and attn_mask is None
        return TF.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa=grouped)

    distance = torch.arange(length) - torch.arange(length)[:, None]
    if t5:
        buckets = relative_position_bucket(distance, True, 32, 128)
    if window:
        visible = (distance <= 0) & (distance > -window)
    return run


def sdpa(backend: SDPBackend, eager):
    """torch's function held to one of its backends. ``eager(case)`` is how it is called."""

    def build(case: Case, problem: Problem):
        if problem.device == "cpu" and not rehearsing():
            raise Unavailable("measured on GPUs")
        batch, heads, keys, _ = case.shape
        queries = case.options.get("queries", keys)
        if backend is SDPBackend.MATH and batch * heads * queries * keys > 1 << 32:
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


def peers(eager):
    """PyTorch as it chooses, then each of its backends by name."""
    return {
        "eager": timed(eager),
        "flash": sdpa(SDPBackend.FLASH_ATTENTION, eager),
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION, eager),
        "efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION, eager),
        "math": sdpa(SDPBackend.MATH, eager),
    }


PROVIDERS = {
    "ours": timed(ours),
    **peers(eager),
    "triton": on_backend("triton", OP, ours),
    "cuda": on_backend("cuda", OP, ours),
}
