"""Attention of csrc/cuda, the kernels that run on every GPU from sm_80 on, against float64: emulated or on a GPU."""

import pytest
import torch

from fastformer import backend
from fastformer.backends.attention_options import Options
from fastformer.backends.cuda import attention, emulation
from fastformer.backends.reference import attention as reference
from fastformer.functional import attention as public_attention
from tests.cuda.orders import guarded_outputs
from tests.numerics import assert_close_to_fp64

BF16, F16 = torch.bfloat16, torch.float16
IDS = {BF16: "bf16", F16: "f16"}
SHAPES = [  # B, Hq, Hkv, Sq, Sk, D, Dv
    (1, 1, 1, 1, 1, 8, 8),  # one score, the smallest head
    (2, 2, 2, 70, 150, 64, 64),  # no length is a multiple of a tile
    (1, 2, 1, 150, 70, 80, 80),  # a head dimension between two buckets; more queries than keys
    (1, 4, 2, 129, 65, 96, 96),  # one row more than a tile, of queries and of keys; grouped heads
    (1, 3, 1, 70, 40, 40, 128),  # v wider than q and k; one head for all
    (1, 1, 1, 64, 32, 128, 72),  # whole tiles, v narrower
    (1, 2, 2, 70, 70, 256, 256),  # the widest: tiles of their own, dk and dv in two kernels
    (2, 1, 1, 5, 0, 64, 64),  # no keys: zeros
    (2, 1, 1, 0, 5, 64, 64),  # no queries: dk, dv are zeros
]


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    monkeypatch.setenv("FASTFORMER_CUDA_FAMILY", "sm80")
    with guarded_outputs(monkeypatch, attention):
        yield


def inputs(shape, dtype, device, seed=0):
    """q, k, v, dout, dlse, the first four transposed views of (B, S, H, D)."""
    torch.manual_seed(seed)
    b, hq, hk, sq, sk, d, dv = shape
    sizes = [(b, sq, hq, d), (b, sk, hk, d), (b, sk, hk, dv), (b, sq, hq, dv)]
    tensors = [torch.randn(size).to(dtype).to(device).transpose(1, 2) for size in sizes]
    return [*tensors, torch.randn(b, hq, sq).to(device)]


def doubled(values):
    return [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


def check(q, k, v, dout, dlse, options):
    """Forward and all gradients. Our backward starts from our forward, the reference's from its own."""
    needs = options.bias is not None, options.distance_bias is not None
    ours = attention.forward(q, k, v, options)
    theirs = reference.forward(q, k, v, options)
    exact_options = Options(*doubled(options))
    exact = reference.forward(*doubled((q, k, v)), exact_options)
    for name, *three in zip(("out", "lse"), ours, theirs, exact, strict=True):
        assert_close_to_fp64(name, *three)
    gradients = attention.backward(dout, dlse, q, k, v, *ours, options, needs)
    theirs = reference.backward(dout, dlse, q, k, v, *theirs, options, needs)
    exact = reference.backward(*doubled((dout, dlse, q, k, v)), *exact, exact_options, needs)
    for name, mine, other, true in zip(gradients._fields, gradients, theirs, exact, strict=True):
        assert (mine is None) == (other is None), name
        if mine is not None:  # dbias and ddistance_bias are float32; what they are made of is not, so nor is their rule
            assert mine.dtype in (q.dtype, torch.float32)
            assert_close_to_fp64(name, mine.to(q.dtype), other.to(q.dtype), true)
    return [*ours, *gradients]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", IDS, ids=IDS.get)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_attention(shape, dtype, causal, device):
    check(*inputs(shape, dtype, device), Options(shape[5] ** -0.5, causal))


def generator():
    return torch.Generator().manual_seed(3)


def randn(*size):
    return torch.randn(*size, generator=generator())


def visible(*size):
    return torch.rand(*size, generator=generator()) > 0.4


def padding():
    """The end of the first sequence, and all of the second."""
    mask = torch.zeros(2, 150, dtype=torch.bool)
    mask[0, 100:] = True
    mask[1] = True
    return mask


# For B, Hq, Sq, Sk = 2, 2, 70, 150: Options beside scale.
OPTIONS = {
    "window": {"window_left": 20, "window_right": 5},
    "window_causal": {"window_left": 40, "window_right": 9, "causal": True},
    "top_left": {"causal": True, "top_left": True},
    "hidden_behind": {"window_left": 3, "window_right": -1, "causal": True},
    "key_padding_mask": {"key_padding_mask": padding()},
    "mask": {"mask": visible(2, 2, 70, 150)},
    "mask_shared": {"mask": visible(1, 1, 70, 150), "causal": True},
    "mask_of_keys": {"mask": visible(2, 1, 1, 150)},
    "bias": {"bias": randn(2, 2, 70, 150).to(BF16)},
    "bias_float32": {"bias": randn(2, 2, 70, 150), "causal": True},
    "bias_of_heads": {"bias": randn(1, 2, 70, 150).to(BF16), "causal": True},
    "bias_of_batches": {"bias": randn(2, 1, 70, 150)},
    "bias_of_keys": {"bias": randn(2, 1, 1, 150)},
    "bias_of_keys_alone": {"bias": randn(1, 1, 1, 150), "dropout_p": 0.2, "seed": 2},
    "distance_bias": {"distance_bias": randn(2, 2 * 100 + 1)},
    "distance_bias_near": {"distance_bias": randn(2, 2 * 3 + 1), "causal": True},  # most tiles beyond the last distance
    "distance_bias_one": {"distance_bias": randn(2, 1)},
    "alibi": {"alibi_slopes": randn(2, 2).abs()},
    "alibi_shared": {"alibi_slopes": randn(1, 2).abs(), "causal": True},
    "softcap": {"softcap": 2.5},
    "dropout": {"dropout_p": 0.3, "seed": 0x123456789ABCDEF},
    "dropout_all": {"dropout_p": 1.0, "seed": 1},
    "scale_negative": {"scale": -0.2},
    "scale_zero": {"scale": 0.0},
    "everything": {
        "causal": True,
        "window_left": 60,
        "mask": visible(2, 1, 70, 150),
        "key_padding_mask": padding(),
        "bias": randn(1, 2, 70, 150),
        "distance_bias": randn(2, 41),
        "alibi_slopes": randn(1, 2).abs(),
        "softcap": 3.0,
        "dropout_p": 0.2,
        "seed": 7,
    },
}


def on(device, options):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


# At 256 q and dout are not in registers, dk and dv apart. What is done to a score is one function, add_to_scores, so
# there one of each kind is enough: what hides keys, what is added with a gradient and without, what multiplies.
WIDE = ("window_causal", "key_padding_mask", "mask_shared", "bias", "bias_of_keys_alone", "distance_bias", "softcap")
WIDE += ("dropout", "everything")


@pytest.mark.parametrize(("name", "dim"), [(name, 64) for name in OPTIONS] + [(name, 256) for name in WIDE])
def test_options(name, dim, device):
    options = Options(**{"scale": dim**-0.5, **on(device, OPTIONS[name])})
    check(*inputs((2, 2, 2, 70, 150, dim, dim), BF16, device), options)


@pytest.mark.parametrize("dim", [96, 128])
def test_everything_in_float16(dim, device):
    given = {n: v.to(F16) if n == "bias" else v for n, v in OPTIONS["everything"].items()}
    options = Options(**{"scale": dim**-0.5, **on(device, given)})
    check(*inputs((2, 2, 1, 70, 150, dim, dim), F16, device), options)


@pytest.mark.parametrize(
    ("options", "hidden"),
    [
        (Options(0.125, causal=True), slice(0, 260)),  # position i - 260 is before every key
        (Options(0.125, top_left=True, window_left=30), slice(70, 300)),  # position i is more than 30 after every key
    ],
    ids=["before", "behind"],
)
def test_rows_that_see_nothing(options, hidden, device):
    """300 queries, 40 keys: whole blocks of such rows, and one with both kinds."""
    out, lse, dq, *_ = check(*inputs((1, 1, 1, 300, 40, 64, 64), BF16, device), options)
    nothing = torch.zeros(300, dtype=torch.bool)
    nothing[hidden] = True
    assert torch.equal(torch.isneginf(lse[0, 0]).cpu(), nothing)
    assert (out[0, 0, hidden] == 0).all() and (dq[0, 0, hidden] == 0).all()


# Lengths of queries and of keys: one, a tile and one more; a sequence without queries, and one without keys.
PACKED = [([0, 1, 129, 30, 70], [5, 1, 65, 0, 130]), ([3], [90])]
PACKED_OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_left": 10, "window_right": 20, "top_left": True},
    "added": {"causal": True, "softcap": 4.0, "distance_bias": randn(4, 31), "alibi_slopes": randn(1, 4).abs()},
    "dropout": {"dropout_p": 0.4, "seed": 99},
}


@pytest.mark.parametrize("name", PACKED_OPTIONS)
@pytest.mark.parametrize("lengths", PACKED, ids=["five", "one"])
def test_packed_sequences(lengths, name, device):
    ends = [torch.tensor([0, *values]).cumsum(0).to(torch.int32).to(device) for values in lengths]
    total_q, total_k = (int(e[-1]) for e in ends)
    tensors = inputs((1, 4, 2, total_q, total_k, 64, 64), BF16, device)
    options = Options(0.125, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], max_seqlen_q=max(lengths[0]))
    options = options._replace(max_seqlen_k=max(lengths[1]), **on(device, PACKED_OPTIONS[name]))
    check(*tensors, options)


def test_a_neighbour_in_the_pack_is_never_read(device):
    """NaN in one sequence stays there."""
    ends = torch.tensor([0, 40, 75], dtype=torch.int32, device=device)
    q, k, v, dout, dlse = inputs((1, 1, 1, 75, 75, 64, 64), BF16, device)
    for t in (q, k, v, dout):
        t[:, :, 40:] = float("nan")
    options = Options(0.125, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=40, max_seqlen_k=40)
    ours = attention.forward(q, k, v, options)
    gradients = attention.backward(dout, dlse, q, k, v, *ours, options)
    for t in (*ours, *gradients[:3]):
        assert t[:, :, :40].isfinite().all() and t[:, :, 40:].isnan().all()


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("plain", 64),  # every tile
        ("plain", 96),
        ("plain", 128),
        ("plain", 256),
        ("everything", 64),
        ("everything", 256),
        ("bias_of_keys_alone", 128),
    ],
)
def test_any_order_of_threads(name, dim, device):
    """Bit for bit what the first order gave: no result hangs on who runs first."""
    if device != "cpu":
        pytest.skip("a GPU chooses its own order")
    batch = 2 if name in OPTIONS else 1  # sequences meet in the gradients of biases alone
    q, k, v, dout, dlse = inputs((batch, 2, 1, 70, 150, dim, dim), BF16, device)
    options = Options(**{"scale": dim**-0.5, "causal": True, **OPTIONS.get(name, {})})
    needs = options.bias is not None, options.distance_bias is not None

    def run():
        ours = attention.forward(q, k, v, options)
        return [*ours, *attention.backward(dout, dlse, q, k, v, *ours, options, needs)]

    expected = run()
    for order in emulation.ORDERS[1:]:
        emulation.set_order(order)
        for part, (ours, first) in enumerate(zip(run(), expected, strict=True)):
            assert first is None or torch.equal(ours, first), (order, part)


def test_layouts(device):
    """One tensor for q, k and v and one for their gradients; heads before positions; a broadcast v; odd strides."""
    torch.manual_seed(1)
    options = Options(0.125, True)
    dout, dlse = inputs((2, 3, 3, 33, 33, 64, 64), F16, device)[3:]
    qkv = torch.randn(2, 33, 3, 3, 64).to(F16).to(device)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    plain = check(q.contiguous(), k.contiguous(), v.contiguous(), dout, dlse, options)
    same = check(q, k, v, dout, dlse, options)
    dqkv = torch.full_like(qkv, float("nan"))
    grads = dqkv.permute(2, 0, 3, 1, 4).unbind()
    attention.backward(dout, dlse, q, k, v, *same[:2], options, (False, False), *grads)
    odd = [torch.full((2, 3, 33, 67), float("nan"), dtype=F16, device=device)[..., 3:] for _ in range(3)]
    for o, t in zip(odd, (q, k, v), strict=True):
        o.copy_(t)
    shifted = check(*odd, dout, dlse, options)  # rows start anywhere: copied first
    into = [torch.full((2, 3, 33, 67), float("nan"), dtype=F16, device=device)[..., :64] for _ in range(3)]
    returned = attention.backward(dout, dlse, *odd, *shifted[:2], options, (False, False), *into)
    for i in range(3):
        assert torch.equal(plain[i + 2], same[i + 2]) and torch.equal(plain[i + 2], grads[i])
        assert torch.equal(plain[i + 2], shifted[i + 2]) and torch.equal(plain[i + 2], into[i])
        assert returned[i] is into[i]
    broadcast = v[:, :1].expand(2, 3, 33, 64)
    check(q, k, broadcast, dout[:, :, :1].expand(2, 3, 33, 64), dlse, options)


def test_offsets_beyond_32_bits(device):
    """70 rows 2^25 elements apart: the memory between them is never touched, so the system need not have it."""
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("three tensors of 4.7 GB")
    q, k, v, dout, dlse = inputs((1, 1, 1, 70, 70, 64, 64), BF16, device)
    wide = [torch.empty(69 * 2**25 + 64, dtype=BF16, device=device) for _ in range(2)]
    far = [w.as_strided((1, 1, 70, 64), (0, 0, 2**25, 1)) for w in wide]
    for f, t in zip(far, (k, v), strict=True):
        f.copy_(t)
    options = Options(0.125)
    ours, near = attention.forward(q, *far, options), attention.forward(q, k, v, options)
    assert torch.equal(ours[0], near[0]) and torch.equal(ours[1], near[1])
    ours = attention.backward(dout, dlse, q, *far, *near, options)
    near = attention.backward(dout, dlse, q, k, v, *near, options)
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], near[:3], strict=True))


def test_through_the_public_function(device):
    """Chosen by name, differentiated by autograd; a head dimension of 20 goes to another backend."""
    q, k, v, dout, _ = inputs((1, 2, 2, 40, 40, 64, 64), BF16, device)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    with backend("cuda"):
        out = public_attention(*leaves, causal=True)
        out.backward(dout)
    ours = attention.forward(q, k, v, Options(0.125, True))
    gradients = attention.backward(dout, None, q, k, v, *ours, Options(0.125, True))
    assert torch.equal(out, ours[0])
    for leaf, gradient in zip(leaves, gradients[:3], strict=True):
        assert torch.equal(leaf.grad, gradient)
    with backend("cuda"), pytest.raises(ValueError, match="unaligned"):
        public_attention(q[..., :20], k[..., :20], v[..., :20])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"head_dim": 20}, NotImplementedError, "not multiples of 8"),
        ({"head_dim": 264}, ValueError, r"not in \[1, 256\]"),
        ({"softcap": -1.0}, ValueError, "softcap: -1 is negative"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p: 1.5 is not in \[0, 1\]"),
        ({"heads": 3}, ValueError, "num_heads: 3 is not a multiple of num_kv_heads 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments(change, error, message, device):
    heads, dim = change.get("heads", 2), change.get("head_dim", 64)
    q, k, v = inputs((1, heads, 2, 8, 8, dim, dim), BF16, device)[:3]
    options = Options(0.125, **{n: x for n, x in change.items() if n in Options._fields})
    with pytest.raises(error, match=message):
        attention.forward(q, k, v, options)
