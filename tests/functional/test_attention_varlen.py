"""attention_varlen: every packed sequence as if it were alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import fastformer
from fastformer import functional as F
from tests.attention_formula import attention_formula
from tests.numerics import assert_close_to_fp64

DTYPES = [torch.float32, torch.bfloat16, torch.float64]

# Lengths of queries and of keys, sequence by sequence.
LENGTHS = {
    "one sequence": ([37], [37]),
    "of many lengths": ([5, 1, 64, 130, 17], [5, 1, 64, 130, 17]),
    "empty ones at the beginning, inside and at the end": ([0, 7, 0, 50, 0], [0, 7, 0, 50, 0]),
    "queries without keys, keys without queries": ([4, 0, 9], [0, 6, 100]),
    "other lengths of keys": ([3, 60, 20], [90, 10, 21]),
    "all empty": ([0, 0], [0, 0]),
    "no sequence": ([], []),
}
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window, ALiBi": {"window": (9, 4), "alibi_slopes": torch.tensor([0.5, 0.1, 0.2, 0.0])},
    "T5's bias, softcap": {"relative_bias": (torch.randn(8, 4), True, 8, 20), "softcap": 3.0},
}


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(lengths, dtype):
    g = torch.Generator().manual_seed(0)
    make = lambda n, h, d: torch.randn(n, h, d, generator=g).to(dtype).requires_grad_()  # noqa: E731
    q, k, v = make(sum(lengths[0]), 4, 16), make(sum(lengths[1]), 2, 16), make(sum(lengths[1]), 2, 24)
    return [q, k, v], torch.randn(sum(lengths[0]), 4, 24, generator=g).to(dtype)


def one_by_one(q, k, v, cu_q, cu_k, **options):
    outs, lses = [v.sum() * q.new_zeros(0, q.shape[1], v.shape[2])], [q.new_zeros(q.shape[1], 0)]
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k)):
        alone = [t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d])]
        out, lse = attention_formula(*alone, return_lse=True, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def results(function, tensors, cu, dout, options):
    leaves = [t.detach().to(dout.dtype).requires_grad_() for t in tensors]
    options = dict(options)
    if "relative_bias" in options:
        table, *rest = options["relative_bias"]
        leaves.append(table.to(dout.dtype).requires_grad_())
        options["relative_bias"] = (leaves[3], *rest)
    out, lse = function(*leaves[:3], *cu, **options)
    # allow_unused: written out, a table that no sequence used has no gradient at all
    grads = torch.autograd.grad(out, leaves, dout, allow_unused=True)
    return [out.detach(), lse.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves))]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_sequence_is_alone(options, lengths, dtype, backend):
    tensors, dout = packed(lengths, dtype)
    cu = [ends(n) for n in lengths]
    exact = results(one_by_one, tensors, cu, dout.double(), options)
    theirs = results(one_by_one, tensors, cu, dout, options)
    with fastformer.backend(backend):
        ours = results(lambda *a, **o: F.attention_varlen(*a, return_lse=True, **o), tensors, cu, dout, options)
    for name, o, t, e in zip(("out", "lse", "dq", "dk", "dv", "dtable"), ours, theirs, exact):
        if o.numel():
            assert_close_to_fp64(name, o, t.to(o.dtype), e, scale=16.0)


def test_documents_do_not_see_each_other():
    tensors, _ = packed(LENGTHS["of many lengths"], torch.float32)
    cu = ends(LENGTHS["of many lengths"][0])
    before = F.attention_varlen(*tensors, cu, cu)
    with torch.no_grad():
        for t in tensors:
            t[6:70] = float("nan")  # the third document
    after = F.attention_varlen(*tensors, cu, cu)
    assert torch.equal(before[:6], after[:6]) and torch.equal(before[70:], after[70:])
    assert after[6:70].isnan().all()


def test_dropout_numbers_rows_by_packed_position():
    from fastformer.backends import attention_options, cpu, reference  # noqa: F401
    from fastformer.backends.cpu import attention as kernels
    from fastformer.backends.reference import attention as oracle

    (q, k, v), _ = packed(LENGTHS["other lengths of keys"], torch.float32)
    cu_q, cu_k = (ends(n) for n in LENGTHS["other lengths of keys"])
    options = attention_options.Options(
        0.25, dropout_p=0.4, seed=7, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=60, max_seqlen_k=90
    )
    arguments = [t.detach().transpose(0, 1)[None] for t in (q, k, v)]
    torch.testing.assert_close(kernels.forward(*arguments, options)[0], oracle.forward(*arguments, options)[0])


def test_gradcheck():
    tensors, _ = packed(([3, 0, 4], [2, 3, 5]), torch.double)
    cu = ends([3, 0, 4]), ends([2, 3, 5])

    def function(q, k, v):
        return F.attention_varlen(q, k, v, *cu, causal=True, softcap=2.0, return_lse=False)

    assert torch.autograd.gradcheck(function, tensors)


def test_compiles_to_one_graph():
    tensors, dout = packed(([3, 4], [2, 5]), torch.float32)
    cu = ends([3, 4]), ends([2, 5])

    def function(q, k, v):
        return F.attention_varlen(q * 2, k, v, *cu, 4, 5, causal=True).sin()

    def run(f):
        out = f(*tensors)
        return [out.detach(), *torch.autograd.grad(out, tensors, dout)]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, wanted in zip(run(compiled), run(function), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_the_values_are_looked_at_again_when_they_change():
    (q, k, v), _ = packed(([3, 4], [3, 4]), torch.float32)
    cu = ends([3, 4])
    F.attention_varlen(q, k, v, cu, cu)
    cu[1] = 9
    with pytest.raises(ValueError, match="cu_seqlens_q: decreases from 9 to 7 at index 2"):
        F.attention_varlen(q, k, v, cu, cu)


Q, KV = torch.zeros(7, 4, 8), torch.zeros(9, 2, 8)
CU_Q, CU_K = ends([3, 4]), ends([4, 5])
BAD = {
    r"q: shape \(1, 7, 4, 8\) is not \(total, H, D\)": ((Q[None], KV, KV, CU_Q, CU_K), {}),
    "k: dtype": ((Q, KV.double(), KV, CU_Q, CU_K), {}),
    "v: positions and heads": ((Q, KV, KV[:8], CU_Q, CU_K), {}),
    "k: 3 heads do not divide q's 4": ((Q, torch.zeros(9, 3, 8), torch.zeros(9, 3, 8), CU_Q, CU_K), {}),
    "q: head_dim 300": ((torch.zeros(7, 4, 300), KV, KV, CU_Q, CU_K), {}),
    "cu_seqlens_q: expected an int32 tensor, got torch.int64": ((Q, KV, KV, CU_Q.long(), CU_K), {}),
    "cu_seqlens_q: shape": ((Q, KV, KV, CU_Q[None], CU_K), {}),
    "cu_seqlens_k: decreases from 6 to 4 at index 2": (
        (Q, KV, KV, torch.tensor([0, 1, 3, 7], dtype=torch.int32), torch.tensor([0, 6, 4, 9], dtype=torch.int32)),
        {},
    ),
    "cu_seqlens_q: begins with 1, not 0": ((Q, KV, KV, torch.tensor([1, 7], dtype=torch.int32), CU_K), {}),
    "cu_seqlens_k: ends with 8, not with k's 9": ((Q, KV, KV, CU_Q, ends([4, 4])), {}),
    "cu_seqlens_k: 2 entries, but cu_seqlens_q has 3": ((Q, KV, KV, CU_Q, ends([9])), {}),
    "max_seqlen_q: 3 is less than the longest sequence, 4": ((Q, KV, KV, CU_Q, CU_K, 3, 5), {}),
    r"window: \(0, -3\)": ((Q, KV, KV, CU_Q, CU_K), {"window": (0, -3)}),
    "alibi_slopes: shape": ((Q, KV, KV, CU_Q, CU_K), {"alibi_slopes": torch.zeros(3, 4)}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    arguments, options = BAD[message]
    with pytest.raises((TypeError, ValueError), match=message):
        F.attention_varlen(*arguments, **options)
