"""Attention's Hopper kernels against float64: emulated, or on a GPU of compute capability 9.0.

What they share with the other family (arguments, options, numerics) test_attention_cuda.py has; the calls here are
those in which these kernels differ: asynchronous copies and products, tiles of 128, tensors read through TMA maps,
blocks that take turns at dq.
"""

import pytest
import torch

from fastformer.backends.attention_options import Options
from fastformer.backends.cuda import attention
from fastformer.backends.reference import attention as reference
from tests.cuda.orders import MODES, running, set_completion
from tests.cuda.test_attention_cuda import (  # noqa: F401  guarded: outputs between margins
    BF16,
    F16,
    IDS,
    OPTIONS,
    PACKED,
    PACKED_OPTIONS,
    doubled,
    guarded,
    inputs,
    on,
    randn,
)
from tests.numerics import assert_close_to_fp64

SHAPES = [  # B, Hq, Hkv, Sq, Sk, D, Dv
    (1, 1, 1, 1, 1, 8, 8),  # one score
    (1, 2, 2, 200, 300, 64, 64),  # several tiles, none whole at the end
    (1, 1, 1, 300, 200, 128, 128),  # more queries than keys: under a causal mask the first see nothing
    (2, 4, 2, 129, 257, 128, 128),  # one row more than whole tiles; grouped heads
    (1, 3, 1, 64, 128, 72, 40),  # whole tiles, head dimensions between the buckets, one head for all
    (1, 2, 1, 140, 200, 96, 128),  # v wider than q and k
    (1, 4, 2, 201, 329, 96, 96),  # a panel and a half; grouped heads, one row more than whole tiles and a few
    (1, 2, 2, 70, 130, 96, 72),  # v narrower, in the same bucket
    (1, 1, 1, 130, 150, 256, 256),  # the widest: only forward is of this family
    (2, 1, 1, 5, 0, 64, 64),  # no keys
    (2, 1, 1, 0, 5, 64, 64),  # no queries
]


@pytest.fixture(autouse=True)
def hopper(guarded, device, monkeypatch):  # noqa: F811
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("another GPU than Hopper runs the other family")
    monkeypatch.setenv("FASTFORMER_CUDA_FAMILY", "sm90")
    yield
    if device == "cpu":
        set_completion("at_once")


def check(q, k, v, dout, dlse, options):
    """Forward and the gradients of q, k and v; those of a bias are the other family's, with all others of that call."""
    ours, theirs = attention.forward(q, k, v, options), reference.forward(q, k, v, options)
    exact_options = Options(*doubled(options))
    exact = reference.forward(*doubled((q, k, v)), exact_options)
    mine = attention.backward(dout, dlse, q, k, v, *ours, options)[:3]
    other = reference.backward(dout, dlse, q, k, v, *theirs, options)[:3]
    true = reference.backward(*doubled((dout, dlse, q, k, v)), *exact, exact_options)[:3]
    names = ("out", "lse", "dq", "dk", "dv")
    for name, *three in zip(names, (*ours, *mine), (*theirs, *other), (*exact, *true), strict=True):
        assert_close_to_fp64(name, *three)


def test_these_kernels_run(device, monkeypatch):
    """The two families round differently, so equal bits would mean that one of them ran twice."""
    if device == "cuda":
        pytest.skip("a GPU has one family")
    q, k, v, dout, dlse = inputs((1, 1, 1, 150, 200, 64, 64), BF16, device)
    options = Options(0.125)

    def run():
        ours = attention.forward(q, k, v, options)
        return [*ours, *attention.backward(dout, dlse, q, k, v, *ours, options)[:3]]

    here = run()
    monkeypatch.setenv("FASTFORMER_CUDA_FAMILY", "sm80")
    there = run()
    assert not torch.equal(here[1], there[1]) and not torch.equal(here[2], there[2])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", IDS, ids=IDS.get)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_attention(shape, dtype, causal, device):
    check(*inputs(shape, dtype, device), Options(shape[5] ** -0.5, causal))


@pytest.mark.parametrize("window", [(70, -1), (-1, 30), (70, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("top_left", [False, True], ids=["ends", "starts"])
def test_windows(window, top_left, device):
    """Each side alone, both, the diagonal: blocks are skipped on both sides, and take turns in either order."""
    options = Options(0.125, top_left=top_left, window_left=window[0], window_right=window[1])
    check(*inputs((1, 2, 1, 300, 400, 64, 64), BF16, device), options)


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dim, device):
    options = Options(**{"scale": dim**-0.5, **on(device, OPTIONS[name])})
    check(*inputs((2, 2, 2, 70, 150, dim, dim), BF16, device), options)


def test_everything_in_256_columns(device):
    given = on(device, OPTIONS["everything"])
    check(*inputs((2, 2, 1, 70, 150, 256, 256), BF16, device), Options(0.06, **given))


@pytest.mark.parametrize("name", PACKED_OPTIONS)
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_packed_sequences(dim, name, device):
    lengths = PACKED[0]
    ends = [torch.tensor([0, *values]).cumsum(0).to(torch.int32).to(device) for values in lengths]
    tensors = inputs((1, 4, 2, int(ends[0][-1]), int(ends[1][-1]), dim, dim), BF16, device)
    options = Options(dim**-0.5, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], max_seqlen_q=max(lengths[0]))
    options = options._replace(max_seqlen_k=max(lengths[1]), **on(device, PACKED_OPTIONS[name]))
    check(*tensors, options)


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_a_neighbour_in_the_pack_is_never_used(dim, device):
    """Tiles reach into the next sequence; its NaN stays there."""
    ends = torch.tensor([0, 140, 185], dtype=torch.int32, device=device)
    q, k, v, dout, dlse = inputs((1, 2, 1, 185, 185, dim, dim), BF16, device)
    for t in (q, k, v, dout):
        t[:, :, 140:] = float("nan")
    options = Options(0.1, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=140, max_seqlen_k=140)
    ours = attention.forward(q, k, v, options)
    gradients = attention.backward(dout, dlse, q, k, v, *ours, options)
    for t in (*ours, *gradients[:3]):
        assert t[:, :, :140].isfinite().all() and t[:, :, 140:].isnan().all()


def test_broadcast_tensors(device):
    """Stride 0 between batches and between heads, of which TMA maps know nothing."""
    q, k, v, dout, dlse = inputs((2, 4, 2, 140, 150, 64, 64), BF16, device)
    check(q[:1].expand(2, 4, 140, 64), k[:, :1].expand(2, 2, 150, 64), v[:1, :1].expand(2, 2, 150, 64), dout, dlse,
          Options(0.125, True))  # fmt: skip
    check(q, k, v, dout[:, :, :1].expand(2, 4, 140, 64), dlse, Options(0.125))  # between positions: the other family's


@pytest.mark.parametrize("dim", [96, 128])
@pytest.mark.parametrize("name", ["plain", "everything", "packed"])
def test_any_order_of_threads(name, dim, device):
    """Bit for bit what the first order gave, whenever copies land and products finish: blocks take turns at dq."""
    if device != "cpu":
        pytest.skip("a GPU chooses its own order")
    dtype = F16 if name == "everything" else BF16
    q, k, v, dout, dlse = inputs((1, 2, 1, 150, 280, dim, dim), dtype, device)
    options = Options(0.1, causal=True)
    if name == "everything":
        options = options._replace(softcap=3.0, alibi_slopes=randn(1, 2).abs(), dropout_p=0.2, seed=7)
        options = options._replace(window_left=200, bias=randn(1, 2, 150, 280))
    if name == "packed":
        ends = [torch.tensor(e, dtype=torch.int32) for e in ([0, 40, 150], [0, 140, 280])]
        options = options._replace(cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], max_seqlen_q=110, max_seqlen_k=140)

    def run():
        ours = attention.forward(q, k, v, options)
        return [*ours, *attention.backward(dout, dlse, q, k, v, *ours, options)[:3]]

    expected = run()
    for mode in MODES[1:]:
        with running(*mode):
            for part, (ours, first) in enumerate(zip(run(), expected, strict=True)):
                assert torch.equal(ours, first), (*mode, part)


def test_gradients_repeat(device):
    """The same bits every time, with more blocks of keys than one wave has."""
    if device != "cuda":
        pytest.skip("emulated blocks run one after another")
    q, k, v, dout, dlse = inputs((2, 8, 8, 2048, 4096, 128, 128), BF16, device)
    for options in (Options(0.1), Options(0.1, True), Options(0.1, window_left=500)):
        ours = attention.forward(q, k, v, options)
        first = attention.backward(dout, dlse, q, k, v, *ours, options)
        for _ in range(5):
            again = attention.backward(dout, dlse, q, k, v, *ours, options)
            assert all(torch.equal(a, b) for a, b in zip(again[:3], first[:3], strict=True))
