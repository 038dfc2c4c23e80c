"""fastformer.nn.MultiheadAttention beside torch.nn.MultiheadAttention."""

import itertools

import pytest
import torch

import fastformer
from fastformer import nn
from tests.nn.comparison import assert_as_accurate, assert_drop_in, compare

E, H = 24, 3  # head_dim 8
N, L, S = 2, 5, 7  # L != S, so a swapped dimension cannot pass

# Arbitrary masks and dropout have no fused kernel; that they are computed all the same is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:fastformer.attention")

MODULES = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim, vdim": {"kdim": 10, "vdim": 14},
    "kdim, vdim, no bias": {"kdim": 10, "vdim": 14, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both appended": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10},
}


def padding(source=S):
    mask = torch.zeros(N, source, dtype=torch.bool)
    mask[0, -2:] = True
    mask[1, 0] = True
    return mask


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def pair(arguments, dtype=torch.float32):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(E, H, dtype=dtype, **arguments)
    for p in theirs.parameters():  # biases start at zero, where an error in them would not show
        torch.nn.init.normal_(p, std=0.3)
    return nn.MultiheadAttention(E, H, dtype=dtype, **arguments), theirs


def tokens(length, size, batch_first, dtype=torch.float32):
    return torch.randn((N, length, size) if batch_first else (length, N, size), dtype=dtype)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", ["none", "padding", "attn", "attn 3d", "padding, attn", "float", "float 3d, padding"])
@pytest.mark.parametrize("name", MODULES)
def test_cross_attention(name, masks, need_weights, batch_first):
    ours, theirs = pair({**MODULES[name], "batch_first": batch_first})
    query = tokens(L, E, batch_first)
    key, value = tokens(S, theirs.kdim, batch_first), tokens(S, theirs.vdim, batch_first)
    shape = (N * H, L, S) if "3d" in masks else (L, S)
    attn = torch.rand(shape) < 0.3
    attn[..., 1] = False  # every query sees a key that is never padding
    kinds = {
        "key_padding_mask": padding() if "padding" in masks else None,
        "attn_mask": torch.randn(shape) if "float" in masks else attn if "attn" in masks else None,
    }
    if "float" in masks and kinds["key_padding_mask"] is not None:  # torch wants both masks of one kind
        kinds["key_padding_mask"] = torch.zeros(N, S).masked_fill(padding(), -torch.inf)

    def call(module, q, k, v):
        masks = {n: m if m is None or m.dtype == torch.bool else m.to(q.dtype) for n, m in kinds.items()}
        out, weights = module(q, k, v, need_weights=need_weights, average_attn_weights=False, **masks)
        assert (weights is not None) == need_weights
        # The weights take part in the comparison, gradients and all.
        return out if weights is None else torch.cat((out.flatten(), weights.flatten()))

    compare(ours, theirs, [query, key, value], call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "causal hint", "causal hint, padding"])
def test_self_attention_without_weights(masks, batch_first, dtype):
    ours, theirs = pair({"batch_first": batch_first}, dtype)
    kinds = {
        "key_padding_mask": padding(L) if "padding" in masks else None,
        "attn_mask": causal(L) if "causal" in masks else None,
        "is_causal": "hint" in masks,
    }
    if "padding" in masks and "causal" in masks:
        kinds["key_padding_mask"] = padding(L).roll(1, 1) & ~torch.eye(L, dtype=torch.bool)[:1]
    compare(ours, theirs, [tokens(L, E, batch_first, dtype)], lambda m, x: m(x, x, x, need_weights=False, **kinds)[0])


def test_key_is_value():
    ours, theirs = pair({"batch_first": True})
    compare(ours, theirs, [tokens(L, E, True), tokens(S, E, True)], lambda m, q, k: m(q, k, k, need_weights=False)[0])


@pytest.mark.parametrize(("average", "need_weights"), list(itertools.product([True, False], repeat=2)))
def test_a_single_sequence(average, need_weights):
    ours, theirs = pair({})
    ours.load_state_dict(theirs.state_dict())
    q, k = torch.randn(L, E), torch.randn(S, E)
    arguments = {
        "key_padding_mask": padding()[0],
        "attn_mask": torch.rand(H, L, S) < 0.2,
        "need_weights": need_weights,
        "average_attn_weights": average,
    }
    for mine, peers in zip(ours(q, k, k, **arguments), theirs(q, k, k, **arguments), strict=True):
        assert (mine is None) == (peers is None)
        if mine is not None:
            torch.testing.assert_close(mine, peers)


def test_averaged_weights():
    ours, theirs = pair({})
    ours.load_state_dict(theirs.state_dict())
    q, k = tokens(L, E, False), tokens(S, E, False)
    torch.testing.assert_close(ours(q, k, k)[1], theirs(q, k, k)[1])


def test_dropout():
    ours, theirs = pair({"dropout": 0.4})
    ours.load_state_dict(theirs.state_dict())
    x = tokens(L, E, False)

    def run(module, **kwargs):
        torch.manual_seed(11)
        return module(x, x, x, **kwargs)[0]

    torch.testing.assert_close(run(ours), run(theirs))  # with weights to return: torch's own draws
    # fused: draws of its own, from the same seed
    first = run(ours, need_weights=False)
    assert torch.equal(first, run(ours, need_weights=False))
    assert not torch.equal(first, ours(x, x, x, need_weights=False)[0])
    with torch.no_grad():
        draws = torch.stack([ours(x, x, x, need_weights=False)[0] for _ in range(1000)])
    ours.eval()
    theirs.eval()
    wanted = theirs(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], wanted)
    # scaled by 1 / (1 - p), so that the mean over many masks is the output without dropout, within five standard errors
    assert ((draws.mean(0) - wanted).abs() < 5 * draws.std(0) / 1000**0.5).all()


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_query_that_sees_nothing_gives_zeros(need_weights):
    ours, _ = pair({"batch_first": True})
    x = tokens(L, E, True).requires_grad_()
    mask = torch.zeros(N, L, dtype=torch.bool)
    mask[1] = True
    out, weights = ours(x, x, x, key_padding_mask=mask, need_weights=need_weights)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(L, E))
    assert weights is None or torch.equal(weights[1], torch.zeros(L, L))
    out.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.equal(x.grad[1], torch.zeros(L, E))


def test_head_dim_beyond_the_kernels():
    theirs = torch.nn.MultiheadAttention(600, 2, batch_first=True)
    compare(
        nn.MultiheadAttention(600, 2, batch_first=True),
        theirs,
        [torch.randn(1, 3, 600)],
        lambda m, x: m(x, x, x, need_weights=False)[0],
    )


def test_every_mask_has_a_kernel():
    ours, _ = pair({"batch_first": True})
    x = tokens(L, E, True)
    attn, numbers = causal(L), torch.randn(L, L)
    with fastformer.strict():
        for mask in (None, attn, numbers, numbers.expand(N * H, L, L)):
            for ignored in (None, padding(L), torch.randn(N, L)):
                ours(x, x, x, ignored, need_weights=False, attn_mask=mask)


def test_inside_a_torch_encoder_layer():
    torch.manual_seed(0)
    theirs = torch.nn.TransformerEncoderLayer(E, H, 40, dropout=0.0, batch_first=True)
    ours = torch.nn.TransformerEncoderLayer(E, H, 40, dropout=0.0, batch_first=True)
    ours.self_attn = nn.MultiheadAttention(E, H, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = tokens(L, E, True)
    for arguments in ({}, {"src_key_padding_mask": padding(L)}, {"src_mask": causal(L), "is_causal": True}):
        exact = theirs.double()(x.double(), **arguments)
        assert_as_accurate(str(arguments), ours(x, **arguments), theirs.float()(x, **arguments), exact)


@pytest.mark.parametrize("arguments", [*MODULES.values(), {"dropout": 0.1, "batch_first": True}], ids=str)
def test_is_a_drop_in(arguments):
    assert_drop_in(
        lambda: nn.MultiheadAttention(E, H, **arguments), lambda: torch.nn.MultiheadAttention(E, H, **arguments)
    )


def test_bad_arguments_are_named():
    for arguments, name in (((24, 5), "num_heads"), ((0, 1), "embed_dim"), ((24, 3, 1.5), "dropout")):
        with pytest.raises(ValueError, match=name):
            nn.MultiheadAttention(*arguments)


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        ({"query": torch.randn(N, L, 23)}, ValueError, "query"),
        ({"query": torch.randn(N, L, 2, E)}, ValueError, "query"),
        ({"key": torch.randn(N + 1, S, E), "value": torch.randn(N + 1, S, E)}, ValueError, "key"),
        ({"value": torch.randn(N, S + 1, E)}, ValueError, "value"),
        ({"value": torch.randn(S, E)}, ValueError, "value"),
        ({"key_padding_mask": padding(S - 1)}, ValueError, "key_padding_mask"),
        ({"key_padding_mask": padding().int()}, TypeError, "key_padding_mask"),
        ({"attn_mask": torch.zeros(S, L)}, ValueError, "attn_mask"),
        ({"attn_mask": torch.zeros(N, L, S)}, ValueError, "attn_mask"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.long)}, TypeError, "attn_mask"),
        ({"is_causal": True}, ValueError, "is_causal"),
    ],
)
def test_bad_input_is_named(changes, error, name):
    inputs = {"query": torch.randn(N, L, E), "key": torch.randn(N, S, E), "value": torch.randn(N, S, E)}
    module = nn.MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(error, match=f"^{name}"):
        module(**{**inputs, **changes})
