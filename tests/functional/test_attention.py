"""fastformer.functional.attention against float64, and the promises around it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastformer
from fastformer import functional as F
from tests.nn.comparison import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = ["cpu", "reference"]

# (B, Hq, Hkv, Sq, Sk, D, Dv)
SHAPES = {
    "one element": (1, 1, 1, 1, 1, 1, 1),
    "a GPT block": (2, 4, 4, 64, 64, 32, 32),
    "tails of every tile": (1, 2, 2, 97, 131, 40, 24),
    "more keys than queries, grouped heads": (2, 4, 2, 7, 300, 80, 128),
    "more queries than keys: some see nothing when causal": (1, 3, 3, 200, 100, 16, 72),
    "multi-query, largest head": (1, 3, 1, 50, 49, 256, 256),
    "one head, so two threads share it": (1, 1, 1, 500, 500, 64, 64),
}


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    """Attention written out in the dtype of its arguments."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        visible = visible.tril(k.shape[2] - q.shape[2])
    visible = visible.expand_as(scores)
    if mask is not None:
        visible = visible & ~mask[:, None, None, :]
    scores = scores.masked_fill(~visible, float("-inf"))
    none = ~visible.any(3, keepdim=True)
    return torch.softmax(scores.masked_fill(none, 0.0), 3).masked_fill(none, 0.0) @ v


def inputs(shape: tuple[int, ...], dtype: torch.dtype, mask: bool) -> tuple[list[Tensor], Tensor | None]:
    b, hq, hkv, sq, sk, d, dv = shape
    g = torch.Generator().manual_seed(1)
    # Heads inside the positions for q and v, outside for k: both layouts that occur, in one call.
    q = torch.randn(b, sq, hq, d, generator=g).transpose(1, 2)
    k = torch.randn(b, hkv, sk, d, generator=g)
    v = torch.randn(b, sk, hkv, dv, generator=g).transpose(1, 2)
    padding = None
    if mask:
        padding = torch.rand(b, sk, generator=g) < 0.4
        padding[0] = True  # a text of nothing but padding
    return [t.to(dtype) for t in (q, k, v)], padding


def run(function, tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "padded"])
def test_output_and_gradients(backend, dtype, name, causal, masked):
    shape = SHAPES[name]
    (q, k, v), mask = inputs(shape, dtype, masked)
    scale = shape[5] ** -0.5
    upstream = torch.randn(*q.shape[:3], shape[6], generator=torch.Generator().manual_seed(2))
    wanted = run(lambda *t: exact(*t, scale, causal, mask), [t.double() for t in (q, k, v)], upstream)
    same = run(lambda *t: exact(*t, scale, causal, mask), [q, k, v], upstream)
    with fastformer.backend(backend):
        ours = run(lambda *t: F.attention(*t, causal=causal, key_padding_mask=mask), [q, k, v], upstream)
    for label, o, s, w in zip(("out", "dq", "dk", "dv"), ours, same, wanted, strict=True):
        assert not o.isnan().any(), label
        assert_as_accurate(label, o, s, w)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_nothing_gives_zeros(backend):
    q, k, v = (torch.randn(2, 2, 5, 8, requires_grad=True) for _ in range(3))
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1] = True
    with fastformer.backend(backend):
        out, lse = F.attention(q, k, v, key_padding_mask=mask, return_lse=True)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert (out[1] == 0).all() and torch.isneginf(lse[1]).all()
    assert all((g[1] == 0).all() for g in grads)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_keys_and_no_queries(backend):
    with fastformer.backend(backend):
        q = torch.randn(1, 2, 3, 4, requires_grad=True)
        empty = torch.randn(1, 2, 0, 4, requires_grad=True)
        out = F.attention(q, empty, empty)
        assert out.shape == (1, 2, 3, 4) and (out == 0).all()
        assert (torch.autograd.grad(out.sum(), q)[0] == 0).all()
        out = F.attention(empty, q, q)
        assert out.shape == (1, 2, 0, 4)
        assert (torch.autograd.grad(out.sum(), q)[0] == 0).all()


def test_log_sum_exp_is_right_and_differentiable():
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def both(q, k, v):
        return F.attention(q, k, v, causal=True, return_lse=True)

    scores = (q @ k.transpose(2, 3) / 2).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), float("-inf"))
    torch.testing.assert_close(both(q, k, v)[1], scores.logsumexp(3))
    assert torch.autograd.gradcheck(both, (q, k, v))


@pytest.mark.parametrize("shape", [(1, 2, 1, 5, 7, 3, 4), (2, 2, 2, 4, 3, 2, 2)], ids=["grouped", "more queries"])
def test_gradcheck(shape):
    (q, k, v), mask = inputs(shape, torch.float64, True)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *t: F.attention(*t, causal=True, scale=0.7, key_padding_mask=mask), leaves)


@pytest.mark.parametrize("biased", [False, True])
def test_packed_is_the_same_attention(biased):
    qkv, table = torch.randn(2, 37, 3, 4, 16, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    upstream = torch.randn(2, 37, 4, 16)
    options = {"relative_bias": (table, False, 8, 20), "scale": 1.0} if biased else {}
    leaves = (qkv, table) if biased else (qkv,)
    out = F.attention_qkvpacked(qkv, causal=True, **options)
    grads = torch.autograd.grad(out, leaves, upstream)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    separate = F.attention(q, k, v, causal=True, **options).transpose(1, 2)
    wanted = torch.autograd.grad(separate, leaves, upstream)
    assert out.is_contiguous() and grads[0].is_contiguous()
    assert torch.equal(out, separate) and all(map(torch.equal, grads, wanted))


def test_results_repeat_bit_for_bit():
    (q, k, v), mask = inputs(SHAPES["one head, so two threads share it"], torch.float32, False)
    upstream = torch.randn_like(q)
    first = run(lambda *t: F.attention(*t, causal=True, key_padding_mask=mask), [q, k, v], upstream)
    for _ in range(3):
        again = run(lambda *t: F.attention(*t, causal=True, key_padding_mask=mask), [q, k, v], upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_nan_in_the_input_stays_visible():
    q, k, v = (torch.randn(1, 1, 20, 8) for _ in range(3))
    q[0, 0, 3, 0] = float("nan")
    out = F.attention(q, k, v)
    assert out[0, 0, 3].isnan().all() and out[0, 0, :3].isfinite().all() and out[0, 0, 4:].isfinite().all()


def test_large_scores_do_not_overflow():
    q = torch.full((1, 1, 4, 8), 300.0)
    v = torch.randn(1, 1, 4, 8)
    torch.testing.assert_close(F.attention(q, q, v), v.mean(2, keepdim=True).expand_as(v))


BAD = {
    "q: expected a torch.Tensor": lambda q, k, m: (3, k, k, {}),
    "k: dtype": lambda q, k, m: (q, k.double(), k, {}),
    r"q: shape \(2, 5, 8\) is not": lambda q, k, m: (q[:, 0], k, k, {}),
    "q: head_dim 300": lambda q, k, m: (torch.randn(2, 4, 5, 300), torch.randn(2, 2, 6, 300), k, {}),
    "k: head_dim 4 is not q's 8": lambda q, k, m: (q, k[..., :4], k, {}),
    "k: 3 heads do not divide q's 4": lambda q, k, m: (q, torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8), {}),
    "v: heads and length": lambda q, k, m: (q, k, k[:, :, :5], {}),
    "k: batch 1 is not q's 2": lambda q, k, m: (q, k[:1], k[:1], {}),
    "key_padding_mask: shape": lambda q, k, m: (q, k, k, {"key_padding_mask": m[:, :5]}),
    "key_padding_mask: expected a bool tensor": lambda q, k, m: (q, k, k, {"key_padding_mask": m.float()}),
    "q: dtype torch.int64 is not one of": lambda q, k, m: (q.long(), k, k, {}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    q, k, mask = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.zeros(2, 6, dtype=torch.bool)
    *tensors, options = BAD[message](q, k, mask)
    with pytest.raises((TypeError, ValueError), match=message):
        F.attention(*tensors, **options)


def test_operator_passes_torchs_own_checks():
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    mask = torch.zeros(1, 5, dtype=torch.bool)
    torch.library.opcheck(torch.ops.fastformer.attention.default, (q, k, v, 0.5, True, mask))
    out, lse = (t.detach() for t in torch.ops.fastformer.attention(q, k, v, 0.5, True))
    args = [t.detach() for t in (q, k, v)]
    torch.library.opcheck(
        torch.ops.fastformer.attention_backward.default,
        (torch.randn_like(out), None, *args, out, lse, False, False, 0.5, True),
    )


def test_compiles_to_one_graph():
    q, k, v = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))

    def function(q, k, v):
        return F.attention(q * 2, k, v, causal=True).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(1, 2, 9, 4)
    for ours, wanted in zip(run(compiled, [q, k, v], upstream), run(function, [q, k, v], upstream), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_vmap_and_grad_of_torch_func():
    q = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))

    def ours(q):
        return F.attention(q, q, q, causal=True).square().sum()

    def theirs(q):
        return exact(q, q, q, 0.5, True, None).square().sum()

    results = [torch.func.vmap(torch.func.grad(f))(q) for f in (ours, theirs)]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (3, -1), "softcap": 2.0}], ids=["plain", "options"])
def test_tensors_are_read_alike_with_and_without_torchs_table(options):
    from fastformer import _C

    q, k, v = (torch.randn(2, 9, 2, 8).transpose(1, 2).requires_grad_() for _ in range(3))
    bias, mask = torch.randn(1, 2, 1, 9, requires_grad=True), torch.rand(2, 1, 9, 9) < 0.7
    more = {"bias": bias, "attn_mask": mask, "alibi_slopes": torch.rand(2)} if options else {}
    lengths, new, cached = torch.tensor([4, 9], dtype=torch.int32), q.detach()[:, :, :1], k.detach()
    results = []
    try:
        for wanted in (True, False):
            assert _C.use_exchange(wanted) is (wanted and hasattr(Tensor, "__dlpack_c_exchange_api__"))
            out = F.attention(q, k, v, **options, **more)
            leaves = (q, k, v, bias) if options else (q, k, v)
            grads = torch.autograd.grad(out.square().sum(), leaves)
            results.append([out, *grads, F.decode_attention(new, cached, v.detach(), lengths)])
    finally:
        _C.use_exchange(True)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
