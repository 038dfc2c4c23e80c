"""decode_attention of csrc/cuda against float64: emulated or on a GPU."""

import pytest
import torch

from fastformer import backend
from fastformer import functional as F
from fastformer.backends.attention_options import DecodeOptions
from fastformer.backends.cuda import decode_attention, emulation
from fastformer.backends.reference import decode_attention as reference
from tests.cuda.orders import MODES, guarded_outputs, running, set_completion
from tests.functional.test_decode_attention import CASES as COMMON
from tests.functional.test_decode_attention import Case, inputs
from tests.numerics import assert_close_to_fp64

BF16, F16 = torch.bfloat16, torch.float16
IDS = {BF16: "bf16", F16: "f16"}
CASES = COMMON | {
    "whole tiles and parts": Case((1, 4, 1, 1, 512, 128, 128)),
    "16 rows, all heads of one": Case((2, 16, 1, 1, 300, 128, 128)),
    "17 rows: another block": Case((1, 17, 1, 1, 70, 64, 64)),
    "head size between two buckets": Case((2, 4, 2, 2, 150, 72, 96)),
    "v narrower": Case((2, 4, 2, 2, 150, 128, 40), page_size=16),
    "pages smaller than a tile": Case((2, 4, 2, 1, 150, 64, 64), page_size=3),
    "most parts without a key": Case((2, 4, 2, 2, 16640, 16, 16), options={"window": (90, -1)}),
    "parts of pages, everything": Case(
        (2, 8, 2, 3, 1200, 256, 256),
        32,
        {"window": (900, 3), "softcap": 3.0, "causal": False},
        leftpad=True,
        alibi=True,
    ),
}


@pytest.fixture(autouse=True)
def guarded(device, monkeypatch):
    with guarded_outputs(monkeypatch, decode_attention):
        yield
    if device == "cpu":
        set_completion("at_once")
        emulation.load().set_multiprocessors(3)


def arguments(case, dtype, device):
    """The backend's arguments."""
    tensors, kw = inputs(case, dtype)
    q, k, v, lengths = (t.to(device) for t in tensors)
    fields = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in kw.items()}
    fields["window_left"], fields["window_right"] = fields.pop("window", (-1, -1))
    return [q, k, v, lengths, DecodeOptions(**{"scale": q.shape[3] ** -0.5} | fields)]


def check(given):
    """out and lse of these arguments."""
    ours, same = decode_attention.forward(*given), reference.forward(*given)
    exact = reference.forward(*(t.double() for t in given[:3]), *given[3:])
    assert_close_to_fp64("out", ours[0], same[0], exact[0])
    # Scores are sums of D products before they are exponents: of size 4 or more, where lse may be close to 0.
    assert_close_to_fp64("lse", ours[1], same[1], exact[1], scale=4.0)
    return ours


@pytest.mark.parametrize("parts", ["one", "many"])
@pytest.mark.parametrize("dtype", IDS, ids=IDS.get)
@pytest.mark.parametrize("name", CASES)
def test_output_and_log_sum_exp(name, dtype, parts, device):
    """As many parts as the capacity allows, up to 64, or one for each sequence."""
    if device == "cpu":
        emulation.load().set_multiprocessors(10**6 if parts == "many" else 0)
    elif parts == "many":
        pytest.skip("a GPU has the multiprocessors it has")
    out, _ = check(arguments(CASES[name], dtype, device))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    "name", ["several parts to merge, grouped heads", "tails of every vector", "parts of pages, everything"]
)
def test_any_order_of_threads(name, device):
    """Bit for bit what the first order gave, whenever copies land: no warp reads a tile that is not there yet."""
    if device != "cpu":
        pytest.skip("a GPU chooses its own order")
    emulation.load().set_multiprocessors(30)
    given = arguments(CASES[name], BF16, device)
    expected = decode_attention.forward(*given)
    for mode in MODES[1:]:
        with running(*mode):
            for ours, first in zip(decode_attention.forward(*given), expected, strict=True):
                assert torch.equal(ours, first), mode


def test_pages_and_rows_of_the_same_keys_give_the_same_bits(device):
    given = arguments(Case((2, 4, 2, 2, 640, 64, 64), page_size=128), F16, device)
    table = given[4].page_table.clamp(min=0).long()
    rows = [c[table].transpose(1, 2).flatten(2, 3) for c in given[1:3]]
    in_rows = [given[0], *rows, given[3], given[4]._replace(page_table=None)]
    for paged, plain in zip(decode_attention.forward(*given), decode_attention.forward(*in_rows), strict=True):
        assert torch.equal(paged, plain)


def test_layouts(device):
    """Whatever the strides, the same bits: rows that start anywhere are read element by element."""
    q, k, v, *rest = arguments(Case((2, 4, 2, 2, 90, 64, 64)), BF16, device)
    expected = decode_attention.forward(q, k, v, *rest)

    def odd(t):
        wide = torch.full((*t.shape[:3], 67), float("nan"), dtype=t.dtype, device=device)
        wide[..., 1:65] = t
        return wide[..., 1:65]

    for given in ([odd(q), k, v], [q, odd(k), v], [q, k, odd(v)], [t.contiguous() for t in (q, k, v)]):
        for ours, first in zip(decode_attention.forward(*given, *rest), expected, strict=True):
            assert torch.equal(ours, first)


def test_offsets_beyond_32_bits(device):
    """70 keys 2^25 elements apart: the memory between them is never touched, so the system need not have it."""
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("a tensor of 4.7 GB")
    q, k, _, lengths, *rest = arguments(Case((1, 2, 1, 1, 70, 64, 64)), BF16, device)
    k = k[:1].contiguous()
    far = torch.empty(69 * 2**25 + 64, dtype=BF16, device=device).as_strided((1, 1, 70, 64), (0, 0, 2**25, 1))
    far.copy_(k)
    near = decode_attention.forward(q, k, k, lengths, *rest)
    for ours, first in zip(decode_attention.forward(q, far, far, lengths, *rest), near, strict=True):
        assert torch.equal(ours, first)


def test_nothing_to_see(device):
    q, k, v, lengths, *rest = arguments(CASES["one new token"], BF16, device)
    for parts in (0, 10**6):
        if device == "cpu":
            emulation.load().set_multiprocessors(parts)
        out, lse = decode_attention.forward(q, k, v, torch.zeros_like(lengths), *rest)
        assert (out == 0).all() and torch.isneginf(lse).all()
    assert decode_attention.forward(q[:, :, :0], k, v, lengths, *rest)[0].shape == (3, 4, 0, 64)
    assert decode_attention.forward(q[:0], k, v, lengths[:0], *rest)[0].shape == (0, 4, 1, 64)


@pytest.mark.parametrize("parts", ["one", "many"])
def test_what_is_out_of_range_gives_nan_and_only_there(parts, device):
    if device == "cpu":
        emulation.load().set_multiprocessors(10**6 if parts == "many" else 0)

    def bad_second(given):
        out, lse = decode_attention.forward(*given)
        assert out[0].isfinite().all() and out[1].isnan().all() and lse[1].isnan().all()

    given = arguments(Case((2, 4, 2, 1, 600, 64, 64)), BF16, device)
    lengths = given[3]
    for bad in (-1, 601, 2**31 - 1, -(2**31)):
        given[3] = torch.tensor([20, bad], dtype=torch.int32, device=device)
        bad_second(given)
    given[3] = lengths.fill_(500)
    given[1], given[2] = (t[:1].expand(4, -1, -1, -1) for t in given[1:3])
    for bad in (-1, 4, 2**31 - 1):  # the cache has 4 rows
        given[4] = given[4]._replace(cache_batch_idx=torch.tensor([1, bad], dtype=torch.int32, device=device))
        bad_second(given)
    leftpad = torch.tensor([0, 501], dtype=torch.int32, device=device)
    given[4] = given[4]._replace(cache_batch_idx=None, cache_leftpad=leftpad)
    bad_second(given)

    given = arguments(Case((2, 4, 2, 1, 600, 64, 64), page_size=3), BF16, device)
    given[1], given[2] = given[1].nan_to_num(1.0), given[2].nan_to_num(1.0)
    given[3].fill_(500)
    table = given[4].page_table.clamp_(min=0)
    table[0, 167:] = 10**6  # behind the end: nobody looks
    for bad in (-1, 10**6):
        table[1, 100] = bad  # 3 of a tile's 16 keys
        bad_second(given)


def test_a_nan_among_the_keys_stays_visible(device):
    q, k, v, lengths, *rest = arguments(Case((2, 4, 2, 1, 30, 64, 64)), BF16, device)
    k, v = k.nan_to_num(0.5), v.nan_to_num(0.5)
    k[1, 0, 3, 2] = float("nan")
    out, _ = decode_attention.forward(q, k, v, lengths.fill_(30), *rest)
    assert out[1, :2].isnan().all() and out[0].isfinite().all() and out[1, 2:].isfinite().all()


def test_through_the_public_function(device):
    tensors, kwargs = inputs(CASES["pages"], BF16)
    tensors = [t.to(device) for t in tensors]
    kwargs = {n: t.to(device) for n, t in kwargs.items()}
    with backend("cuda"):
        out, lse = F.decode_attention(*tensors, **kwargs, return_lse=True)
    ours = decode_attention.forward(*arguments(CASES["pages"], BF16, device))
    assert torch.equal(out, ours[0]) and torch.equal(lse, ours[1])
    with backend("cuda"), pytest.raises(ValueError, match="dtype float32 is not one of bfloat16, float16"):
        F.decode_attention(*(t.float() for t in tensors[:3]), tensors[3], **kwargs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 264}, r"head_dim: 264, 264 are not in \[1, 256\]"),
        ({"heads": 3}, "num_heads: 3 is not a multiple of num_kv_heads 2"),
        ({"softcap": -1.0}, "softcap: -1 is negative"),
        ({"page_size": 0}, "page_size: must be positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments(change, message, device):
    heads, dim, page_size = change.get("heads", 2), change.get("dim", 64), change.get("page_size")
    q, cache = torch.zeros(1, heads, 1, dim), torch.zeros(1, 2, 8, dim)
    q, cache = q.to(device, BF16), cache.to(device, BF16)
    lengths, table = torch.ones(1, dtype=torch.int32, device=device), None
    if page_size is not None:
        cache, table = cache[:, :, :page_size], lengths[None]
    with pytest.raises(ValueError, match=message):
        options = DecodeOptions(0.1, softcap=change.get("softcap", 0.0), page_table=table)
        decode_attention.forward(q, cache, cache, lengths, options)
