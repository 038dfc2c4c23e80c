"""Attention's kernels with bfloat16 products: AVX-512-BF16's and AMX's, and their arithmetic in ``fastformer._C_wide``.

Exact values are the reference's in float64. The peer of the numerics rule is the reference in bfloat16, which computes
in float32 and rounds its results alone: stricter than PyTorch's own kernels, which round probabilities as these do.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastformer
from fastformer import functional as F
from tests.csrc.test_isa import BF16_KERNELS, kernels  # noqa: F401  (the fixture)
from tests.numerics import assert_close_to_fp64

pytestmark = pytest.mark.parametrize("kernels", BF16_KERNELS, indirect=True, ids=lambda k: f"{k[0]} {k[1]}")

PADDING = torch.rand(2, 190, generator=torch.Generator().manual_seed(3)) < 0.4
PADDING[1] = True  # a text of nothing but padding

# (B, Hq, Hkv, Sq, Sk, D, Dv) and options; blocks are 64 queries by 128 keys forward, by 96 backward
CASES: dict[str, tuple[tuple[int, ...], dict]] = {
    "tails of every tile": ((1, 2, 2, 97, 131, 40, 24), {}),
    "a whole block": ((1, 1, 1, 64, 384, 64, 64), {}),
    "causal": ((1, 1, 1, 300, 300, 64, 64), {"causal": True}),
    "causal, more queries than keys": ((1, 3, 3, 200, 100, 16, 72), {"causal": True}),
    "causal, grouped heads, few queries": ((2, 4, 2, 7, 300, 80, 128), {"causal": True}),
    "multi-query, largest head": ((1, 3, 1, 50, 49, 256, 256), {}),
    "odd head dims, a window": ((1, 2, 1, 200, 230, 33, 65), {"window": (40, 3)}),
    "padding": ((2, 2, 2, 150, 190, 65, 31), {"key_padding_mask": PADDING}),
    "dropout, causal": ((1, 2, 1, 200, 230, 33, 65), {"dropout_p": 0.3, "causal": True}),
    "dropout, few keys": ((1, 2, 2, 70, 90, 64, 64), {"dropout_p": 0.3}),
    "bias with its gradient, causal": ((1, 2, 2, 150, 190, 64, 64), {"causal": True, "bias": (1, 2, 150, 190)}),
    "bias for all queries": ((2, 2, 2, 70, 90, 48, 48), {"bias": (1, 2, 1, 90)}),
    "softcap": ((1, 2, 2, 150, 190, 64, 64), {"softcap": 2.0}),
    "softcap and dropout": ((1, 2, 2, 90, 110, 32, 32), {"softcap": 2.0, "dropout_p": 0.2}),
    "ALiBi": ((1, 2, 2, 150, 190, 64, 64), {"alibi_slopes": torch.tensor([0.5, 0.05])}),
    "negative scale": ((1, 2, 2, 70, 130, 20, 20), {"scale": -0.3}),
    "scale 0": ((1, 1, 1, 70, 130, 20, 20), {"scale": 0.0}),
    "sharp probabilities": ((1, 2, 2, 150, 190, 64, 64), {"scale": 1.0}),
}


def _run(function, tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    torch.manual_seed(5)  # the mask of dropout
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def check(shape: tuple[int, ...], options: dict) -> None:
    b, heads, heads_kv, sq, sk, d, dv = shape
    g = torch.Generator().manual_seed(1)
    q = torch.randn(b, sq, heads, d, generator=g).transpose(1, 2)
    k = torch.randn(b, heads_kv, sk, d, generator=g)
    v = torch.randn(b, sk, heads_kv, dv, generator=g).transpose(1, 2)
    tensors = [q, k, v] + ([torch.randn(options["bias"], generator=g)] if "bias" in options else [])
    tensors = [t.bfloat16() for t in tensors]
    upstream = torch.randn(b, heads, sq, dv, generator=g).bfloat16()
    others = {name: value for name, value in options.items() if name != "bias"}

    def attention(q, k, v, bias=None):
        return F.attention(q, k, v, bias=bias, **others)

    ours = _run(attention, tensors, upstream)
    with fastformer.backend("reference"):
        exact = _run(attention, [t.double() for t in tensors], upstream)
        same = _run(attention, tensors, upstream)
    for what, *results in zip(("output", "dq", "dk", "dv", "dbias"), ours, same, exact):
        # with one key, or where all see the same, dq and dk are differences of equal terms
        scale = upstream.abs().max().item() if what in ("dq", "dk") else 0.0
        assert_close_to_fp64(f"{what} of {shape}, {sorted(options)}", *results, scale=scale)


@pytest.mark.parametrize("name", CASES)
def test_numerics(name, kernels):  # noqa: F811
    check(*CASES[name])


def test_every_head_dim(kernels):  # noqa: F811
    for d in (*range(1, 67), 127, 129, 255):
        check((1, 2, 1, 37, 41, d, max(1, 67 - d)), {"causal": d % 2 == 0})


def test_every_number_of_queries_and_keys(kernels):  # noqa: F811
    for n in (*range(1, 35), *range(47, 50), *range(63, 66), *range(95, 98), *range(127, 130)):
        check((1, 1, 1, n, 130 - n // 2, 16, 16), {"causal": True})
        check((1, 1, 1, 70 - n // 2, n, 16, 16), {})


def test_packed_sequences(kernels):  # noqa: F811
    lengths = torch.tensor([5, 0, 97, 33])
    ends = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
    tensors = [torch.randn(135, 2, 40, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(4)]

    def attention(q, k, v):
        return F.attention_varlen(q, k, v, ends, ends, 97, 97, causal=True)

    ours = _run(attention, tensors[:3], tensors[3])
    with fastformer.backend("reference"):
        exact = _run(attention, [t.double() for t in tensors[:3]], tensors[3])
        same = _run(attention, tensors[:3], tensors[3])
    for what, *results in zip(("output", "dq", "dk", "dv"), ours, same, exact, strict=True):
        assert_close_to_fp64(what, *results)


def test_rows_that_see_nothing_and_rows_with_nan(kernels):  # noqa: F811
    q, k, v = (torch.randn(1, 2, 70, 24).bfloat16().requires_grad_() for _ in range(3))
    out, lse = F.attention(q, k[:, :, :40], v[:, :, :40], causal=True, return_lse=True)
    gradients = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert (out[:, :, :30] == 0).all() and torch.isneginf(lse[:, :, :30]).all() and lse[:, :, 30:].isfinite().all()
    assert (gradients[0][:, :, :30] == 0).all() and all(g.isfinite().all() for g in gradients)
    with torch.no_grad():
        q[0, 0, 33, 3] = float("nan")
        out = F.attention(q, k, v)
    assert out[0, 0, 33].isnan().all() and out.isnan().sum() == 24


def test_these_products_are_what_runs_and_they_repeat(kernels):  # noqa: F811
    tensors = [torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(4)]
    torch.set_num_threads(2)  # the fixture sets it back
    run = lambda: _run(lambda q, k, v: F.attention(q, k, v, causal=True), tensors[:3], tensors[3])  # noqa: E731
    results, again, isa = run(), run(), kernels.cpu_isa()
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    kernels.set_cpu_isa("avx512")
    wide = run()
    kernels.set_cpu_isa(isa)
    # probabilities rounded to bfloat16 must show somewhere, and no more than their rounding does
    assert not any(torch.equal(a, b) for a, b in zip(results, wide, strict=True))
    torch.testing.assert_close(results, wide, rtol=0.02, atol=0.02)
