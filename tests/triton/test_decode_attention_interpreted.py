"""The decode_attention kernels against the float64 reference: on a GPU, or in the interpreter (see conftest.py)."""

import pytest
import torch

from fastformer.backends.attention_options import DecodeOptions
from fastformer.backends.reference import decode_attention as reference
from fastformer.backends.triton import decode_attention

from .accuracy import check, double

PLAIN = (True, -1, -1, 0.0)  # causal, window_left, window_right, softcap

# name -> (B, Hq, Hkv, Sq, capacity, D, Dv), page size, (causal, window_left, window_right, softcap), what else there is
CASES = {
    "one element": ((1, 1, 1, 1, 1, 1, 1), 0, PLAIN, ()),
    "one new token": ((2, 4, 2, 1, 150, 64, 64), 0, PLAIN, ()),
    "two blocks of rows, tails": ((1, 12, 1, 7, 90, 41, 23), 0, PLAIN, ("rows", "leftpad")),
    "more queries than keys": ((2, 2, 2, 9, 5, 8, 8), 0, PLAIN, ()),  # the first ones see nothing
    "pages": ((2, 6, 2, 2, 100, 80, 128), 16, PLAIN, ()),
    "windows": ((2, 4, 2, 5, 140, 32, 32), 0, (False, 30, 2, 0.0), ()),
    "left window": ((1, 4, 2, 3, 140, 16, 16), 7, (True, 20, -1, 0.0), ()),
    "everything": ((2, 6, 6, 3, 100, 17, 33), 8, (False, 60, 3, 3.0), ("alibi", "leftpad")),
    "largest head": ((1, 2, 2, 2, 40, 256, 256), 0, (False, -1, -1, 0.0), ("alibi",)),
}


@pytest.fixture(params=[1, 2, 4])
def splits(request, monkeypatch):
    """The number of parts that a sequence's keys are cut into."""
    monkeypatch.setattr(decode_attention, "splits_for", lambda programs, capacity, device: request.param)
    return request.param


def inputs(case, dtype, device):
    (batch, heads, heads_kv, queries, capacity, d, dv), page_size, options, more = case
    g = torch.Generator().manual_seed(0)
    normal = lambda *s: torch.randn(s, generator=g).to(device, dtype)  # noqa: E731
    table = rows = leftpad = slopes = None
    if page_size:
        n = -(-capacity // page_size)
        k, v = normal(batch * n + 3, heads_kv, page_size, d), normal(batch * n + 3, page_size, heads_kv, dv)
        table = torch.randperm(batch * n + 3, generator=g)[: batch * n].view(batch, n).int().to(device)
    else:
        k, v = normal(batch + 2, heads_kv, capacity, d), normal(batch + 2, capacity, heads_kv, dv)
    lengths = torch.randint(0, capacity + 1, (batch,), generator=g).int()
    lengths[0] = capacity
    if "rows" in more:
        rows = torch.randperm(batch + 2, generator=g)[:batch].int().to(device)
    if "leftpad" in more:
        leftpad = (lengths // 3).to(device)
    if "alibi" in more:
        slopes = torch.rand(batch, heads, generator=g).to(device)
    q = normal(batch, queries, heads, d).transpose(1, 2)  # as a projection leaves it
    lengths = lengths.to(device)
    return q, k, v.transpose(1, 2), lengths, DecodeOptions(0.9 / d**0.5, *options, slopes, table, rows, leftpad)


def check_case(arguments):
    slopes = arguments[4].alibi_slopes
    exact = reference.forward(*double(*arguments[:3]), *arguments[3:])
    rounded = reference.forward(*arguments)
    ours = decode_attention.forward(*arguments)
    check("out", ours[0], rounded[0], exact[0])
    check("lse", ours[1], rounded[1], exact[1], summand=torch.tensor(4.0 if slopes is None else 64.0))
    assert ours[0].transpose(1, 2).is_contiguous(), "out must lie in memory as (B, Sq, Hq, Dv)"


@pytest.mark.parametrize("name", CASES)
def test_decode_float32(name, splits, device):
    check_case(inputs(CASES[name], torch.float32, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["one new token", "pages", "everything"])
def test_decode_half_precision(name, dtype, device):
    check_case(inputs(CASES[name], dtype, device))


def test_a_sequence_without_keys_gives_zeros(splits, device):
    q, k, v, lengths, options = inputs(CASES["one new token"], torch.float32, device)
    out, lse = decode_attention.forward(q, k, v, torch.zeros_like(lengths), options)
    assert (out == 0).all() and (lse == float("-inf")).all()


def test_what_is_out_of_range_gives_nan_and_only_there(splits, device):
    # The interpreter would fault on a read outside of the tensors.
    q, k, v, lengths, options = inputs(CASES["one new token"], torch.float32, device)
    for bad in (-1, 151, 2**31 - 1):
        out, lse = decode_attention.forward(q, k, v, torch.tensor([20, bad]).int().to(device), options)
        assert out[0].isfinite().all() and out[1].isnan().all() and lse[1].isnan().all()
    options = options._replace(cache_batch_idx=torch.tensor([1, 7]).int().to(device))  # of 4 rows
    out, lse = decode_attention.forward(q, k, v, lengths, options)
    assert out[0].isfinite().all() and out[1].isnan().all() and lse[1].isnan().all()

    q, k, v, lengths, options = inputs(CASES["pages"], torch.float32, device)
    lengths = torch.full_like(lengths, 90)
    options.page_table[0, 6:], options.page_table[1, 2] = 10**6, 10**6  # behind the end, and within
    out, lse = decode_attention.forward(q, k, v, lengths, options)
    assert out[0].isfinite().all() and out[1].isnan().all() and lse[1].isnan().all()


def test_the_number_of_parts():
    device = torch.device("cpu")  # counts as a device with 3 programs to reduce over
    assert decode_attention.splits_for(1, 10**6, device) == 8
    assert decode_attention.splits_for(1, 600, device) == 2  # not less than 256 keys each
    assert decode_attention.splits_for(100, 10**6, device) == 1
    assert decode_attention.splits_for(1, 0, device) == 1
