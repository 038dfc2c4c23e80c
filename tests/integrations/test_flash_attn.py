"""fastformer.integrations.flash_attn against the package's documented semantics, written out here in plain torch."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from fastformer.integrations import flash_attn as fa
from tests.numerics import assert_close_to_fp64


def definition(q, k, v, *, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None):
    """(Sq, H, D), (Sk, Hkv, D) of one sequence -> out (Sq, H, D) and lse (H, Sq), one query and head at a time."""
    sq, heads, d = q.shape
    sk, heads_kv = k.shape[:2]
    out, lse = torch.zeros_like(q), q.new_full((heads, sq), float("-inf"))
    for h in range(heads):
        kv = h // (heads // heads_kv)
        for i in range(sq):
            p = i + sk - sq
            seen = [
                j
                for j in range(sk)
                if not (causal and j > p)
                and not (window[0] >= 0 and j < p - window[0])
                and not (window[1] >= 0 and j > p + window[1])
            ]
            if not seen:
                continue
            s = (k[seen, kv] @ q[i, h]) * (d**-0.5 if scale is None else scale)
            if softcap > 0:
                s = softcap * torch.tanh(s / softcap)
            if slopes is not None:
                s = s - slopes[h].to(s.dtype) * (torch.tensor(seen) - p).abs()
            lse[h, i] = torch.logsumexp(s, 0)
            out[i, h] = torch.softmax(s, 0) @ v[seen, kv]
    return out, lse


def batched(q, k, v, slopes=None, **options):
    """The same of (B, S, H, D); slopes (H) or (B, H)."""
    rows = [None if slopes is None else slopes if slopes.dim() == 1 else slopes[b] for b in range(len(q))]
    results = [definition(q[b], k[b], v[b], slopes=rows[b], **options) for b in range(len(q))]
    return tuple(torch.stack(r) for r in zip(*results, strict=True))


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def check_with_gradients(ours, wanted, leaves):
    """Values and the gradients of every leaf, in float64."""
    upstream = normal(*wanted.shape, seed=9)
    torch.testing.assert_close(ours.detach(), wanted.detach(), rtol=1e-10, atol=1e-12)
    mine, theirs = (torch.autograd.grad(x, leaves, upstream, retain_graph=True) for x in (ours, wanted))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# options of ours, and of the definition
OPTIONS = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "scale": ({"softmax_scale": 0.3}, {"scale": 0.3}),
    "window": ({"window_size": (3, 1)}, {"window": (3, 1)}),
    "causal window": ({"window_size": (4, -1), "causal": True}, {"window": (4, 0), "causal": True}),
    "softcap": ({"softcap": 1.5}, {"softcap": 1.5}),
    "softcap below 0 is none": ({"softcap": -1.0}, {}),
    "alibi": (
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0]), "causal": True},
        {"slopes": torch.tensor([0.5, 0.25, 0.125, 1.0]), "causal": True},
    ),
}
SHAPES = {  # (B, Sq, Sk, Hq, Hkv, D)
    "square": (2, 6, 6, 4, 4, 8),
    "fewer queries, grouped heads": (2, 2, 5, 4, 2, 8),
    "more queries, some see nothing": (1, 5, 2, 4, 1, 16),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_func(name, shape):
    ours, theirs = OPTIONS[name]
    b, sq, sk, hq, hkv, d = SHAPES[shape]
    q, k, v = normal(b, sq, hq, d), normal(b, sk, hkv, d, seed=1), normal(b, sk, hkv, d, seed=2)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    wanted, wanted_lse = batched(q, k, v, **theirs)
    _, lse, probabilities = fa.flash_attn_func(q, k, v, **ours, return_attn_probs=True)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-10, atol=1e-12)
    assert probabilities is None
    check_with_gradients(fa.flash_attn_func(q, k, v, **ours), wanted, leaves)
    kv = torch.stack((k, v), 2)
    check_with_gradients(fa.flash_attn_kvpacked_func(q, kv, **ours, deterministic=True), wanted, leaves)
    if sq == sk and hq == hkv:
        qkv = torch.stack((q, k, v), 2)
        check_with_gradients(fa.flash_attn_qkvpacked_func(qkv, **ours), wanted, leaves)
        assert torch.equal(fa.flash_attn_qkvpacked_func(qkv, **ours, return_attn_probs=True)[1], lse)


def test_alibi_slopes_of_each_sequence():
    q, slopes = normal(2, 5, 4, 8), torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fa.flash_attn_func(q, q, q, alibi_slopes=slopes), batched(q, q, q, slopes)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_every_dtype(dtype):
    q, k, v = (normal(2, 40, h, 64, seed=s, dtype=dtype) for s, h in enumerate((4, 2, 2)))
    exact, same = batched(*(t.double() for t in (q, k, v)), causal=True), batched(q, k, v, causal=True)
    assert_close_to_fp64("out", fa.flash_attn_func(q, k, v, causal=True), same[0], exact[0])


def test_dropout_repeats_with_the_seed_and_keeps_the_mean():
    q = normal(1, 32, 2, 8, dtype=torch.float32)
    v = torch.ones_like(q)
    torch.manual_seed(5)
    first = fa.flash_attn_func(q, q, v, dropout_p=0.4)
    torch.manual_seed(5)
    assert torch.equal(first, fa.flash_attn_func(q, q, v, 0.4))  # by place, as in the package
    assert not torch.equal(first, v) and abs(first.mean().item() - 1) < 0.1


# ---- packed sequences ------------------------------------------------------------------------------------------------

LENGTHS = {"q": [4, 0, 1, 6], "k": [5, 3, 1, 4]}  # an empty one, more keys than queries and fewer


def ends(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("name", OPTIONS)
def test_varlen(name):
    ours, theirs = OPTIONS[name]
    q, k, v = normal(11, 4, 8), normal(13, 2, 8, seed=1), normal(13, 2, 8, seed=2)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    cu_q, cu_k = ends(LENGTHS["q"]), ends(LENGTHS["k"])
    parts = [
        definition(q[cu_q[n] : cu_q[n + 1]], k[cu_k[n] : cu_k[n + 1]], v[cu_k[n] : cu_k[n + 1]], **theirs)
        for n in range(4)
    ]
    wanted, wanted_lse = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], 1)
    bounds = (cu_q, cu_k, 6, 5)
    out, lse, _ = fa.flash_attn_varlen_func(q, k, v, *bounds, **ours, return_attn_probs=True)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-10, atol=1e-12)
    check_with_gradients(out, wanted, leaves)
    check_with_gradients(fa.flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), *bounds, **ours), wanted, leaves)


@pytest.mark.parametrize("name", OPTIONS)
def test_varlen_qkvpacked(name):
    ours, theirs = OPTIONS[name]
    qkv, cu = normal(11, 3, 4, 8).requires_grad_(), ends(LENGTHS["q"])
    parts = [definition(*qkv[cu[n] : cu[n + 1]].unbind(1), **theirs)[0] for n in range(4)]
    check_with_gradients(fa.flash_attn_varlen_qkvpacked_func(qkv, cu, 6, **ours), torch.cat(parts), [qkv])


def test_varlen_with_pages():
    q, cu_q, cu_k = normal(11, 4, 8), ends(LENGTHS["q"]), ends(LENGTHS["k"])
    pages_k, pages_v = normal(9, 2, 2, 8, seed=1), normal(9, 2, 2, 8, seed=2)
    table = torch.tensor([[8, 0, 3], [1, 5, -1], [7, -1, -1], [2, 6, -1]], dtype=torch.int32)
    parts = []
    for n, length in enumerate(LENGTHS["k"]):
        k, v = (torch.stack([p[table[n, j // 2], j % 2] for j in range(length)]) for p in (pages_k, pages_v))
        parts.append(definition(q[cu_q[n] : cu_q[n + 1]], k, v, causal=True)[0])
    ours = fa.flash_attn_varlen_func(q, pages_k, pages_v, cu_q, cu_k, 6, 5, causal=True, block_table=table)
    torch.testing.assert_close(ours, torch.cat(parts), rtol=1e-10, atol=1e-12)
    table[0, 2] = 9
    with pytest.raises(ValueError, match="block_table: a page in use"):
        fa.flash_attn_varlen_func(q, pages_k, pages_v, cu_q, cu_k, 6, 5, block_table=table)


# ---- with a cache ----------------------------------------------------------------------------------------------------


def rotated(x: Tensor, position: int, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """(H, D) turned by the angles of one position, pair by pair."""
    x, half = x.clone(), cos.shape[1]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        c, s, first, second = cos[position, i], sin[position, i], x[:, a].clone(), x[:, b].clone()
        x[:, a], x[:, b] = first * c - second * s, first * s + second * c
    return x


# name -> (queries, new keys, options, where the keys are)
KVCACHE = {
    "no new keys": (1, 0, {}, "rows"),
    "one token": (1, 1, {"causal": True}, "rows"),
    "one length for all": (2, 2, {"causal": True}, "one length"),
    "the whole cache": (3, 0, {}, "whole"),
    "several tokens": (3, 3, {"causal": True}, "rows"),
    "not causal": (3, 3, {}, "rows"),
    "more queries than new keys": (4, 2, {"causal": True}, "rows"),
    "window, softcap": (3, 3, {"window_size": (4, 1), "softcap": 2.0}, "rows"),
    "alibi": (2, 2, {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])}, "rows"),
    "other rows": (2, 2, {"causal": True}, "indexed"),
    "left padding": (2, 2, {"causal": True}, "leftpad"),
    "pages": (2, 2, {"causal": True}, "pages"),
}


# Rotation goes only together with new keys.
TURNED = [
    (name, how) for name, (_, new, *_) in KVCACHE.items() for how in ("", "interleaved", "halves") if new or not how
]


@pytest.mark.parametrize(("name", "rotary"), TURNED)
def test_kvcache(name, rotary):
    queries, new, options, where = KVCACHE[name]
    batch, capacity, kwargs = 3, 12, dict(options)
    q, k, v = normal(batch, queries, 4, 16), normal(batch, new, 2, 16, seed=1), normal(batch, new, 2, 16, seed=2)
    lengths, begins, rows = [0, 5, 9], [0, 0, 0], [0, 1, 2]
    if where == "pages":
        k_cache, v_cache = normal(11, 4, 2, 16, seed=3), normal(11, 4, 2, 16, seed=4)
        table = torch.tensor([[9, 4, 0], [2, 6, 8], [1, 10, 3]], dtype=torch.int32)
        kwargs["block_table"] = table
        place = lambda b, j: (int(table[b, j // 4]), j % 4)  # noqa: E731
    else:
        k_cache, v_cache = normal(4, capacity, 2, 16, seed=3), normal(4, capacity, 2, 16, seed=4)
        if where == "indexed":
            rows = [3, 0, 2]
            kwargs["cache_batch_idx"] = torch.tensor(rows, dtype=torch.int32)
        if where == "leftpad":
            begins = [0, 2, 9]
            kwargs["cache_leftpad"] = torch.tensor(begins, dtype=torch.int32)
        place = lambda b, j: (rows[b], j)  # noqa: E731
    kwargs["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    if where == "one length":
        lengths, kwargs["cache_seqlens"] = [7] * batch, 7
    if where == "whole":
        lengths = [capacity] * batch
        del kwargs["cache_seqlens"]
    if rotary:
        angle = torch.rand(capacity + 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 6
        cos, sin = angle.cos(), angle.sin()  # 10 of 16 dimensions turn
        kwargs |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": rotary == "interleaved"}

    window, local = options.get("window_size", (-1, -1)), "causal" in options or "window_size" in options
    expected_k, expected_v, outs, lses = k_cache.clone(), v_cache.clone(), [], []
    for b in range(batch):
        turned = q[b].clone()
        for i in range(queries if rotary else 0):
            turned[i] = rotated(q[b, i], lengths[b] + (i if local else 0), cos, sin, rotary == "interleaved")
        for i in range(new):
            j = lengths[b] + i
            expected_k[place(b, j)] = rotated(k[b, i], j, cos, sin, rotary == "interleaved") if rotary else k[b, i]
            expected_v[place(b, j)] = v[b, i]
        keys = range(begins[b], lengths[b] + new)
        own = [
            torch.stack([c[place(b, j)] for j in keys]) if keys else q.new_empty(0, 2, 16)
            for c in (expected_k, expected_v)
        ]
        more = {"causal": options.get("causal", False), "window": window, "softcap": options.get("softcap", 0.0)}
        out, lse = definition(turned, *own, **more, slopes=options.get("alibi_slopes"))
        outs.append(out), lses.append(lse)
    fresh = {"k": k, "v": v} if new else {}
    out, lse = fa.flash_attn_with_kvcache(q, k_cache, v_cache, **fresh, **kwargs, return_softmax_lse=True)
    torch.testing.assert_close(k_cache, expected_k, rtol=1e-12, atol=1e-12)
    assert torch.equal(v_cache, expected_v)
    torch.testing.assert_close(out, torch.stack(outs), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, torch.stack(lses), rtol=1e-10, atol=1e-12)
    if isinstance(kwargs.get("cache_seqlens"), Tensor):
        assert kwargs["cache_seqlens"].tolist() == lengths  # the caller's own count is left alone


def test_a_long_prompt_takes_the_other_kernel_and_gives_the_same(monkeypatch):
    q, k, v = normal(2, 40, 4, 8), normal(2, 40, 2, 8, seed=1), normal(2, 40, 2, 8, seed=2)
    results, calls = [], []
    decode = fa.decode_attention
    monkeypatch.setattr(fa, "decode_attention", lambda *a, **kw: calls.append(1) or decode(*a, **kw))
    for start in (3, torch.tensor([3, 3], dtype=torch.int32)):
        caches = [normal(3, 50, 2, 8, seed=s) for s in (3, 4)]
        results.append(fa.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=start, causal=True))
    assert len(calls) == 1
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    caches = [torch.cat((normal(3, 50, 2, 8, seed=s)[:2, :3], t), 1) for s, t in ((3, k), (4, v))]
    torch.testing.assert_close(results[0], batched(q, *caches, causal=True)[0], rtol=1e-10, atol=1e-12)


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "cache_seqlens: 9 of sequence 0": {"cache_seqlens": 9},
    "cache_seqlens: 11 is not in": {"cache_seqlens": 11},
    "cache_seqlens: has to be given": {"cache_seqlens": None},
    "v: has to be given together with k": {"v": None},
    "rotary_cos: has 10 positions, but k needs 11": {
        "rotary_cos": torch.ones(10, 4),
        "rotary_sin": torch.ones(10, 4),
        "cache_seqlens": 9,
    },
    "rotary_cos, rotary_sin: have to be given together": {"rotary_cos": torch.ones(20, 4)},
    "rotary_cos: rotates 10 dimensions, but k has 8": {
        "rotary_cos": torch.ones(20, 5),
        "rotary_sin": torch.ones(20, 5),
    },
    r"q: shape \(2, 8\) is not \(batch, seqlen": {"q": torch.zeros(2, 8)},
    "k_cache: requires a gradient": {"k_cache": torch.zeros(2, 10, 2, 8, requires_grad=True)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    arguments = {
        "q": torch.zeros(2, 2, 4, 8),
        "k_cache": torch.zeros(2, 10, 2, 8),
        "v_cache": torch.zeros(2, 10, 2, 8),
        "k": torch.ones(2, 2, 2, 8),
        "v": torch.ones(2, 2, 2, 8),
        "cache_seqlens": 3,
    } | BAD[message]
    with pytest.raises((TypeError, ValueError), match=message):
        fa.flash_attn_with_kvcache(**arguments)
    assert not arguments["k_cache"].any() and not arguments["v_cache"].any()


def test_bad_packing_names_the_argument():
    with pytest.raises(ValueError, match=r"qkv: shape .* is not \(batch, seqlen, 3"):
        fa.flash_attn_qkvpacked_func(torch.zeros(2, 5, 2, 4, 8))
    with pytest.raises(ValueError, match=r"kv: shape .* is not \(total, 2"):
        fa.flash_attn_varlen_kvpacked_func(torch.zeros(5, 4, 8), torch.zeros(5, 3, 4, 8), None, None, 5, 5)


# Positions of the arguments in the package's 2.x releases; calls by place must mean the same here.
TAIL = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic"]
TAIL += ["return_attn_probs"]
BOUNDS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
SIGNATURES = {
    "flash_attn_func": ["q", "k", "v", *TAIL],
    "flash_attn_qkvpacked_func": ["qkv", *TAIL],
    "flash_attn_kvpacked_func": ["q", "kv", *TAIL],
    "flash_attn_varlen_func": ["q", "k", "v", *BOUNDS, *TAIL, "block_table"],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *TAIL],
    "flash_attn_varlen_kvpacked_func": ["q", "kv", *BOUNDS, *TAIL],
    "flash_attn_with_kvcache": [
        *("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx"),
        *("cache_leftpad", "block_table", "softmax_scale", "causal", "window_size", "softcap", "rotary_interleaved"),
        *("alibi_slopes", "num_splits", "return_softmax_lse"),
    ],
}


def test_signatures():
    assert set(SIGNATURES) == set(fa.__all__)
    assert {name: list(inspect.signature(getattr(fa, name)).parameters) for name in SIGNATURES} == SIGNATURES
