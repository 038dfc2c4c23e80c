"""What attention may add to its scores or hide of them: output and every gradient against the float64 reference.

On a GPU, or in the interpreter (see conftest.py). The plain operation is in test_attention_interpreted.py.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastformer.backends.attention_options import Options
from fastformer.backends.reference import attention as reference
from fastformer.backends.reference.philox import dropout_scales
from fastformer.backends.triton import attention

from .accuracy import check, check_all, double


class Case(NamedTuple):
    shape: tuple[int, ...]
    """(B, Hq, Hkv, Sq, Sk, D, Dv)."""
    options: dict = {}
    """Fields of Options as they are."""
    padding: bool = False
    mask: tuple[int, ...] = ()
    """Its shape without Sk; likewise of bias."""
    bias: tuple[int, ...] = ()
    distances: int | None = None
    """max_distance of the distance bias."""
    slopes: int = 0
    """Lines of the ALiBi slopes."""
    lengths: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """Of packed sequences of queries and of keys; the shape then says 1 for the batch and nothing for Sq and Sk."""


CAUSAL = {"causal": True}
DROPOUT = {"dropout_p": 0.3, "seed": 2**63 + 12345}

CASES = {
    # Tiles are 32 by 32 at most here, in float32.
    "top left": Case((1, 2, 2, 50, 90, 16, 16), {**CAUSAL, "top_left": True}),
    "top left, more queries": Case((1, 1, 1, 90, 50, 16, 16), {**CAUSAL, "top_left": True}),
    "window with whole blocks inside": Case((1, 1, 1, 150, 150, 16, 16), {"window_left": 70, "window_right": 40}),
    "window within one block": Case((1, 2, 1, 70, 100, 16, 24), {"window_left": 3, "window_right": 0}),
    "window, right only": Case((1, 1, 1, 100, 70, 16, 16), {"window_right": 5}),  # the first queries see nothing
    "causal window": Case((1, 1, 1, 100, 130, 16, 16), {**CAUSAL, "window_left": 33, "window_right": 9}),
    "window wider than 32 bits": Case((1, 1, 1, 20, 20, 16, 16), {"window_left": 2**40, "window_right": 2**33}),
    "mask of every score": Case((2, 2, 1, 40, 70, 16, 16), mask=(2, 2, 40)),
    "mask for all queries": Case((2, 2, 2, 40, 70, 16, 16), CAUSAL, mask=(2, 1, 1)),
    "bias of every score": Case((2, 2, 1, 40, 70, 16, 16), bias=(2, 2, 40)),
    "bias for the whole batch": Case((2, 2, 2, 70, 40, 16, 16), CAUSAL, bias=(1, 2, 70)),
    "bias for all heads": Case((2, 3, 3, 40, 40, 16, 16), bias=(2, 1, 40)),
    "bias of keys": Case((2, 3, 1, 70, 40, 16, 16), CAUSAL, bias=(2, 1, 1)),
    "bias of keys for the whole batch": Case((2, 2, 1, 70, 40, 16, 16), DROPOUT, bias=(1, 2, 1)),
    "one row of biases": Case((2, 2, 2, 70, 40, 16, 16), {"window_left": 40}, padding=True, bias=(1, 1, 1)),
    "one matrix of biases": Case((2, 2, 2, 40, 70, 16, 16), {"softcap": 2.0}, bias=(1, 1, 40)),
    "distances": Case((2, 2, 2, 70, 70, 16, 16), distances=20),
    "distances beyond the table's": Case((1, 2, 1, 40, 130, 16, 16), CAUSAL, distances=1),
    "a table for more distances": Case((2, 2, 2, 33, 20, 16, 16), padding=True, distances=50),
    "only one distance": Case((1, 2, 2, 33, 20, 16, 16), distances=0),
    "distances, top left": Case((1, 2, 2, 70, 40, 16, 16), {**DROPOUT, "top_left": True}, distances=16),
    "distances in a window": Case((2, 1, 1, 100, 120, 16, 16), {"window_left": 40, "window_right": 8}, distances=24),
    "slopes": Case((2, 2, 1, 50, 70, 16, 16), CAUSAL, slopes=1),
    "slopes of each sequence": Case((2, 2, 2, 50, 40, 16, 16), {"window_left": 30}, slopes=2),
    "softcap": Case((1, 2, 1, 50, 70, 24, 16), {**CAUSAL, "softcap": 1.5}),
    "dropout": Case((2, 2, 2, 40, 70, 16, 16), DROPOUT),
    "dropout, causal, groups, window": Case((2, 4, 2, 70, 100, 24, 40), {**CAUSAL, **DROPOUT, "window_left": 45}),
    "everything dropped": Case((1, 1, 1, 20, 40, 16, 16), {"dropout_p": 1.0, "seed": 1}),
    "everything at once": Case(
        (2, 2, 1, 40, 70, 24, 40),
        {**CAUSAL, **DROPOUT, "window_left": 30, "softcap": 3.0},
        padding=True,
        mask=(1, 2, 40),
        bias=(2, 1, 40),
        distances=12,
        slopes=2,
    ),
    "packed": Case((1, 2, 1, 0, 0, 16, 24), lengths=((40, 0, 1, 70), (50, 3, 0, 33))),
    "packed, causal": Case((1, 4, 2, 0, 0, 24, 16), {**CAUSAL, **DROPOUT}, lengths=((40, 0, 1, 70), (50, 3, 9, 33))),
    "packed, a window of slopes": Case(
        (1, 2, 2, 0, 0, 16, 16),
        {"window_left": 20, "window_right": 3, "softcap": 2.0},
        slopes=3,
        lengths=((33, 64, 5), (40, 50, 5)),
    ),
    "packed, distances": Case((1, 2, 1, 0, 0, 16, 16), DROPOUT, distances=20, lengths=((40, 0, 70, 1), (61, 8, 33, 0))),
    "packed, nothing there": Case((1, 2, 1, 0, 0, 16, 16), CAUSAL, distances=4, lengths=((0, 0), (0, 0))),
}


def eager(q, k, v, options):
    """The operation as PyTorch code writes it, rounding to q's dtype after every step; 0 where nothing is seen."""
    outs, lses = [], []
    ends = [(0, q.shape[2], 0, k.shape[2])]
    if options.cu_seqlens_q is not None:
        cu_q, cu_k = options.cu_seqlens_q.tolist(), options.cu_seqlens_k.tolist()
        ends = list(zip(cu_q, cu_q[1:], cu_k, cu_k[1:]))
    rows = torch.arange(q.shape[0] * q.shape[1] * q.shape[2], device=q.device).view(q.shape[:3])
    for n, (begin_q, end_q, begin_k, end_k) in enumerate(ends):
        qs = q[:, :, begin_q:end_q]
        ks, vs = (x[:, :, begin_k:end_k].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = qs @ ks.transpose(2, 3) * options.scale
        if options.softcap:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        position = torch.arange(qs.shape[2], device=q.device)
        if not options.top_left:
            position = position + (ks.shape[2] - qs.shape[2])
        distance = torch.arange(ks.shape[2], device=q.device) - position[:, None]
        if options.bias is not None:
            scores = scores + options.bias
        if options.distance_bias is not None:
            most = options.distance_bias.shape[1] // 2
            scores = scores + options.distance_bias[:, distance.clamp(-most, most) + most]
        if options.alibi_slopes is not None:
            slopes = options.alibi_slopes.to(q.dtype)
            if options.cu_seqlens_q is not None and len(slopes) > 1:
                slopes = slopes[n : n + 1]
            scores = scores - slopes[:, :, None, None] * distance.abs()
        visible = torch.ones_like(scores, dtype=torch.bool)
        for hidden in (
            distance > 0 if options.causal else None,
            distance > options.window_right if options.window_right >= 0 else None,
            distance < -options.window_left if options.window_left >= 0 else None,
            None if options.key_padding_mask is None else options.key_padding_mask[:, None, None],
            None if options.mask is None else ~options.mask,
        ):
            visible = visible if hidden is None else visible & ~hidden
        seen = visible.any(3, keepdim=True)
        scores = scores.to(q.dtype).masked_fill(~visible & seen, float("-inf"))
        p = torch.softmax(scores, 3)
        if options.dropout_p:
            part = rows[:, :, begin_q:end_q].flatten()
            p = p * dropout_scales(options.seed, part, ks.shape[2], options.dropout_p, q.device, q.dtype).view_as(p)
        outs.append(torch.where(seen, p @ vs, 0.0))
        lses.append(torch.where(seen[..., 0], torch.logsumexp(scores, 3), 0.0))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def inputs(case: Case, dtype, device) -> tuple[Tensor, Tensor, Tensor, Options, Tensor, Tensor]:
    """q, k, v, options, dout, dlse."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    def chance(p, *shape):
        return (torch.rand(shape, generator=generator) < p).to(device)

    batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v = case.shape
    fields = dict(case.options)
    if case.lengths[0]:
        for name, lengths in zip("qk", case.lengths):
            cu = torch.tensor((0, *lengths)).cumsum(0)
            fields |= {f"cu_seqlens_{name}": cu.to(device, torch.int32), f"max_seqlen_{name}": max(lengths)}
        seqlen_q, seqlen_k = sum(case.lengths[0]), sum(case.lengths[1])
    q = normal(batch, seqlen_q, heads, head_dim).transpose(1, 2)  # as a projection leaves it
    k, v = normal(batch, heads_kv, seqlen_k, head_dim), normal(batch, heads_kv, seqlen_k, head_dim_v)
    if case.padding:
        fields["key_padding_mask"] = chance(0.3, batch, seqlen_k)
        fields["key_padding_mask"][0] = batch > 1  # all of the first sequence, of several
    if case.mask:
        fields["mask"] = chance(0.7, *case.mask, seqlen_k)
        fields["mask"][0, 0, 0] = False  # a query that sees nothing
    if case.bias:
        fields["bias"] = normal(*case.bias, seqlen_k)
    if case.distances is not None:
        fields["distance_bias"] = normal(heads, 2 * case.distances + 1, dtype=torch.float32)
    if case.slopes:
        fields["alibi_slopes"] = normal(case.slopes, heads, dtype=torch.float32).abs() / 4
    options = Options(0.9 / head_dim**0.5, **fields)
    return q, k, v, options, normal(batch, heads, seqlen_q, head_dim_v), normal(*q.shape[:3]).float()


def check_attention(q, k, v, options: Options, dout, dlse):
    exact_inputs = double(q, k, v)
    exact_options = Options(*double(*options))
    exact = reference.forward(*exact_inputs, exact_options)
    ours = attention.forward(q, k, v, options)
    needs = options.bias is not None, options.distance_bias is not None
    leaves = [x if x is None else x.detach().requires_grad_() for x in (q, k, v, options.bias, options.distance_bias)]
    theirs = eager(*leaves[:3], options._replace(bias=leaves[3], distance_bias=leaves[4]))
    check("out", ours[0], theirs[0].detach(), exact[0])
    # Statistics stay in float32 whatever the inputs are, as in the reference.
    check("lse", ours[1], reference.forward(q, k, v, options)[1], exact[1], summand=torch.tensor(4.0))

    gradients = attention.backward(dout, dlse, q, k, v, *ours, options, needs)
    exact_gradients = reference.backward(*double(dout, dlse), *exact_inputs, *exact, exact_options, needs)
    wanted = iter(torch.autograd.grad(theirs, [x for x in leaves if x is not None], (dout, dlse.to(dout.dtype))))
    their_gradients = [None if x is None else next(wanted) for x in leaves]
    for ours_bias, bias in zip(gradients[3:], (options.bias, options.distance_bias)):
        assert (ours_bias is None) == (bias is None)
        assert ours_bias is None or (ours_bias.shape == bias.shape and ours_bias.dtype in (bias.dtype, torch.float32))
    # p = exp(s - lse): half a unit in the last place of the saved lse is that part of every gradient.
    largest_lse = exact[1][exact[1].isfinite()].abs().max() if exact[1].isfinite().any() else torch.tensor(0.0)
    names = "dq dk dv dbias ddistance_bias"
    summands = {n: g * largest_lse.to(g) for n, g in zip(names.split(), exact_gradients) if g is not None}
    in_their_dtype = [x if y is None else x.to(y.dtype) for x, y in zip(gradients, their_gradients)]
    check_all(names, in_their_dtype, their_gradients, exact_gradients, **summands)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_features_float32(case, device):
    check_attention(*inputs(case, torch.float32, device))


# Where half precision is more than another rounding: tiles of another size, biases in a dtype other than float32.
HALF = (
    "causal window",
    "bias for the whole batch",
    "bias of keys",
    "distances, top left",
    "dropout, causal, groups, window",
    "everything at once",
    "packed, causal",
    "packed, distances",
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", HALF)
def test_features_half_precision(name, dtype, device):
    check_attention(*inputs(CASES[name], dtype, device))


def test_float32_bias_with_bfloat16_data(device):
    q, k, v, options, dout, dlse = inputs(CASES["bias for all heads"], torch.bfloat16, device)
    check_attention(q, k, v, options._replace(bias=options.bias.float() + 2**-12), dout, dlse)


def test_mask_and_bias_of_any_stride(device):
    case = Case((2, 2, 1, 40, 70, 16, 16), mask=(1, 2, 1), bias=(2, 1, 40))
    q, k, v, options, dout, _ = inputs(case, torch.float32, device)
    wide = torch.full((*options.bias.shape[:3], 200), float("nan"), device=device)
    wide[..., 100:170] = options.bias
    strided = options._replace(bias=wide[..., 100:170], mask=options.mask.expand(2, 2, 40, 70))
    expected, got = (attention.forward(q, k, v, o) for o in (options, strided))
    assert all(torch.equal(a, b) for a, b in zip(expected, got))
    expected, got = (attention.backward(dout, None, q, k, v, *got, o, (True, False)) for o in (options, strided))
    assert all(torch.equal(a, b) for a, b in zip(expected[:4], got))


@pytest.mark.parametrize("shape", [(2, 2, 40), (2, 1, 1)], ids=["for each query", "of keys"])
def test_infinite_bias_hides_like_a_mask(shape, device):
    # As masks often arrive. The first query, or the first sequence, sees nothing.
    case = Case((2, 2, 2, 40, 70, 16, 16), CAUSAL, mask=shape)
    q, k, v, options, dout, dlse = inputs(case, torch.float32, device)
    bias = torch.zeros_like(options.mask, dtype=torch.float32).masked_fill(~options.mask, float("-inf"))
    biased = options._replace(mask=None, bias=bias)
    expected, got = (attention.forward(q, k, v, o) for o in (options, biased))
    assert all(torch.equal(a, b) for a, b in zip(expected, got))
    expected = attention.backward(dout, dlse, q, k, v, *got, options)
    gradients = attention.backward(dout, dlse, q, k, v, *got, biased, (True, False))
    assert all(torch.equal(a, b) for a, b in zip(expected[:3], gradients[:3]))
    assert gradients.dbias.isfinite().all() and (gradients.dbias[bias.isneginf()] == 0).all()


@pytest.mark.parametrize("name", ["window, right only", "mask of every score", "packed, causal", "everything at once"])
def test_hidden_rows_are_exactly_zero(name, device):
    q, k, v, options, dout, dlse = inputs(CASES[name], torch.float32, device)
    out, lse = attention.forward(q, k, v, options)
    needs = options.bias is not None, options.distance_bias is not None
    gradients = attention.backward(dout, dlse, q, k, v, out, lse, options, needs)
    hidden = reference.forward(q, k, v, options)[1].isneginf()
    assert hidden.any() and not hidden.all()
    assert torch.equal(lse.isneginf(), hidden) and (out[hidden] == 0).all() and (gradients.dq[hidden] == 0).all()
    assert all(g.isfinite().all() for g in (out, *gradients) if g is not None)


@pytest.mark.parametrize("name", ["bias of keys for the whole batch", "packed, distances"])
def test_gradients_repeat_bit_for_bit(name, device):
    q, k, v, options, dout, dlse = inputs(CASES[name], torch.float32, device)
    out, lse = attention.forward(q, k, v, options)
    needs = options.bias is not None, options.distance_bias is not None
    first, second = (attention.backward(dout, dlse, q, k, v, out, lse, options, needs) for _ in range(2))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second))


def test_packed_sequences_are_each_others_strangers(device):
    q, k, v, options, *_ = inputs(CASES["packed, distances"], torch.float32, device)
    out, lse = attention.forward(q, k, v, options._replace(dropout_p=0.0))
    alone = Options(options.scale, distance_bias=options.distance_bias)
    cu_q, cu_k = options.cu_seqlens_q.tolist(), options.cu_seqlens_k.tolist()
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        expected = attention.forward(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], alone)
        torch.testing.assert_close((out[:, :, a:b], lse[:, :, a:b]), expected, rtol=0, atol=0)


def test_gradients_of_biases_take_memory_linear_in_the_sequence(device):
    q = torch.randn(2, 2, 128, 16, generator=torch.Generator().manual_seed(0)).to(device)
    bias = torch.zeros(1, 1, 1, 128, device=device)
    options = Options(0.25, bias=bias, distance_bias=torch.zeros(2, 9, device=device))
    out, lse = attention.forward(q, q, q, options)
    largest = 0
    empty, zeros = torch.empty, torch.zeros

    def watch(make):
        def made(*arguments, **keywords):
            nonlocal largest
            result = make(*arguments, **keywords)
            largest = max(largest, result.numel())
            return result

        return made

    torch.empty, torch.zeros = watch(empty), watch(zeros)
    try:
        attention.backward(q, None, q, q, q, out, lse, options, (True, True))
    finally:
        torch.empty, torch.zeros = empty, zeros
    assert 0 < largest < 128 * 128
