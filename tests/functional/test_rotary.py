"""rotary_embedding: values and gradients against float64 and against transformers, on each backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastformer
from fastformer import functional as F
from tests.nn.comparison import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = ["cpu", "reference"]

# (batch, heads, key/value heads, positions, head size, rotated)
SHAPES = [
    (1, 1, 1, 1, 2, 2),  # one pair
    (2, 4, 2, 5, 64, 64),  # whole vectors
    (1, 3, 1, 7, 18, 10),  # tails, and elements that are not rotated
    (2, 2, 2, 3, 80, 32),  # partial, as GPT-NeoX and GPT-J have it
    (0, 2, 2, 3, 8, 8),  # no sequences
    (2, 8, 2, 60, 128, 128),  # enough for two threads
]


def angles(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    a = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 100
    return a.cos().to(dtype), a.sin().to(dtype)


def plain(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, H, S, D), cos and sin (B, S, R / 2), in x's dtype, as models write it."""
    half = cos.shape[-1]
    both = (lambda t: t.repeat_interleave(2, -1)) if interleaved else (lambda t: torch.cat((t, t), -1))
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        swapped = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        swapped = torch.cat((-turned[..., half:], turned[..., :half]), -1)
    cos, sin = both(cos).unsqueeze(1).to(x.dtype), both(sin).unsqueeze(1).to(x.dtype)
    return torch.cat((turned * cos + swapped * sin, rest), -1)


def run(function, q: Tensor, k: Tensor) -> list[Tensor]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    outs = function(q, k)
    g = torch.Generator().manual_seed(5)
    upstream = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in outs]
    return [*(t.detach() for t in outs), *torch.autograd.grad(outs, (q, k), upstream)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, interleaved, dtype, backend):
    batch, heads, kv_heads, length, head_dim, rotated = shape
    q, k = (
        torch.randn(batch, heads, length, head_dim).to(dtype),
        torch.randn(batch, kv_heads, length, head_dim).to(dtype),
    )
    cos, sin = angles(length + 3, rotated // 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    rows = [t[3:].expand(batch, -1, -1) for t in (cos, sin)]
    both = lambda *tables: lambda q, k: tuple(plain(x, *tables, interleaved) for x in (q, k))  # noqa: E731
    wanted = run(both(*(t.double() for t in rows)), q.double(), k.double())
    same = run(both(*rows), q, k)
    with fastformer.backend(backend):
        ours = run(lambda q, k: F.rotary_embedding(q, k, cos, sin, position_offset=3, interleaved=interleaved), q, k)
    for name, o, s, w in zip(("q", "k", "dq", "dk"), ours, same, wanted, strict=True):
        assert_as_accurate(name, o, s, w)


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_in_every_form(backend):
    q, k = torch.randn(3, 4, 5, 16), torch.randn(3, 2, 5, 16)
    cos, sin = angles(40, 8)
    with fastformer.backend(backend):
        for shape in ((3, 5), (1, 5), (5,), (3, 1), (1,)):
            for dtype in (torch.int64, torch.int32):
                ids = torch.randint(40, shape, dtype=dtype)
                wanted = [plain(x, *(t[ids.long().expand(3, 5)] for t in (cos, sin)), False) for x in (q, k)]
                torch.testing.assert_close(F.rotary_embedding(q, k, cos, sin, position_ids=ids), tuple(wanted))
        offsets = torch.tensor([0, 30, 7])
        ids = offsets[:, None] + torch.arange(5)
        by_id = F.rotary_embedding(q, k, cos, sin, position_ids=ids)
        assert all(map(torch.equal, by_id, F.rotary_embedding(q, k, cos, sin, position_offset=offsets)))
        # a row for every token, as transformers passes them: each angle twice
        rows = [torch.cat((t[ids], t[ids]), -1)[..., :8] for t in (cos, sin)]
        assert all(map(torch.equal, by_id, F.rotary_embedding(q, k, *rows)))
        shared = F.rotary_embedding(q, k, cos[None, 2:7], sin[None, 2:7])
        assert all(map(torch.equal, shared, F.rotary_embedding(q, k, cos, sin, position_offset=2)))
        alone, none = F.rotary_embedding(q, None, cos, sin)
        assert none is None and torch.equal(alone, F.rotary_embedding(q, k, cos, sin)[0])
        unbatched = F.rotary_embedding(q[0], k[0], cos, sin)
        assert all(torch.equal(a, b[0]) for a, b in zip(unbatched, F.rotary_embedding(q, k, cos, sin), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_any_strides(inplace, backend):
    cos, sin = angles(9, 8)
    packed = torch.randn(2, 9, 3, 4, 16)  # (B, S, qkv, H, D)
    q, k = (packed[:, :, i].transpose(1, 2) for i in (0, 1))
    with fastformer.backend(backend):
        wanted = F.rotary_embedding(q.contiguous(), k.contiguous(), cos, sin)
        value = packed[:, :, 2].clone()
        out = F.rotary_embedding(q, k, cos, sin, inplace=inplace)
        assert all(map(torch.equal, out, wanted)) and torch.equal(packed[:, :, 2], value)
        assert not inplace or (out[0] is q and torch.equal(packed[:, :, 0].transpose(1, 2), wanted[0]))
        if not inplace:  # the result lies in memory as its input does
            assert out[0].transpose(1, 2).is_contiguous()
            apart = torch.randn(2, 4, 9, 32)[..., ::2]
            assert torch.equal(*(F.rotary_embedding(t, None, cos, sin)[0] for t in (apart, apart.contiguous())))
            same = torch.randn(1, 1, 9, 16).expand(2, 4, 9, 16)
            assert torch.equal(*(F.rotary_embedding(t, None, cos, sin)[0] for t in (same, same.contiguous())))


def test_in_place_with_gradients():
    cos, sin = angles(5, 4)
    leaves = [torch.randn(2, 3, 5, 12, requires_grad=True) for _ in range(2)]
    upstream = torch.randn(2, 3, 5, 12)
    results = []
    for inplace in (False, True):
        for unbatch in (False, True):
            q, k = (x * 2 for x in leaves)
            if unbatch:
                q, k = q.flatten(0, 1), k.flatten(0, 1)
            out = F.rotary_embedding(q, k, cos, sin, inplace=inplace)
            assert (out[0] is q) == inplace
            total = sum((t * upstream.view(t.shape)).sum() for t in out)
            results.append([*(t.detach().view(2, 3, 5, 12) for t in out), *torch.autograd.grad(total, leaves)])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
    with pytest.raises(RuntimeError, match="leaf Variable"):
        F.rotary_embedding(leaves[0], None, cos, sin, inplace=True)


def test_only_one_of_the_outputs_is_used():
    cos, sin = angles(5, 4)
    q, k = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 1, 5, 8, requires_grad=True)
    for i, x in enumerate((q, k)):
        out = F.rotary_embedding(q, k, cos, sin)[i]
        found = torch.autograd.grad(out, (q, k), torch.ones_like(out), allow_unused=True)
        assert found[1 - i] is None
        torch.testing.assert_close(found[i], F.rotary_embedding(torch.ones_like(x), None, cos, -sin)[0])


def test_gradcheck_twice():
    cos, sin = angles(3, 2, dtype=torch.float64)
    q, k = (torch.randn(2, h, 3, 6, dtype=torch.float64, requires_grad=True) for h in (2, 1))
    for interleaved in (False, True):
        function = lambda q, k: F.rotary_embedding(q, k, cos, sin, interleaved=interleaved)  # noqa: B023, E731
        assert torch.autograd.gradcheck(function, (q, k))
        assert torch.autograd.gradgradcheck(function, (q, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_matches_transformers(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    from transformers.models.gpt_neox import modeling_gpt_neox as neox
    from transformers.models.gptj import modeling_gptj as gptj

    q, k = torch.randn(2, 4, 7, 32), torch.randn(2, 4, 7, 32)
    cos, sin = angles(2, 7, 16)
    twice = lambda t, n: torch.cat((t[..., :n], t[..., :n]), -1)  # noqa: E731
    for name, half, interleaved, theirs in (
        ("Llama", 16, False, lambda q, k, cos, sin: llama.apply_rotary_pos_emb(q, k, twice(cos, 16), twice(sin, 16))),
        ("GPT-NeoX", 4, False, lambda q, k, cos, sin: neox.apply_rotary_pos_emb(q, k, twice(cos, 4), twice(sin, 4))),
        ("GPT-J", 16, True, lambda q, k, cos, sin: tuple(
            gptj.apply_rotary_pos_emb(x.transpose(1, 2), sin, cos).transpose(1, 2) for x in (q, k))),
    ):  # fmt: skip
        tensors = [x.to(dtype) for x in (q, k)]
        c, s = (t[..., :half] for t in (cos, sin))
        exact = run(lambda q, k: theirs(q, k, c.double(), s.double()), *(x.double() for x in tensors))  # noqa: B023
        same = run(lambda q, k: theirs(q, k, c.to(dtype), s.to(dtype)), *tensors)  # noqa: B023
        ours = run(lambda q, k: F.rotary_embedding(q, k, c, s, interleaved=interleaved), *tensors)  # noqa: B023
        for what, o, t, e in zip(("q", "k", "dq", "dk"), ours, same, exact, strict=True):
            assert_as_accurate(f"{name} {what}", o, t, e)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 20), st.booleans(), st.integers(0, 50), st.integers(0, 2**31))
def test_scores_depend_on_the_distance_alone(half, rest, interleaved, shift, seed):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 1, 4, 2 * half + rest, generator=g, dtype=torch.float64) for _ in range(2))
    angle = torch.arange(60, dtype=torch.float64)[:, None] * torch.rand(half, generator=g, dtype=torch.float64)
    scores = []
    for offset in (0, shift):
        turned = F.rotary_embedding(q, k, angle.cos(), angle.sin(), position_offset=offset, interleaved=interleaved)
        torch.testing.assert_close(turned[0].norm(dim=-1), q.norm(dim=-1))  # a rotation
        scores.append(turned[0] @ turned[1].mT)
    torch.testing.assert_close(*scores)


Q, COS = torch.randn(2, 3, 5, 8), torch.randn(9, 4)
BAD = {
    "q: expected a torch.Tensor, got int": lambda: F.rotary_embedding(1, None, COS, COS),
    r"q: expected \(B, H, S, D\) or \(H, S, D\)": lambda: F.rotary_embedding(Q[0, 0], None, COS, COS),
    r"k: shape \(2, 3, 4, 8\) is not q's": lambda: F.rotary_embedding(Q, Q[:, :, :4], COS, COS),
    "k: dtype torch.float64 differs": lambda: F.rotary_embedding(Q, Q.double(), COS, COS),
    r"sin: shape \(8, 4\) is not \(9, 4\)": lambda: F.rotary_embedding(Q, None, COS, COS[:8]),
    "cos: dtype torch.float64 beside q of torch.float32": lambda: F.rotary_embedding(
        Q, None, COS.double(), COS.double()
    ),
    "cos: 5 angles turn 10 elements, of a head_dim of 8": lambda: F.rotary_embedding(
        Q, None, torch.zeros(9, 5), torch.zeros(9, 5)
    ),
    r"cos: shape \(4,\) is neither": lambda: F.rotary_embedding(Q, None, COS[0], COS[0]),
    r"cos: shape \(2, 4, 4\) is neither \(positions, R / 2\) nor \(2 or 1, 5, R / 2\)": lambda: F.rotary_embedding(
        Q, None, torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    ),
    "sin: requires a gradient": lambda: F.rotary_embedding(Q, None, COS, COS.clone().requires_grad_()),
    "position_ids: 9 at": lambda: F.rotary_embedding(Q, None, COS, COS, position_ids=torch.tensor([0, 1, 9, 2, 3])),
    "position_ids: -1 at": lambda: F.rotary_embedding(Q, None, COS, COS, position_ids=torch.tensor([[0], [-1]])),
    "position_ids: 10 positions, but cos and sin have 9 rows": lambda: F.rotary_embedding(
        Q, None, COS, COS, position_offset=5
    ),
    r"position_ids: shape \(3,\) is not broadcastable to \(2, 5\)": lambda: F.rotary_embedding(
        Q, None, COS, COS, position_ids=torch.tensor([0, 1, 2])
    ),
    "position_ids: dtype torch.float32": lambda: F.rotary_embedding(Q, None, COS, COS, position_ids=torch.zeros(5)),
    "position_offset: -1 is negative": lambda: F.rotary_embedding(Q, None, COS, COS, position_offset=-1),
    r"position_offset: shape \(1,\) is not \(2,\)": lambda: F.rotary_embedding(
        Q, None, COS, COS, position_offset=torch.tensor([1])
    ),
    "position_offset: given beside position_ids": lambda: F.rotary_embedding(
        Q, None, COS, COS, position_ids=torch.zeros(5, dtype=torch.int64), position_offset=1
    ),
    "q: strides .* cannot be written in place": lambda: F.rotary_embedding(
        Q[:1].expand(2, 3, 5, 8).mT.contiguous().mT, None, COS, COS, inplace=True
    ),
    r"k: strides \(0, ": lambda: F.rotary_embedding(Q.clone(), Q[:1].expand(2, 3, 5, 8), COS, COS, inplace=True),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_names_the_argument(message, backend):
    with fastformer.backend(backend), pytest.raises((TypeError, ValueError, IndexError), match=message):
        BAD[message]()


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_to_one_graph(inplace):
    cos, sin = angles(9, 4)
    q, k = torch.randn(2, 3, 9, 12), torch.randn(2, 1, 9, 12)

    def function(q, k):
        q, k = F.rotary_embedding(q * 2, k * 2, cos, sin, inplace=inplace)
        return q + 0, k + F.rotary_embedding(k, None, cos, sin, interleaved=True)[0]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, wanted in zip(run(compiled, q, k), run(function, q, k), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_torch_func_transforms():
    cos, sin = angles(5, 4)
    q = torch.randn(3, 2, 5, 8)
    weight = torch.randn(2, 5, 8)
    grad = torch.func.vmap(torch.func.grad(lambda x: (F.rotary_embedding(x, None, cos, sin)[0] * weight).sum()))(q)
    torch.testing.assert_close(grad, F.rotary_embedding(weight, None, cos, -sin)[0].expand(3, -1, -1, -1))


def test_repeats_bit_for_bit_at_any_number_of_threads():
    q, (cos, sin) = torch.randn(2, 8, 200, 64), angles(200, 32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(F.rotary_embedding(q, None, cos, sin)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
