"""embedding and transformer_embedding: values and every gradient against float64, on each backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as TF

import fastformer
from fastformer import functional as F
from tests.nn.comparison import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = ["cpu", "reference"]

# (batch, sequence, columns)
SHAPES = [
    (1, 1, 1),  # nothing to vectorise
    (0, 5, 8),  # no sequences: gradients are zeros
    (2, 3, 7),  # shorter than any vector
    (3, 5, 64),  # whole vectors
    (2, 9, 257),  # a tail of one
    (4, 60, 130),  # rows taken often: more than one partial sum; enough for two threads
]
VOCABULARY, POSITIONS, TYPES, PADDING = 23, 64, 2, 4

VARIANTS = {
    "tokens": {},
    "tokens, scaled": {"scale": 3.0},
    "GPT-2": {"positions": True, "position_offset": 2},
    "positions by id": {"positions": True, "position_ids": True},
    "T5's padding": {"padding_idx": PADDING},
    "BERT": {"positions": True, "types": True, "norm": True, "padding_idx": PADDING},
    "BERT's defaults": {"positions": True, "types": "zeros", "norm": "plain"},
}


def make(variant: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict]:
    """The tensors with gradients, by argument, and the other arguments."""
    g = torch.Generator().manual_seed(3)
    batch, length, cols = shape
    wanted = dict(VARIANTS[variant])
    draw = lambda *s: torch.randn(s, generator=g).to(dtype)  # noqa: E731
    ids = lambda n: torch.randint(n, (batch, length), generator=g)  # noqa: E731
    leaves, options = {"token_weight": draw(VOCABULARY, cols)}, {"input_ids": ids(VOCABULARY)}
    if wanted.pop("positions", False):
        leaves["position_weight"] = draw(POSITIONS, cols)
        if wanted.pop("position_ids", False):
            options["position_ids"] = ids(POSITIONS)
    types = wanted.pop("types", False)
    if types:
        leaves["token_type_weight"] = draw(TYPES, cols)
        if types != "zeros":
            options["token_type_ids"] = ids(TYPES)
    norm = wanted.pop("norm", False)
    if norm:
        options["norm_eps"] = 1e-5
        if norm != "plain":
            leaves["norm_weight"], leaves["norm_bias"] = draw(cols), draw(cols)
    return leaves, options | wanted


def plain(
    input_ids, token_weight, position_weight=None, token_type_weight=None, *, position_ids=None, position_offset=0,
    token_type_ids=None, scale=1.0, padding_idx=None, norm_weight=None, norm_bias=None, norm_eps=None,
):  # fmt: skip
    """The same with PyTorch's functions."""
    out = TF.embedding(input_ids, token_weight, padding_idx) * scale
    if position_weight is not None:
        if position_ids is None:
            position_ids = torch.arange(position_offset, position_offset + input_ids.shape[-1])
        out = out + TF.embedding(position_ids, position_weight)
    if token_type_weight is not None:
        out = out + TF.embedding(
            torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids, token_type_weight
        )
    if norm_eps is not None:
        out = TF.layer_norm(out, out.shape[-1:], norm_weight, norm_bias, norm_eps)
    return out


def run(function, leaves: dict[str, Tensor], options: dict) -> list[Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    out = function(**leaves, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_gradients(variant, shape, dtype, backend):
    leaves, options = make(variant, shape, dtype)
    if shape[-1] == 1 and "norm_eps" in options:
        pytest.skip("the norm of one element: its gradient is a difference of equal numbers")
    wanted = run(plain, {n: t.double() for n, t in leaves.items()}, options)
    same = run(plain, leaves, options)
    with fastformer.backend(backend):
        ours = run(F.transformer_embedding, leaves, options)
    for name, o, s, w in zip(("output", *leaves), ours, same, wanted, strict=True):
        assert_as_accurate(f"{variant} {name}", o, s, w)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "ids", [torch.tensor(3), torch.tensor([[[5, 1], [5, 22]]]), torch.zeros(2, 0, dtype=torch.int64)]
)
def test_embedding_copies_rows_of_any_index_shape(ids, dtype, backend):
    weight = torch.randn(VOCABULARY, 33).to(dtype)
    with fastformer.backend(backend):
        for index in (ids, ids.int()):
            out = F.embedding(index, weight)
            assert torch.equal(out, TF.embedding(ids, weight)) and out.dtype == dtype
        wide = torch.randn(VOCABULARY, 90).to(dtype)[:, 20:53]  # rows at a distance
        assert torch.equal(F.embedding(ids, wide), TF.embedding(ids, wide))
        assert torch.equal(F.embedding(ids, weight.t().contiguous().t()), TF.embedding(ids, weight))


@pytest.mark.parametrize("padding_idx", [None, 0, 5, -1, -VOCABULARY])
def test_padding_gets_no_gradient(padding_idx):
    weight = torch.randn(VOCABULARY, 8, requires_grad=True)
    ids = torch.arange(2 * VOCABULARY) % VOCABULARY
    ours, theirs = (
        torch.autograd.grad(f(ids, weight, padding_idx).square().sum(), weight)[0] for f in (F.embedding, TF.embedding)
    )
    torch.testing.assert_close(ours, theirs)
    assert padding_idx is None or not ours[padding_idx].any()


@pytest.mark.parametrize(
    "options",
    [{"max_norm": 1.0}, {"max_norm": 0.5, "norm_type": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}],
    ids=str,
)
def test_options_without_a_kernel_run_torchs_own(options):
    ids = torch.tensor([1, 1, 5, 2])
    results = []
    for f in (F.embedding, TF.embedding):
        leaf = torch.arange(40.0).view(8, 5).requires_grad_()
        weight = leaf.clone() if "max_norm" in options else leaf  # it is written to
        with pytest.warns(UserWarning, match="no fused kernel for") if f is F.embedding else _nothing():
            registry_forget()
            out = f(ids, weight.detach() if "max_norm" in options else weight, **options)
        results.append((out, None if "max_norm" in options else torch.autograd.grad(out.sum(), leaf)[0].to_dense()))
    torch.testing.assert_close(*results)
    with fastformer.strict(), pytest.raises(ValueError, match=next(iter(options))):
        F.embedding(ids, torch.randn(8, 5), **options)


def registry_forget():
    from fastformer.backends import registry

    registry._warned.clear()


def _nothing():
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_broadcast(backend):
    ids, table = torch.randint(VOCABULARY, (2, 3, 5)), torch.randn(POSITIONS, 16)
    weight = torch.randn(VOCABULARY, 16)
    with fastformer.backend(backend):
        for shape in ((5,), (1, 1, 5), (3, 5), (2, 1, 5), (2, 1, 1), (1,), (2, 3, 5)):
            positions = torch.randint(POSITIONS, shape)
            out = F.transformer_embedding(ids, weight, table, position_ids=positions)
            torch.testing.assert_close(out, weight[ids] + table[positions])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_the_same_forward_and_backward_and_follows_the_seed(backend, normalize):
    ids = torch.arange(64)
    weight = torch.rand(64, 200) + 1
    options = {"norm_eps": 1e-5} if normalize else {}

    def call(w, **more):
        torch.manual_seed(11)
        return F.transformer_embedding(ids, w, **options, **more)

    with fastformer.backend(backend):
        base, leaf = call(weight), weight.clone().requires_grad_()
        out = call(leaf, dropout_p=0.25)
        again, none = call(weight, dropout_p=0.25), call(weight, dropout_p=1.0)
        off = call(weight, dropout_p=0.25, training=False)
        upstream = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, leaf, upstream)
        kept = out != 0
        (wanted,) = torch.autograd.grad(call(leaf), leaf, upstream * kept / 0.75)
    assert torch.equal(out, again) and torch.equal(off, base) and (none == 0).all()
    torch.testing.assert_close(out, base * kept / 0.75)
    torch.testing.assert_close(grad, wanted)
    assert abs(kept.float().mean().item() - 0.75) < 5 * (0.75 * 0.25 / kept.numel()) ** 0.5


def test_the_dropout_mask_is_the_same_on_every_backend():
    weight, masks = torch.ones(33, 129), []
    for backend in BACKENDS:
        torch.manual_seed(4)
        with fastformer.backend(backend):
            masks.append(F.transformer_embedding(torch.arange(33), weight, dropout_p=0.4))
    assert torch.equal(*masks)


@pytest.mark.parametrize("frozen", ["token_weight", "position_weight", "token_type_weight", "norm_weight", "norm_bias"])
def test_a_frozen_parameter_gets_no_gradient_and_changes_no_other(frozen):
    leaves, options = make("BERT", (2, 5, 24), torch.float64)
    wanted = dict(zip(leaves, run(F.transformer_embedding, leaves, options)[1:], strict=True))
    tensors = {name: t.clone().requires_grad_(name != frozen) for name, t in leaves.items()}
    out = F.transformer_embedding(**tensors, **options)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    for name, t in tensors.items():
        assert t.grad is None if name == frozen else torch.equal(t.grad, wanted[name])


def test_a_table_may_change_before_backward_where_no_norm_needs_it():
    weight = torch.randn(8, 4, requires_grad=True)
    ids = torch.tensor([1, 5, 1])
    out = F.embedding(ids, weight)
    with torch.no_grad():
        weight.add_(1)  # an optimiser's step between two backward passes
    (grad,) = torch.autograd.grad(out.sum(), weight)
    assert torch.equal(grad[:, 0], torch.tensor([0.0, 2, 0, 0, 0, 1, 0, 0]))
    out = F.transformer_embedding(ids, weight, norm_eps=1e-5)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradcheck():
    leaves, options = make("BERT", (2, 3, 5), torch.float64)
    names = list(leaves)
    call = lambda *t: F.transformer_embedding(**dict(zip(names, t, strict=True)), **(options | {"padding_idx": None}))  # noqa: E731
    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in leaves.values()])
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: F.embedding(torch.tensor([[1, 1], [5, 0]]), w), weight)


def test_repeats_bit_for_bit_at_any_number_of_threads():
    leaves, options = make("BERT", (8, 64, 96), torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 4):
            torch.set_num_threads(threads)
            results.append(run(F.transformer_embedding, leaves, options))
    finally:
        torch.set_num_threads(before)
    for i, (one, *others) in enumerate(zip(*results, strict=True)):
        # The norm's own gradients are summed per thread; all else has one order.
        assert torch.equal(others[0], others[1]) and (i > 3 or all(torch.equal(one, o) for o in others))


def test_many_takers_of_one_row_keep_float32_digits():
    # 2^16 equal terms: added one by one in float32, the last ones lose a third of their digits.
    weight, ids = torch.zeros(3, 4, requires_grad=True), torch.ones(2**16, dtype=torch.int64)
    (grad,) = torch.autograd.grad(F.embedding(ids, weight), weight, torch.full((2**16, 4), 0.1))
    torch.testing.assert_close(grad[1], torch.full((4,), 2**16 * 0.1), rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 70), st.booleans(), st.integers(0, 2**31))
def test_gradient_of_the_table_is_the_scatter_of_the_upstream(rows, count, cols, spread, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=g, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(rows if spread else 1, (count,), generator=g)
    upstream = torch.randn(count, cols, generator=g, dtype=torch.float64)
    (grad,) = torch.autograd.grad(F.embedding(ids, weight), weight, upstream)
    torch.testing.assert_close(grad, torch.zeros(rows, cols, dtype=torch.float64).index_add_(0, ids, upstream))


IDS, W = torch.tensor([[1, 2, 3]]), torch.randn(6, 4)
BAD = {
    "input: entry 1 is 6, not in": lambda: F.embedding(torch.tensor([0, 6]), W),
    "input: entry 0 is -1, not in": lambda: F.embedding(torch.tensor([-1, 6]), W),
    r"input: entry 0 is 0, not in \[0, 0\)": lambda: F.embedding(torch.tensor([0]), W[:0]),
    "input_ids: entry 2 is 3, not in": lambda: F.transformer_embedding(IDS, W[:3]),
    "position_ids: entry 0 is 9, not in": lambda: F.transformer_embedding(IDS, W, W, position_ids=IDS + 8),
    "token_type_ids: entry 1 is 2, not in": lambda: F.transformer_embedding(
        IDS, W, None, W[:2], token_type_ids=torch.tensor([1, 2, 0])
    ),
    "position_weight: has 6 rows, and 7 positions": lambda: F.transformer_embedding(IDS, W, W, position_offset=4),
    "input: dtype torch.float32 is not int64 or int32": lambda: F.embedding(W, W),
    "input: expected a torch.Tensor, got list": lambda: F.embedding([1], W),
    r"weight: expected \(rows, columns\), got shape \(4,\)": lambda: F.embedding(IDS, W[0]),
    "weight: dtype torch.int64 is not one of": lambda: F.embedding(IDS, IDS),
    r"padding_idx: 6 is not in \[-6, 6\)": lambda: F.embedding(IDS, W, 6),
    r"input_ids: expected \(\*, S\), got a scalar": lambda: F.transformer_embedding(torch.tensor(1), W),
    "position_weight: dtype torch.float64 differs": lambda: F.transformer_embedding(IDS, W, W.double()),
    "token_type_weight: rows of 3 beside token_weight's 4": lambda: F.transformer_embedding(IDS, W, None, W[:, :3]),
    "position_ids: given without position_weight": lambda: F.transformer_embedding(IDS, W, position_ids=IDS),
    r"position_ids: shape \(2,\) does not broadcast": lambda: F.transformer_embedding(
        IDS, W, W, position_ids=IDS[0, :2]
    ),
    "position_offset: 2 is negative, or given beside": lambda: F.transformer_embedding(
        IDS, W, W, position_ids=IDS, position_offset=2
    ),
    "position_offset: given without position_weight": lambda: F.transformer_embedding(IDS, W, position_offset=2),
    "norm_eps: needed beside": lambda: F.transformer_embedding(IDS, W, norm_weight=W[0]),
    "norm_eps: -1 is negative": lambda: F.transformer_embedding(IDS, W, norm_eps=-1),
    r"norm_bias: shape \(3,\) is not \(4,\)": lambda: F.transformer_embedding(
        IDS, W, norm_bias=W[0, :3], norm_eps=1e-5
    ),
    r"dropout_p: 1.5 is not in \[0, 1\]": lambda: F.transformer_embedding(IDS, W, dropout_p=1.5),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_names_the_argument(message, backend):
    with fastformer.backend(backend), pytest.raises((TypeError, ValueError, IndexError), match=message):
        BAD[message]()


def test_an_index_out_of_range_is_an_index_error():
    for index in (-1, 6):
        with pytest.raises(IndexError, match=f"input: entry 0 is {index}"):
            F.embedding(torch.tensor(index), W)


def test_compiles_to_one_graph():
    leaves, options = make("BERT", (2, 5, 24), torch.float32)

    def function(**tensors):
        out = F.transformer_embedding(**tensors, **options)
        return out + F.embedding(options["input_ids"], tensors["token_weight"])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, wanted in zip(run(compiled, leaves, {}), run(function, leaves, {}), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_torch_func_transforms():
    ids, weight = torch.randint(VOCABULARY, (3, 5)), torch.randn(VOCABULARY, 8)
    ours = torch.func.vmap(torch.func.grad(lambda w, i: F.embedding(i, w).square().sum()), (None, 0))(weight, ids)
    theirs = torch.func.vmap(torch.func.grad(lambda w, i: w[i].square().sum()), (None, 0))(weight, ids)
    torch.testing.assert_close(ours, theirs)


def test_explain_names_the_backend():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    assert fastformer.explain("embedding", ids, W, norm_eps=1e-5, dropout_p=0.1).backend == "cpu"
