"""fastformer.functional.decode_attention and update_kv_cache against attention written out in float64."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import fastformer
from fastformer import functional as F
from tests.numerics import assert_close_to_fp64

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = ["cpu", "reference"]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    """(B, Hq, Hkv, Sq, capacity, D, Dv)"""
    page_size: int = 0
    options: dict = field(default_factory=dict)
    indexed: bool = False
    leftpad: bool = False
    alibi: bool = False


CASES = {
    "one element": Case((1, 1, 1, 1, 1, 1, 1)),
    "one new token": Case((3, 4, 4, 1, 300, 64, 64)),
    "several parts to merge, grouped heads": Case((2, 8, 2, 1, 1500, 64, 64)),  # parts of 512 keys, one much shorter
    "tails of every vector": Case((2, 6, 2, 3, 131, 41, 23)),
    "more queries than a block of rows": Case((1, 12, 1, 7, 90, 16, 16)),
    "more queries than keys": Case((2, 2, 2, 9, 5, 8, 8)),  # the first ones see nothing
    "not causal": Case((2, 4, 2, 3, 70, 32, 48), options={"causal": False}),
    "largest head": Case((1, 4, 2, 2, 90, 256, 256), options={"scale": -0.2}),
    "pages": Case((3, 4, 2, 2, 200, 40, 40), page_size=16),
    "pages of an odd size": Case((2, 2, 1, 1, 100, 64, 64), page_size=7),
    "window": Case((2, 4, 2, 5, 700, 32, 32), options={"window": (40, -1)}),  # skips whole parts
    "window on both sides": Case((2, 4, 2, 5, 60, 32, 32), options={"window": (9, 2), "causal": False}),
    "softcap": Case((2, 4, 2, 2, 150, 32, 32), options={"softcap": 2.0}),
    "alibi": Case((2, 4, 2, 2, 150, 32, 32), alibi=True),
    "rows of the cache, left padding": Case((3, 4, 2, 2, 150, 32, 32), indexed=True, leftpad=True),
    "everything in pages": Case(
        (2, 4, 2, 3, 90, 24, 40), 8, {"window": (50, 3), "softcap": 3.0, "causal": False}, leftpad=True, alibi=True
    ),
}


def inputs(case: Case, dtype: torch.dtype, seed: int = 1) -> tuple[list[Tensor], dict]:
    """(q, k_cache, v_cache, cache_seqlens) and the keyword arguments. What lies outside of the sequences is NaN."""
    batch, heads, heads_kv, queries, capacity, d, dv = case.shape
    g = torch.Generator().manual_seed(seed)
    normal = lambda *s: torch.randn(s, generator=g).to(dtype)  # noqa: E731
    kwargs = dict(case.options)
    lengths = torch.randint(0, capacity + 1, (batch,), generator=g).int()
    lengths[0] = capacity
    begins = [0] * batch
    if case.leftpad:
        begins = [int(n) // 3 for n in lengths]
        kwargs["cache_leftpad"] = torch.tensor(begins, dtype=torch.int32)
    rows = torch.randperm(batch + 2, generator=g)[:batch].int() if case.indexed else torch.arange(batch).int()
    # Positions outside of the heads for k and inside for v: both layouts that occur, in one call.
    if case.page_size:
        n = -(-capacity // case.page_size)
        table = torch.randperm(batch * n + 3, generator=g)[: batch * n].view(batch, n).int()
        kwargs["page_table"] = table
        k = torch.full((batch * n + 3, heads_kv, case.page_size, d), float("nan"), dtype=dtype)
        v = torch.full((batch * n + 3, case.page_size, heads_kv, dv), float("nan"), dtype=dtype).transpose(1, 2)
    else:
        k = torch.full((batch + 2, heads_kv, capacity, d), float("nan"), dtype=dtype)
        v = torch.full((batch + 2, capacity, heads_kv, dv), float("nan"), dtype=dtype).transpose(1, 2)
        if case.indexed:
            kwargs["cache_batch_idx"] = rows
    for b in range(batch):
        for j in range(begins[b], int(lengths[b])):
            row, at = (table[b, j // case.page_size], j % case.page_size) if case.page_size else (rows[b], j)
            k[row, :, at], v[row, :, at] = normal(heads_kv, d), normal(heads_kv, dv)
    if case.page_size:  # what is behind a sequence's end is nobody's business
        for b in range(batch):
            table[b, -(-int(lengths[b]) // case.page_size) :] = -7
    if case.alibi:
        kwargs["alibi_slopes"] = torch.rand(batch, heads, generator=g)
    return [normal(batch, queries, heads, d).transpose(1, 2), k, v, lengths], kwargs


def written_out(q, k_cache, v_cache, lengths, **kw) -> tuple[Tensor, Tensor]:
    """The definition, one query at a time, in the dtype of the arguments; lse in float32 or better."""
    batch, heads, queries, d = q.shape
    out = torch.zeros(batch, heads, queries, v_cache.shape[3], dtype=q.dtype)
    lse = torch.full((batch, heads, queries), float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
    left, right = kw.get("window", (-1, -1))
    scale = kw.get("scale", d**-0.5)
    for b in range(batch):
        length = int(lengths[b])
        for i in range(queries):
            p = length - queries + i
            first = int(kw["cache_leftpad"][b]) if "cache_leftpad" in kw else 0
            keys = [
                j
                for j in range(first, length)
                if (j <= p or not kw.get("causal", True))
                and (left < 0 or j >= p - left)
                and (right < 0 or j <= p + right)
            ]
            if not keys:
                continue
            j = torch.tensor(keys)
            if "page_table" in kw:
                size = k_cache.shape[2]
                row, at = kw["page_table"][b].long()[j // size], j % size
            else:
                row, at = torch.full_like(j, int(kw["cache_batch_idx"][b]) if "cache_batch_idx" in kw else b), j
            k, v = (c[row, :, at].repeat_interleave(heads // c.shape[1], 1) for c in (k_cache, v_cache))
            s = torch.einsum("hd,nhd->hn", q[b, :, i], k) * scale
            if kw.get("softcap"):
                s = kw["softcap"] * torch.tanh(s / kw["softcap"])
            if "alibi_slopes" in kw:
                s = s - (kw["alibi_slopes"][b].double()[:, None] * (j - p).abs()).to(s.dtype)
            lse[b, :, i] = torch.logsumexp(s.to(lse.dtype), 1)
            out[b, :, i] = torch.einsum("hn,nhd->hd", torch.softmax(s, 1), v)
    return out, lse


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CASES)
def test_output_and_log_sum_exp(name, dtype, backend):
    check(CASES[name], dtype, backend)


def check(case, dtype, backend):
    tensors, kwargs = inputs(case, dtype)
    exact = written_out(*(t.double() if t.is_floating_point() else t for t in tensors), **kwargs)
    same = written_out(*tensors, **kwargs)
    with fastformer.backend(backend):
        out, lse = F.decode_attention(*tensors, **kwargs, return_lse=True)
    assert out.transpose(1, 2).is_contiguous()
    assert_close_to_fp64("out", out, same[0], exact[0])
    # Scores are sums of D products before they are exponents: of size 4, where lse may be close to 0.
    assert_close_to_fp64("lse", lse, same[1], exact[1], scale=4.0)


@pytest.mark.parametrize("kernels", ["_C generic", "_C avx2", "_C avx512", "_C_wide avx512"])
def test_every_instruction_set(kernels, monkeypatch):
    """The AVX-512 kernels as they are where the CPU can, and everywhere compiled to AVX2 instructions."""
    module_name, isa = kernels.split()
    try:
        module = importlib.import_module(f"fastformer.{module_name}")
    except ImportError:
        pytest.skip(f"fastformer.{module_name} is not built (make test builds it)")
    before = module.cpu_isa()
    try:
        module.set_cpu_isa(isa)
    except NotImplementedError:
        pytest.skip(f"this CPU cannot run {isa}")
    monkeypatch.setattr(importlib.import_module("fastformer.backends.cpu.decode_attention"), "_C", module)
    try:
        for name in ("tails of every vector", "several parts to merge, grouped heads", "everything in pages"):
            for dtype in DTYPES:
                check(CASES[name], dtype, "cpu")
        for head_dim in range(1, 67):  # past two of the widest vectors of floats: whole ones, tails, and none of them
            check(Case((1, 3, 1, 1, 6, head_dim, 67 - head_dim)), torch.float32, "cpu")
            check(Case((1, 4, 1, 1, 5, head_dim, 67 - head_dim)), torch.bfloat16, "cpu")
    finally:
        module.set_cpu_isa(before)


def test_a_query_that_sees_no_key_gives_zeros():
    tensors, _ = inputs(Case((3, 2, 2, 4, 6, 8, 8)), torch.float32)
    tensors[3] = torch.tensor([0, 2, 6], dtype=torch.int32)
    tensors[1][:], tensors[2][:] = 1.0, 1.0
    out, lse = F.decode_attention(*tensors, return_lse=True)
    assert (out[0] == 0).all() and torch.isneginf(lse[0]).all()
    assert (out[1, :, :2] == 0).all() and torch.isneginf(lse[1, :, :2]).all() and (out[1, :, 2:] == 1).all()
    assert F.decode_attention(tensors[0][:, :, :0], *tensors[1:]).shape == (3, 2, 0, 8)
    assert F.decode_attention(tensors[0][:0], *tensors[1:3], tensors[3][:0]).shape == (0, 2, 4, 8)


def test_the_batch_and_the_threads_change_no_bit():
    case = Case((5, 8, 2, 2, 1300, 32, 32))
    (q, k, v, lengths), _ = inputs(case, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(F.decode_attention(q, k, v, lengths))
    finally:
        torch.set_num_threads(before)
    alone = [F.decode_attention(q[b : b + 1], k[b:], v[b:], lengths[b : b + 1]) for b in range(5)]
    assert all(torch.equal(results[0], r) for r in (*results[1:], torch.cat(alone)))


def test_pages_and_rows_of_the_same_keys_give_the_same_bits():
    (q, k, v, lengths), kwargs = inputs(Case((2, 4, 2, 2, 640, 32, 32), page_size=128), torch.float32)
    table = kwargs["page_table"].clamp(min=0).long()
    rows = [c[table].transpose(1, 2).flatten(2, 3) for c in (k, v)]
    assert torch.equal(F.decode_attention(q, k, v, lengths, **kwargs), F.decode_attention(q, *rows, lengths))


def test_it_is_attention_of_the_valid_keys():
    (q, k, v, _), _ = inputs(Case((2, 4, 2, 3, 40, 16, 16)), torch.float64)
    k[:], v[:] = torch.randn_like(k), torch.randn_like(v)
    ours = F.decode_attention(q, k, v, torch.tensor([31, 31], dtype=torch.int32))
    torch.testing.assert_close(ours, F.attention(q, k[:2, :, :31], v[:2, :, :31], causal=True))


def test_a_nan_among_the_keys_stays_visible():
    (q, k, v, lengths), _ = inputs(Case((2, 2, 2, 1, 30, 8, 8)), torch.float32)
    lengths[:] = 30
    k[:], v[:] = torch.randn_like(k), torch.randn_like(v)
    k[1, 0, 3, 2] = float("nan")
    out = F.decode_attention(q, k, v, lengths)
    assert out[1, 0].isnan().all() and out[0].isfinite().all() and out[1, 1].isfinite().all()


def test_large_scores_do_not_overflow():
    q, k = torch.full((1, 1, 1, 8), 300.0), torch.full((1, 1, 600, 8), 300.0)
    v = torch.randn(1, 1, 600, 8)
    ours = F.decode_attention(q, k, v, torch.tensor([600], dtype=torch.int32))
    torch.testing.assert_close(ours, v.mean(2, keepdim=True))


# ---- update_kv_cache -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["rows", "indexed", "pages"])
def test_new_keys_are_written_where_they_are_read(where):
    g = torch.Generator().manual_seed(3)
    lengths, new, kwargs = torch.tensor([0, 5, 7], dtype=torch.int32), 3, {}
    if where == "pages":
        kwargs["page_table"] = torch.tensor([[6, -1, -1], [2, 4, -1], [0, 5, 1]], dtype=torch.int32)
        shape = (7, 2, 4)
    else:
        shape = (5, 2, 10)
        if where == "indexed":
            kwargs["cache_batch_idx"] = torch.tensor([4, 1, 0], dtype=torch.int32)
    k, v = torch.randn(*shape, 6, generator=g), torch.randn(*shape, 9, generator=g)
    k_new, v_new = torch.randn(3, 2, new, 6, generator=g), torch.randn(3, 2, new, 9, generator=g)
    expected = [k.clone(), v.clone()]
    for b in range(3):
        for i in range(new):
            j = int(lengths[b]) + i
            if where == "pages":
                row, at = int(kwargs["page_table"][b, j // 4]), j % 4
            else:
                row, at = (int(kwargs["cache_batch_idx"][b]) if where == "indexed" else b), j
            expected[0][row, :, at], expected[1][row, :, at] = k_new[b, :, i], v_new[b, :, i]
    assert F.update_kv_cache(k, v, k_new, v_new, lengths, **kwargs) is None
    assert torch.equal(k, expected[0]) and torch.equal(v, expected[1])
    assert lengths.tolist() == [0, 5, 7]


def test_token_by_token_is_causal_attention():
    """A whole generation: each step appends one token and attends; together they are one causal attention."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 20, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
    k_cache, v_cache = torch.empty(2, 2, 24, 16), torch.empty(2, 2, 24, 16)
    lengths, steps = torch.zeros(2, dtype=torch.int32), []
    for t in range(20):
        F.update_kv_cache(k_cache, v_cache, k[:, :, t : t + 1], v[:, :, t : t + 1], lengths)
        lengths += 1
        steps.append(F.decode_attention(q[:, :, t : t + 1], k_cache, v_cache, lengths))
    torch.testing.assert_close(torch.cat(steps, 2), F.attention(q, k, v, causal=True))


BAD_UPDATES = {
    r"cache_seqlens: 8 of sequence 1 is not in \[0, 7\] \(there is room for 10, and 3 are new\)": {
        "cache_seqlens": torch.tensor([0, 8], dtype=torch.int32)
    },
    "v_new: shape": {"v_new": torch.zeros(2, 2, 3, 5)},
    "k_new: 1 heads": {"k_new": torch.zeros(2, 1, 3, 4)},
    "k_cache: dtype": {"k_cache": torch.zeros(2, 2, 10, 4).half()},
    r"cache_batch_idx: row 2 of sequence 0 is not in \[0, 2\)": {
        "cache_batch_idx": torch.tensor([2, 0], dtype=torch.int32)
    },
    r"page_table: page -1 of sequence 0 is not in \[0, 2\)": {"page_table": torch.tensor([[-1], [0]]).int()},
    "cache_seqlens: expected an int32 tensor": {"cache_seqlens": torch.tensor([0, 8])},
}


@pytest.mark.parametrize("message", BAD_UPDATES)
def test_a_bad_update_names_the_argument_and_writes_nothing(message):
    arguments = {
        "k_cache": torch.zeros(2, 2, 10, 4),
        "v_cache": torch.zeros(2, 2, 10, 4),
        "k_new": torch.ones(2, 2, 3, 4),
        "v_new": torch.ones(2, 2, 3, 4),
        "cache_seqlens": torch.tensor([0, 7], dtype=torch.int32),
    } | BAD_UPDATES[message]
    with pytest.raises((TypeError, ValueError), match=message):
        F.update_kv_cache(**arguments)
    assert not arguments["k_cache"].any() and not arguments["v_cache"].any()


# ---- bad input -------------------------------------------------------------------------------------------------------

INT = {"dtype": torch.int32}
# The message, and what is put in the place of good arguments (B 2, Hq 4, Hkv 2, D 8; 3 rows of 10 keys).
BAD = {
    "q: expected a torch.Tensor": {"q": 3},
    r"q: shape \(2, 1, 8\) is not": {"q": torch.zeros(2, 1, 8)},
    "q: dtype torch.int64 is not one of": {"q": torch.zeros(2, 4, 1, 8).long()},
    "k_cache: dtype": {"k_cache": torch.zeros(3, 2, 10, 8).double()},
    "k_cache: head_dim 4 is not q's 8": {"k_cache": torch.zeros(3, 2, 10, 4)},
    "k_cache: its last dimension has stride": {"k_cache": torch.zeros(3, 2, 8, 10).transpose(2, 3)},
    "k_cache: 1 rows are fewer than q's batch 2": {
        "k_cache": torch.zeros(1, 2, 10, 8),
        "v_cache": torch.zeros(1, 2, 10, 8),
    },
    "v_cache: shape": {"v_cache": torch.zeros(3, 2, 9, 8)},
    "k_cache: 3 heads do not divide q's 4": {
        "k_cache": torch.zeros(3, 3, 10, 8),
        "v_cache": torch.zeros(3, 3, 10, 8),
    },
    "cache_seqlens: expected an int32 tensor": {"cache_seqlens": torch.tensor([1, 2])},
    "cache_seqlens: shape": {"cache_seqlens": torch.tensor([1], **INT)},
    r"cache_seqlens: 11 of sequence 1 is not in \[0, 10\]": {"cache_seqlens": torch.tensor([1, 11], **INT)},
    r"cache_seqlens: -1 of sequence 0 is not in \[0, 10\]": {"cache_seqlens": torch.tensor([-1, 1], **INT)},
    r"cache_leftpad: 6 of sequence 1 is not in \[0, 5\]": {"cache_leftpad": torch.tensor([0, 6], **INT)},
    r"cache_batch_idx: row 3 of sequence 1 is not in \[0, 3\)": {"cache_batch_idx": torch.tensor([0, 3], **INT)},
    r"page_table: page 3 of sequence 1 is not in \[0, 3\)": {"page_table": torch.tensor([[0], [3]], **INT)},
    "page_table: shape": {"page_table": torch.tensor([0, 1], **INT)},
    "page_table: expected an int32 tensor": {"page_table": torch.tensor([[0], [1]])},
    "cache_batch_idx: cannot be set together with page_table": {
        "page_table": torch.tensor([[0], [1]], **INT),
        "cache_batch_idx": torch.tensor([0, 1], **INT),
    },
    "alibi_slopes: shape": {"alibi_slopes": torch.ones(3)},
    "window": {"window": (-2, 0)},
    "softcap": {"softcap": -1.0},
    "q: requires a gradient": {"q": torch.zeros(2, 4, 1, 8, requires_grad=True)},
    "v_cache: requires a gradient": {"v_cache": torch.zeros(3, 2, 10, 8, requires_grad=True)},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message, backend):
    arguments = {
        "q": torch.zeros(2, 4, 1, 8),
        "k_cache": torch.zeros(3, 2, 10, 8),
        "v_cache": torch.zeros(3, 2, 10, 8),
        "cache_seqlens": torch.tensor([3, 5], **INT),
    } | BAD[message]
    with fastformer.backend(backend), pytest.raises((TypeError, ValueError), match=message):
        F.decode_attention(**arguments)


def test_no_gradient_is_asked_for_under_no_grad():
    q = torch.zeros(2, 4, 1, 8, requires_grad=True)
    with torch.no_grad():
        out = F.decode_attention(q, *(torch.zeros(2, 2, 4, 8),) * 2, torch.tensor([3, 4], **INT))
    assert not out.requires_grad


# ---- as an operator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pages", "rows of the cache, left padding", "alibi"])
def test_operator_passes_torchs_own_checks(name):
    (q, k, v, lengths), kwargs = inputs(CASES[name], torch.float32)
    tensors = [kwargs.get(n) for n in ("alibi_slopes", "page_table", "cache_batch_idx", "cache_leftpad")]
    torch.library.opcheck(
        torch.ops.fastformer.decode_attention.default, (q, k.nan_to_num(), v, lengths, 0.2, True, -1, -1, 0.0, *tensors)
    )


def test_a_step_of_generation_compiles_to_one_graph():
    q, k_new = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8)
    lengths = torch.tensor([3, 5], dtype=torch.int32)

    def step(q, k_new, cache, lengths):
        F.update_kv_cache(cache, cache, k_new, k_new, lengths)
        return F.decode_attention(q * 2, cache, cache, lengths + 1).sin()

    caches = [torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    expected = step(q, k_new, caches[0], lengths)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k_new, caches[1], lengths), expected)
    assert torch.equal(*caches)
