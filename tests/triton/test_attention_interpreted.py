"""The attention kernels against the float64 reference: on a GPU, or in the interpreter (see conftest.py)."""

import pytest
import torch

from fastformer.backends.attention_options import Options
from fastformer.backends.reference import attention as reference
from fastformer.backends.triton import attention

from .accuracy import check, check_all, double

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# name -> (B, Hq, Hkv, Sq, Sk, D, Dv, causal, padding)
CASES = {
    "whole blocks": (1, 1, 1, 128, 128, 16, 16, False, False),
    "one query, one key, one element": (1, 1, 1, 1, 1, 1, 1, False, False),
    "both kinds of key blocks": (1, 2, 2, 150, 150, 32, 32, True, False),  # blocks on, below and above the diagonal
    "more keys than queries": (1, 4, 2, 37, 140, 24, 40, True, True),  # the diagonal starts at key 103; Dv != D; groups
    "more queries than keys": (1, 2, 1, 140, 37, 64, 64, True, False),  # the first 103 queries see nothing
    "one new token": (2, 2, 2, 1, 50, 80, 80, True, True),  # decoding; batch 0 sees nothing at all
    "no keys": (1, 2, 1, 33, 0, 8, 8, False, False),
    "no queries": (1, 1, 1, 0, 20, 8, 8, True, False),  # dk and dv are zeros, not unwritten memory
    "padding everywhere": (2, 3, 1, 70, 70, 48, 48, False, True),
    "largest head": (1, 1, 1, 40, 40, 256, 256, True, False),
    "odd head": (1, 1, 1, 40, 40, 129, 96, True, True),  # unaligned rows, D and Dv in different powers of two
}


def eager(q, k, v, scale, causal, key_padding_mask):
    """Attention as PyTorch code writes it, rounding to the inputs' dtype after every step; 0 where nothing is seen."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    visible = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        visible = visible.tril(k.shape[2] - q.shape[2])
    if key_padding_mask is not None:
        visible = visible & ~key_padding_mask[:, None, None]
    seen = visible.any(3, keepdim=True)
    scores = scores.masked_fill(~visible & seen, float("-inf"))
    out, lse = torch.softmax(scores, 3) @ v, torch.logsumexp(scores, 3)
    return torch.where(seen, out, 0.0), torch.where(seen[..., 0], lse, 0.0)


def inputs(case, dtype, device, seed=0):
    batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v, causal, padding = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    q = normal(batch, seqlen_q, heads, head_dim).transpose(1, 2)  # as a projection leaves it
    k, v = normal(batch, heads_kv, seqlen_k, head_dim), normal(batch, heads_kv, seqlen_k, head_dim_v)
    mask = None
    if padding:
        mask = (torch.rand(batch, seqlen_k, generator=generator) < 0.4).to(device)
        if batch > 1:
            mask[0] = True
    return (q, k, v, Options(0.9 / head_dim**0.5, causal, mask)), normal(batch, heads, seqlen_q, head_dim_v)


def check_attention(arguments, dout, dlse=None):
    exact = reference.forward(*double(*arguments))
    ours = attention.forward(*arguments)
    leaves = [x.detach().requires_grad_() for x in arguments[:3]]
    theirs = eager(*leaves, *arguments[3][:3])
    check("out", ours[0], theirs[0].detach(), exact[0])
    # Statistics stay in float32 whatever the inputs are, as in the reference.
    check("lse", ours[1], reference.forward(*arguments)[1], exact[1], summand=torch.tensor(4.0))
    assert ours[0].transpose(1, 2).is_contiguous(), "out must lie in memory as (B, Sq, Hq, Dv)"

    q, k, v, options = arguments
    gradients = attention.backward(dout, dlse, q, k, v, *ours, options)
    exact_gradients = reference.backward(*double(dout, dlse, q, k, v), *exact, options)
    upstream = dout, torch.zeros_like(theirs[1]) if dlse is None else dlse.to(dout.dtype)
    their_gradients = torch.autograd.grad(theirs, leaves, upstream)
    # The kernel rounds scale log2(e), a constant: all scores are off by one factor, which does not average out, and
    # a score of 8 makes of half a rounding four of its exponential's.
    check_all("dq dk dv", gradients[:3], their_gradients, exact_gradients[:3], roundings=4)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_float32(case, device):
    arguments, dout = inputs(case, torch.float32, device)
    dlse = torch.randn(dout.shape[:3], generator=torch.Generator().manual_seed(1)).to(device)
    check_attention(arguments, dout, dlse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", ["both kinds of key blocks", "more keys than queries", "one new token"])
def test_attention_half_precision(case, dtype, device):
    check_attention(*inputs(CASES[case], dtype, device))


def test_hidden_rows_are_exactly_zero(device):
    (q, k, v, options), dout = inputs(CASES["more queries than keys"], torch.float32, device)
    out, lse = attention.forward(q, k, v, options)
    dq, *_ = attention.backward(dout, torch.full_like(lse, 3.0), q, k, v, out, lse, options)
    assert (out[:, :, :103] == 0).all() and (dq[:, :, :103] == 0).all()
    assert (lse[:, :, :103] == float("-inf")).all() and lse[:, :, 103:].isfinite().all()


def test_large_scores_of_either_sign(device):
    # log-sum-exps of about +-1000: exp2 of an unmasked score minus another row's statistic would overflow.
    (q, k, v, options), dout = inputs(CASES["more keys than queries"], torch.float32, device)
    for scale in (300.0, -300.0):
        options = options._replace(scale=scale)
        out, lse = attention.forward(q, k, v, options)
        exact, exact_lse = reference.forward(*double(q, k, v), options)
        torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=0)
        assert all(g.isfinite().all() for g in attention.backward(dout, None, q, k, v, out, lse, options)[:3])


def test_gradients_into_given_buffers_of_any_stride(device):
    # What a fused projection hands over: q, k, v and their gradients are slices of one (B, S, 3, H, D) tensor each.
    qkv = torch.randn(2, 40, 3, 2, 24, generator=torch.Generator().manual_seed(0)).to(device)
    dqkv = torch.full_like(qkv, float("nan"))
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    dq, dk, dv = (x.transpose(1, 2) for x in dqkv.unbind(2))
    out, lse = attention.forward(q, k, v, Options(0.2, True))
    dout = torch.ones(1, 1, 1, 1, device=device).expand_as(out)  # the gradient of out.sum(): every stride is 0
    returned = attention.backward(dout, None, q, k, v, out, lse, Options(0.2, True), (False, False), dq, dk, dv)
    assert all(a is b for a, b in zip(returned[:3], (dq, dk, dv)))
    expected = attention.backward(
        dout.contiguous(), None, *(x.contiguous() for x in (q, k, v)), out, lse, Options(0.2, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(returned[:3], expected[:3]))


def test_gradients_repeat_bit_for_bit(device):
    (q, k, v, options), dout = inputs(CASES["padding everywhere"], torch.float32, device)
    out, lse = attention.forward(q, k, v, options)
    first, second = (attention.backward(dout, None, q, k, v, out, lse, options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3]))


def test_strides_beyond_32_bits(device):
    # One position may be any distance from the next: offsets inside a block must then be computed in 64 bits. The
    # interpreter raises where an offset, even a masked one, overflows.
    row = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).to(device)
    far = row.as_strided(row.shape, (2**33, 2**33, 2**29, 1))
    out, lse = attention.forward(far, far, far, Options(1.0))
    torch.testing.assert_close(out, row)
    gradients = [torch.empty_like(row).as_strided(row.shape, far.stride()) for _ in range(3)]
    attention.backward(far, None, far, far, far, out, lse, Options(1.0), (False, False), *gradients)
    torch.testing.assert_close(gradients[2], row)  # the only probability is 1
