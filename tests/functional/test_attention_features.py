"""Everything that can be added to attention's scores or hidden from them: output and every gradient against float64."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import fastformer
from fastformer import functional as F
from fastformer.backends.attention_options import FEATURES, Options
from fastformer.backends.reference import attention as reference
from tests.attention_formula import attention_formula, t5_bucket
from tests.numerics import assert_close_to_fp64

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
B, HQ, HKV = 2, 4, 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some(*shape: int, share: float = 0.7) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(9)) < share


# name -> keyword arguments for (B, HQ, Sq, Sk). Tensors that get a gradient are floating point.
FEATURE_CASES = {
    "bias of every query and key": lambda sq, sk: {"bias": normal(B, HQ, sq, sk)},
    "bias shared by the batch": lambda sq, sk: {"bias": normal(1, HQ, sq, sk), "causal": True},
    "bias shared by the heads": lambda sq, sk: {"bias": normal(B, 1, sq, sk)},
    "bias of the keys alone": lambda sq, sk: {"bias": normal(B, 1, 1, sk)},
    "one bias for all": lambda sq, sk: {"bias": normal(1, 1, 1, sk)},
    "T5's encoder bias": lambda sq, sk: {"relative_bias": (normal(32, HQ), True, 32, 128), "scale": 1.0},
    "T5's decoder bias": lambda sq, sk: {"relative_bias": (normal(32, HQ), False, 32, 128), "causal": True},
    "few buckets, near the diagonal": lambda sq, sk: {"relative_bias": (normal(8, HQ), True, 8, 6), "softcap": 4.0},
    "ALiBi": lambda sq, sk: {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]), "causal": True},
    "ALiBi by sequence": lambda sq, sk: {"alibi_slopes": normal(B, HQ).abs()},
    "window": lambda sq, sk: {"window": (20, 7)},
    "window to the left, causal": lambda sq, sk: {"window": (33, -1), "causal": True},
    "window to the right": lambda sq, sk: {"window": (-1, 3)},
    "window of one key": lambda sq, sk: {"window": (0, 0)},
    "softcap": lambda sq, sk: {"softcap": 2.0, "causal": True},
    "mask of every query and key": lambda sq, sk: {"attn_mask": some(B, HQ, sq, sk)},
    "mask shared by the heads": lambda sq, sk: {"attn_mask": some(B, 1, sq, sk), "causal": True},
    "mask of the queries and keys": lambda sq, sk: {"attn_mask": some(1, 1, sq, sk, share=0.03)},  # rows see nothing
    "padding and a bias": lambda sq, sk: {"key_padding_mask": some(B, sk, share=0.4), "bias": normal(1, HQ, sq, sk)},
    "all at once": lambda sq, sk: {
        "bias": normal(B, 1, sq, sk),
        "relative_bias": (normal(16, HQ), True, 16, 50),
        "alibi_slopes": normal(HQ).abs(),
        "key_padding_mask": some(B, sk, share=0.2),
        "attn_mask": some(1, HQ, sq, sk),
        "window": (60, 30),
        "softcap": 5.0,
        "causal": True,
    },
}

# (Sq, Sk, D, Dv)
SHAPES = {
    "tails of every tile": (53, 131, 40, 24),
    "more queries than keys": (101, 50, 16, 16),  # aligned at the end: the first queries see nothing under causal
    "several blocks of queries and keys": (150, 260, 8, 8),
}


def with_leaves(arguments: dict) -> tuple[dict, list[Tensor]]:
    """The arguments with the tensors that get a gradient as leaves, and those."""
    arguments, leaves = dict(arguments), []
    if "bias" in arguments:
        arguments["bias"] = arguments["bias"].detach().requires_grad_()
        leaves.append(arguments["bias"])
    if "relative_bias" in arguments:
        table, *rest = arguments["relative_bias"]
        arguments["relative_bias"] = (table.detach().requires_grad_(), *rest)
        leaves.append(arguments["relative_bias"][0])
    return arguments, leaves


def converted(arguments: dict, dtype: torch.dtype) -> dict:
    result = dict(arguments)
    if "bias" in result:
        result["bias"] = result["bias"].to(dtype)
    if "relative_bias" in result:
        result["relative_bias"] = (result["relative_bias"][0].to(dtype), *result["relative_bias"][1:])
    return result


def outputs_and_gradients(function, qkv: list[Tensor], arguments: dict) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in qkv]
    arguments, more = with_leaves(arguments)
    out, lse = function(*leaves, return_lse=True, **arguments)
    dout = normal(*out.shape, seed=5).to(out.dtype)
    # the gradient of lse too, where there is one: -inf stands for no key
    seen = lse.isfinite()
    loss = (out * dout).sum() + (lse.masked_fill(~seen, 0.0) * normal(*lse.shape, seed=6).to(lse.dtype)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, [*leaves, *more])]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", FEATURE_CASES)
def test_output_and_gradients(case, shape, dtype):
    sq, sk, d, dv = SHAPES[shape]
    qkv = [normal(B, HQ, sq, d), normal(B, HKV, sk, d, seed=1), normal(B, HKV, sk, dv, seed=2)]
    qkv = [t.to(dtype) for t in qkv]
    arguments = converted(FEATURE_CASES[case](sq, sk), dtype)
    wanted = outputs_and_gradients(attention_formula, [t.double() for t in qkv], converted(arguments, torch.double))
    same = outputs_and_gradients(attention_formula, qkv, arguments)
    with fastformer.strict():
        ours = outputs_and_gradients(F.attention, qkv, arguments)
    names = ["out", "lse", "dq", "dk", "dv", *(n for n in ("bias", "relative_bias") if n in arguments)]
    for name, o, s, w in zip(names, ours, same, wanted, strict=True):
        finite = w.isfinite()
        assert torch.equal(o[~finite].double(), w[~finite]), f"{name}: infinities differ"
        if name == "lse":
            s = s.to(o.dtype)
        if finite.any():
            # gradients are sums over up to 260 terms that partly cancel
            assert_close_to_fp64(name, o[finite], s[finite], w[finite], scale=16.0)


# ---- every backend's own interface, at random ------------------------------------------------------------------------


def random_call(rng: random.Random, dtype: torch.dtype) -> tuple[list[Tensor], Options, tuple[bool, bool]]:
    """q, k, v, dout, dlse and options, any of them together, and which gradients of biases are wanted."""
    g = torch.Generator().manual_seed(rng.getrandbits(32))
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    hkv, groups = rng.choice([1, 2, 3]), rng.choice([1, 1, 2, 3])
    heads, d = hkv * groups, rng.choice([1, 3, 8, 20, 33, 64, 72])
    dv = d if rng.random() < 0.7 else rng.choice([1, 5, 24, 64])
    lengths = [0, 1, 2, 17, 47, 48, 49, 95, 96, 97, 128, 130, 200]
    b, sq, sk = rng.choice([1, 2, 3]), rng.choice(lengths), rng.choice(lengths)
    fields: dict = {"scale": rng.choice([d**-0.5, -0.3, 0.0]), "causal": rng.random() < 0.5}
    if rng.random() < 0.4:
        fields |= {"window_left": rng.choice([-1, 0, 3, 50]), "window_right": rng.choice([-1, 0, 3, 60])}
    if rng.random() < 0.25:
        fields["softcap"] = rng.choice([1.0, 5.0, 30.0])
    if rng.random() < 0.3:
        fields |= {"dropout_p": rng.choice([0.1, 0.5, 1.0]), "seed": rng.getrandbits(62)}
    fields["top_left"] = rng.random() < 0.2
    sequences = b
    if rng.random() < 0.25:
        sequences, b = rng.randint(0, 4), 1
        pairs = [(rng.choice([0, 1, 5, 50, 100]), rng.choice([0, 1, 9, 60, 140])) for _ in range(sequences)]
        ends = [[sum(p[i] for p in pairs[:n]) for n in range(sequences + 1)] for i in (0, 1)]
        sq, sk = ends[0][-1], ends[1][-1]
        fields |= {f"cu_seqlens_{n}": torch.tensor(e, dtype=torch.int32) for n, e in zip("qk", ends)}
        fields |= {f"max_seqlen_{n}": max((p[i] for p in pairs), default=0) for i, n in enumerate("qk")}
    else:
        broadcast = lambda: [rng.choice([1, n]) for n in (b, heads, sq)] + [sk]  # noqa: E731
        if rng.random() < 0.25:
            fields["key_padding_mask"] = torch.rand(b, sk, generator=g) < 0.4
        if rng.random() < 0.25:
            fields["mask"] = torch.rand(*broadcast(), generator=g) < 0.7
        if rng.random() < 0.35:
            fields["bias"] = normal(*broadcast()).to(rng.choice([dtype, acc]))
            if rng.random() < 0.3:  # a mask among the numbers
                fields["bias"].masked_fill_(torch.rand(fields["bias"].shape, generator=g) < 0.2, float("-inf"))
    if rng.random() < 0.3:
        fields["distance_bias"] = normal(heads, 2 * rng.choice([1, 8, 40, 128]) + 1).to(acc)
    if rng.random() < 0.2:
        fields["alibi_slopes"] = normal(rng.choice([1, max(sequences, 1)]), heads).abs()

    def layout(h, s, n):  # heads inside or outside of the positions
        inside = rng.random() < 0.5
        return (normal(b, s, h, n).transpose(1, 2) if inside else normal(b, h, s, n)).to(dtype)

    tensors = [layout(heads, sq, d), layout(hkv, sk, d), layout(hkv, sk, dv), layout(heads, sq, dv)]
    dlse = normal(b, heads, sq).to(acc) if rng.random() < 0.4 else None
    needs = ("bias" in fields and rng.random() < 0.8, "distance_bias" in fields and rng.random() < 0.8)
    return [*tensors, dlse], Options(**fields), needs


def in_double(options: Options) -> Options:
    double = lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
    return Options(*map(double, options))


@pytest.mark.parametrize("seed", range(40))
def test_any_combination(seed):
    from fastformer.backends.cpu import attention as cpu

    rng = random.Random(seed)
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    threads = torch.get_num_threads()
    torch.set_num_threads(rng.choice([1, 2]))
    try:
        for _ in range(5):
            tensors, options, needs = random_call(rng, dtype)
            q, k, v, dout, dlse = tensors
            exact = [t if t is None else t.double() for t in tensors]
            calls = [(reference, exact, in_double(options)), (reference, tensors, options), (cpu, tensors, options)]
            results = []
            for backend, (q, k, v, dout, dlse), o in calls:
                out, lse = backend.forward(q, k, v, o)
                results.append([out, lse, *backend.backward(dout, dlse, q, k, v, out, lse, o, needs)])
            for name, w, s, o in zip(("out", "lse", "dq", "dk", "dv", "dbias", "ddistance_bias"), *results):
                assert (o is None) == (w is None), name
                if o is None or o.numel() == 0:
                    continue
                finite = w.isfinite()
                assert torch.equal(finite, o.isfinite()), f"{name}: {options}"
                if finite.any():
                    assert_close_to_fp64(name, o[finite], s[finite], w[finite], scale=32.0)
    finally:
        torch.set_num_threads(threads)


# ---- single promises -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["T5's decoder bias", "bias shared by the batch", "all at once", "softcap"])
def test_gradcheck(case):
    sq, sk = 5, 7
    leaves = [normal(B, HQ, sq, 3), normal(B, HKV, sk, 3, seed=1), normal(B, HKV, sk, 2, seed=2)]
    arguments = converted(FEATURE_CASES[case](sq, sk), torch.double)
    names = [n for n in ("bias", "relative_bias") if n in arguments]
    leaves += [arguments[n][0] if n == "relative_bias" else arguments[n] for n in names]

    def function(q, k, v, *more):
        given = dict(arguments)
        for name, t in zip(names, more, strict=True):
            given[name] = (t, *arguments[name][1:]) if name == "relative_bias" else t
        return F.attention(q, k, v, **given)

    assert torch.autograd.gradcheck(function, [t.double().detach().requires_grad_() for t in leaves])


def test_buckets_are_t5s():
    from fastformer.functional.attention import relative_position_bucket

    for bidirectional, num_buckets, max_distance in ((True, 32, 128), (False, 32, 128), (True, 8, 6), (False, 7, 300)):
        distances = torch.arange(-700, 700)
        ours = relative_position_bucket(distances, bidirectional, num_buckets, max_distance)
        assert ours.tolist() == [t5_bucket(d, bidirectional, num_buckets, max_distance) for d in distances.tolist()]
        assert ours.min() == 0 and ours.max() == num_buckets - 1


def test_relative_bias_takes_memory_for_one_row_only():
    # 12 heads x 3000^2 scores are 432 MB in float32; the kernels' own memory is counted by their workspace.
    from fastformer import _C

    q, gradient = torch.empty(1, 12, 3000, 64), torch.empty(12, 257)
    options = Options(1.0, distance_bias=torch.empty(12, 257))
    used = sum(_C.attention_workspace((q, q, q, q, None), options, (q, None, q, q, q, None, gradient)))
    assert used < 12 * 3000**2 * 4 / 4


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_bias_without_a_gradient_is_the_same(bidirectional):
    """It is read by index then, by another kernel. A text that grows token by token asks for few sets of buckets."""
    from fastformer.functional.attention import _buckets

    k, table = normal(1, 2, 140, 4), normal(12, 2).requires_grad_()
    _buckets.cache_clear()
    for length in (*range(1, 12), 60, 99, 100, 101, 140):
        given = {"relative_bias": (table, bidirectional, 12, 100), "causal": True}
        q, keys = k[:, :, -1:], k[:, :, :length]
        with torch.no_grad():
            ours = F.attention(q, keys, keys, **given)
        torch.testing.assert_close(ours, F.attention(q, keys, keys, **given).detach(), rtol=1e-5, atol=1e-6)
    assert _buckets.cache_info().misses <= 8


@pytest.mark.parametrize("shape", [(2, 4, 1, 65), (1, 4, 37, 65), (2, 1, 37, 65), (1, 1, 1, 65)])
def test_gradient_of_a_shared_bias_repeats_bit_for_bit(shape):
    q, k = normal(2, 4, 37, 16).requires_grad_(), normal(2, 4, 65, 16, seed=1)
    bias = normal(*shape).requires_grad_()
    first = None
    for _ in range(4):
        grads = torch.autograd.grad(F.attention(q, k, k, bias=bias).square().sum(), (q, bias))
        first = first or grads
        assert all(torch.equal(a, b) for a, b in zip(first, grads, strict=True))


class TestDropout:
    def test_share_scale_and_independence(self):
        # v = 1 and equal scores: an output is the share of keys that were kept, times 1 / (1 - p).
        q, ones = torch.zeros(4, 8, 64, 8), torch.ones(4, 8, 512, 1)
        torch.manual_seed(0)
        out = F.attention(q, torch.zeros(4, 8, 512, 8), ones, dropout_p=0.25)
        kept = out * 0.75 * 512
        torch.testing.assert_close(kept, kept.round(), atol=5e-3, rtol=0)
        # 2048 rows of 512 keys: mean 384 and variance 96 of a binomial, within five standard errors
        assert abs(kept.mean().item() - 384) < 5 * (96 / 2048) ** 0.5
        assert abs(kept.var().item() - 96) < 5 * 96 * (2 / 2048) ** 0.5
        assert kept.flatten().unique().numel() > 30  # rows do not share a mask

    def test_comes_from_torchs_seed(self):
        q = normal(1, 2, 40, 8)
        call = lambda: F.attention(q, q, q, dropout_p=0.5)  # noqa: E731
        torch.manual_seed(3)
        first, second = call(), call()
        torch.manual_seed(3)
        assert torch.equal(call(), first) and torch.equal(call(), second) and not torch.equal(first, second)

    def test_backward_drops_what_forward_dropped(self):
        # With v = identity the output is the dropped weights themselves: v's gradient must vanish where they do.
        n = 48
        q, v = normal(1, 1, n, 8), torch.eye(n)[None, None].requires_grad_()
        out = F.attention(q, q, v, dropout_p=0.5, causal=True)
        for row in (0, 17, 47):
            (dv,) = torch.autograd.grad(out[0, 0, row].sum(), v, retain_graph=True)
            weights = dv[0, 0].sum(1) / n
            torch.testing.assert_close(weights, out[0, 0, row].detach())
            assert ((out[0, 0, row] == 0) == (dv[0, 0] == 0).all(1)).all()

    def test_backends_drop_the_same(self):
        q, k = normal(2, 4, 37, 16), normal(2, 2, 150, 16, seed=1)
        results = []
        for backend in ("cpu", "reference"):
            torch.manual_seed(1)
            with fastformer.backend(backend):
                results.append(F.attention(q, k, k, dropout_p=0.3, window=(100, -1)))
        torch.testing.assert_close(*results)

    def test_everything_dropped(self):
        q = normal(1, 1, 5, 4).requires_grad_()
        out = F.attention(q, q, q, dropout_p=1.0)
        assert (out == 0).all() and (torch.autograd.grad(out.sum(), q)[0] == 0).all()


def test_every_feature_has_a_kernel_on_the_cpu():
    from fastformer.backends.cpu import attention as cpu

    assert cpu.FEATURES == set(FEATURES)


def test_a_million_keys():
    # Over 2^31 elements of scores; positions, windows and rows count in 64 bits.
    n = 1 << 20
    q, k = normal(1, 1, 4096, 1), normal(1, 1, n, 1, seed=1)
    out, lse = F.attention(q, k, k, causal=True, window=(100, -1), return_lse=True)
    for i in (0, 1000, 4095):
        at = n - 4096 + i
        wanted, wanted_lse = attention_formula(
            q[:, :, i : i + 1].double(), *([k[:, :, at - 100 : at + 1].double()] * 2), return_lse=True
        )
        torch.testing.assert_close(out[:, :, i : i + 1].double(), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[:, :, i : i + 1].double(), wanted_lse, atol=1e-5, rtol=1e-5)


BAD = {
    "bias: shape": {"bias": torch.zeros(2, 3, 5, 6)},
    "bias: dtype": {"bias": torch.zeros(2, 4, 5, 6, dtype=torch.double)},
    "bias: expected": {"bias": 3},
    "attn_mask: dtype": {"attn_mask": torch.zeros(1, 1, 5, 6)},
    "attn_mask: shape": {"attn_mask": torch.zeros(5, 6, dtype=torch.bool)},
    r"relative_bias: the table's shape \(16, 4\)": {"relative_bias": (torch.zeros(16, 4), True, 32, 128)},
    "relative_bias: num_buckets 32 and max_distance 8": {"relative_bias": (torch.zeros(32, 4), True, 32, 8)},
    "alibi_slopes: shape": {"alibi_slopes": torch.zeros(3)},
    "alibi_slopes: expected": {"alibi_slopes": torch.zeros(4, dtype=torch.long)},
    r"window: \(-2, 0\) is below -1": {"window": (-2, 0)},
    "window: 5 is not": {"window": 5},
    "softcap: -1.0": {"softcap": -1.0},
    "softcap: inf": {"softcap": float("inf")},
    "dropout_p: 1.5": {"dropout_p": 1.5},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8)
    with pytest.raises((TypeError, ValueError), match=message):
        F.attention(q, k, k, **BAD[message])


FULL = {
    "relative_bias": (torch.randn(8, 4), True, 8, 20),
    "alibi_slopes": torch.rand(4),
    "attn_mask": some(1, 1, 9, 11),
    "window": (6, 2),
    "softcap": 3.0,
}


def test_compiles_to_one_graph():
    leaves = [normal(2, 4, 9, 8), normal(2, 2, 11, 8, seed=1), normal(1, 4, 9, 11, seed=2), FULL["relative_bias"][0]]

    def function(q, k, bias, table):
        given = FULL | {"relative_bias": (table, True, 8, 20)}
        return F.attention(q * 2, k, k, bias=bias, **given).sin()

    def run(f):
        inputs = [t.detach().requires_grad_() for t in leaves]
        out = f(*inputs)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, wanted in zip(run(compiled), run(function), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_operator_passes_torchs_own_checks():
    q, k, bias = normal(2, 4, 5, 8), normal(2, 2, 6, 8, seed=1), normal(1, 4, 1, 6, seed=2)
    distance = normal(4, 9, seed=3)
    for t in (q, k, bias, distance):
        t.requires_grad_()
    fields = {"causal": True, "bias": bias, "distance_bias": distance, "window_left": 4, "softcap": 2.0}
    torch.library.opcheck(torch.ops.fastformer.attention.default, (q, k, k, 0.5), fields)
    out, lse = (t.detach() for t in torch.ops.fastformer.attention(q, k, k, 0.5, **fields))
    fixed = {n: t.detach() if isinstance(t, Tensor) else t for n, t in fields.items()}
    args = (torch.randn_like(out), None, q.detach(), k.detach(), k.detach(), out, lse, True, True, 0.5)
    torch.library.opcheck(torch.ops.fastformer.attention_backward.default, args, fixed)


def test_vmap_and_grad_of_torch_func():
    q, bias = normal(3, 1, 4, 5, 4), normal(3, 1, 4, 1, 5, seed=1)

    def loss(attend):
        return lambda q, b: attend(q, q, q, causal=True, bias=b, softcap=2.0).square().sum()

    ours = torch.func.vmap(torch.func.grad(loss(F.attention), (0, 1)))(q, bias)
    wanted = torch.func.vmap(torch.func.grad(loss(attention_formula), (0, 1)))(q, bias)
    for o, w in zip(ours, wanted, strict=True):
        torch.testing.assert_close(o, w, atol=1e-5, rtol=1e-4)


def test_tensors_of_any_layout():
    """Rows that are not contiguous, as a transposed bias has them, or vmap over a last dimension."""
    q, k = normal(2, 4, 9, 8), normal(2, 2, 11, 8, seed=1)
    arguments = {
        "bias": normal(1, 4, 11, 9, seed=2).transpose(2, 3),
        "attn_mask": some(1, 1, 11, 9).transpose(2, 3),
        "key_padding_mask": some(11, 2, share=0.2).t(),
        "alibi_slopes": normal(4, 2).abs().t(),
    }
    wanted = F.attention(q, k, k, **{name: t.contiguous() for name, t in arguments.items()})
    assert torch.equal(F.attention(q, k, k, **arguments), wanted)
    bias = normal(2, 4, 9, 11, 3, seed=3)
    call = lambda b: F.attention(q, k, k, bias=b)  # noqa: E731
    apart = torch.stack([call(b.contiguous()) for b in bias.unbind(-1)])
    assert torch.equal(torch.func.vmap(call, in_dims=-1)(bias), apart)
