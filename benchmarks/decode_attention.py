"""decode_attention, one token of generation against a full cache, beside ``F.scaled_dot_product_attention``.

torch has no attention on a paged cache: there eager gathers the pages first, as code without such a kernel has to.
Bytes counted: keys and values once, queries and output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as TF

import fastformer.functional as F
from benchmarks.attention import peers
from benchmarks.runner import Case, Cost, Problem, on_backend, timed

OP = "decode_attention"

# Shapes are (B, Hq, keys, D). Options: kv_heads, queries, page_size.
CASES = {
    "cpu": [
        *(
            Case((b, 12, s, 64), dtype, variant="12 kv heads", options={"kv_heads": 12})
            for dtype in ("float32", "bfloat16")
            for b, s in ((1, 1024), (8, 512))
        ),
        *(
            Case((1, 32, 4096, 128), dtype, variant="8 kv heads", options={"kv_heads": 8})
            for dtype in ("float32", "bfloat16")
        ),
        Case((4, 32, 2048, 128), "bfloat16", variant="8 kv heads, 4 queries", options={"kv_heads": 8, "queries": 4}),
        Case((8, 32, 1024, 128), "bfloat16", variant="8 kv heads, pages", options={"kv_heads": 8, "page_size": 64}),
    ],
    "cuda": [
        *(
            Case((b, 32, s, 128), "bfloat16", variant="8 kv heads", options={"kv_heads": 8})
            for b, s in ((1, 4096), (1, 131072), (16, 8192), (64, 2048))
        ),
        Case((16, 32, 8192, 128), "bfloat16", variant="32 kv heads", options={"kv_heads": 32}),
        Case((16, 32, 8192, 128), "bfloat16", variant="8 kv heads, 4 queries", options={"kv_heads": 8, "queries": 4}),
        Case((16, 32, 8192, 128), "bfloat16", variant="8 kv heads, pages", options={"kv_heads": 8, "page_size": 64}),
    ],
    "quick": [
        Case((2, 2, 10, 8), "float32", variant="1 kv head", options={"kv_heads": 1}),
        Case((2, 2, 10, 8), "bfloat16", variant="2 queries, pages", options={"queries": 2, "page_size": 4}),
    ],
}


def sizes(case: Case) -> tuple[int, int, int, int, int, int]:
    """(B, Hq, Hkv, queries, keys, D)"""
    batch, heads, keys, dim = case.shape
    return batch, heads, case.options.get("kv_heads", heads), case.options.get("queries", 1), keys, dim


def setup(case: Case, device: str) -> Problem:
    batch, heads, kv_heads, queries, keys, dim = sizes(case)
    make = lambda *shape: torch.randn(*shape, dim, device=device).to(case.torch_dtype)  # noqa: E731
    lengths, table = torch.full((batch,), keys, dtype=torch.int32, device=device), None
    shape: tuple[int, ...] = (batch, kv_heads, keys)
    if page_size := case.options.get("page_size"):
        pages = -(-keys // page_size)
        table = torch.randperm(batch * pages, device=device).int().view(batch, pages)
        shape = (batch * pages, kv_heads, page_size)
    return Problem(device, (make(batch, heads, queries), make(*shape), make(*shape), lengths, table))


def cost(case: Case) -> Cost:
    batch, heads, kv_heads, queries, keys, dim = sizes(case)
    elements = 2 * batch * dim * (heads * queries + kv_heads * keys)
    return Cost(bytes=elements * case.torch_dtype.itemsize, flops=4 * batch * heads * queries * keys * dim)


def ours(case: Case):
    return lambda q, k, v, lengths, table: F.decode_attention(q, k, v, lengths, page_table=table)


def eager(case: Case):
    _, _, _, queries, keys, _ = sizes(case)

    def run(q, k, v, lengths, table):
        if table is not None:
            k, v = (c[table].transpose(1, 2).flatten(2, 3)[:, :, :keys] for c in (k, v))
        mask = None
        if queries > 1:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        return TF.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    return run


PROVIDERS = {
    "ours": timed(ours),
    **peers(eager),
    "triton": on_backend("triton", OP, ours),
    "cuda": on_backend("cuda", OP, ours),
}
