"""Padded batches without gradients: what torch's encoder gives at padding, and that ours computes nothing for it."""

import contextlib

import pytest
import torch

from fastformer import functional, nn

E, H, HIDDEN = 16, 4, 24
N, S = 4, 6

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]


def lengths(*values):
    """The padding mask of sequences of these lengths."""
    return torch.arange(S) >= torch.tensor(values)[:, None]


ALIGNED = lengths(3, 1, 6, 5)


def pair(layer_options=(), **options):
    """Encoders of two layers and a final norm, ours and torch's, the same weights."""
    encoders = []
    for package in (nn, torch.nn):
        torch.manual_seed(0)
        layer = package.TransformerEncoderLayer(E, H, HIDDEN, **{"batch_first": True, **dict(layer_options)})
        encoders.append(package.TransformerEncoder(layer, 2, package.LayerNorm(E), **options))
        for p in encoders[-1].parameters():  # a norm's bias of zero would hide what it is applied to
            torch.nn.init.normal_(p, std=0.3)
        encoders[-1].eval()
    return encoders


@pytest.fixture
def packed(monkeypatch):
    """The numbers of rows that attention was given packed, call by call."""
    rows, varlen = [], functional.attention_varlen
    monkeypatch.setattr(functional, "attention_varlen", lambda q, *a, **k: rows.append(len(q)) or varlen(q, *a, **k))
    return rows


@contextlib.contextmanager
def without_fast_path():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


CASES = {
    # name: (mask, options of the encoder, options of the layer, rows attention is given packed, padding is zero)
    "left-aligned": (ALIGNED, {}, {}, 15, True),
    "no padding": (lengths(6, 6, 6, 6), {}, {}, 24, True),
    "a sequence of nothing": (lengths(0, 6, 2, 1), {}, {}, 9, True),
    "nothing at all": (lengths(0, 0, 0, 0), {}, {}, 0, True),
    "added": (torch.zeros(N, S).masked_fill(ALIGNED, -torch.inf), {}, {}, 15, True),
    "gelu, wider": (ALIGNED, {}, {"activation": "gelu", "layer_norm_eps": 1e-3}, 15, True),
    "aligned at the right": (ALIGNED.flip(1), {}, {}, None, False),
    # torch then takes as many of the first positions as there are tokens anywhere
    "aligned at the right, unchecked": (ALIGNED.flip(1), {"mask_check": False}, {}, 15, True),
    "nested tensors refused": (ALIGNED, {"enable_nested_tensor": False}, {}, None, False),
    "pre-norm": (ALIGNED, {}, {"norm_first": True}, None, False),
    "sequence first": (ALIGNED, {}, {"batch_first": False}, None, False),
    "no bias": (ALIGNED, {}, {"bias": False}, None, False),
    "another activation": (ALIGNED, {}, {"activation": torch.tanh}, None, False),
}


@pytest.mark.parametrize("name", CASES)
def test_padding_is_what_torch_makes_it(name, packed):
    mask, options, layer_options, rows, zero = CASES[name]
    ours, theirs = pair(layer_options, **options)
    assert ours.use_nested_tensor == theirs.use_nested_tensor
    x = torch.randn(N, S, E)
    x = x if layer_options.get("batch_first", True) else x.transpose(0, 1)
    with torch.no_grad():
        if name == "nothing at all":  # which torch cannot do
            wanted = theirs.norm(torch.zeros(N, S, E))
        else:
            wanted = theirs(x, src_key_padding_mask=mask)
        out = ours(x, src_key_padding_mask=mask)
    torch.testing.assert_close(out, wanted)
    assert packed == ([] if rows is None else [rows, rows])
    if zero:
        counts = S - torch.logical_not(mask.logical_not()).sum(1)
        zeroed = torch.arange(S) >= counts[:, None]
        assert torch.equal((out == ours.norm.bias).all(-1), zeroed)


OTHERWISE = {
    "training": lambda encoder: encoder.train(),
    "gradients recorded": lambda encoder: torch.enable_grad(),
    "a mask": lambda encoder: None,
    "path switched off": lambda encoder: without_fast_path(),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_otherwise_padding_is_computed(name, packed):
    ours, theirs = pair({"dropout": 0.0})
    x, outs = torch.randn(N, S, E), []
    mask = torch.zeros(S, S, dtype=torch.bool) if name == "a mask" else None
    for encoder in (ours, theirs):
        entered = OTHERWISE[name](encoder)
        context = entered if hasattr(entered, "__enter__") else contextlib.nullcontext()
        with torch.no_grad(), context:
            outs.append(encoder(x, mask, ALIGNED))
    torch.testing.assert_close(*outs)
    assert not packed and not torch.allclose(outs[0][1, -1], ours.norm.bias, atol=0.1)


def test_autocast_computes_padding(packed):
    ours, _ = pair()  # torch's path for inference fails under a CPU's autocast
    x = torch.randn(N, S, E)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = ours(x, None, ALIGNED)
    torch.testing.assert_close(out, ours(x, None, ALIGNED), rtol=0.05, atol=0.1)
    assert not packed


def test_inference_mode_and_frozen_weights(packed):
    ours, theirs = pair()
    x = torch.randn(N, S, E)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x, None, ALIGNED), theirs(x, None, ALIGNED))
    for encoder in (ours, theirs):
        encoder.requires_grad_(False)
    torch.testing.assert_close(ours(x, None, ALIGNED), theirs(x, None, ALIGNED))
    assert packed == [15] * 4


def test_a_hooked_layer_sees_the_batch_and_padding_is_zero_all_the_same(packed):
    ours, theirs = pair()
    x, seen = torch.randn(N, S, E), []
    ours.layers[1].linear1.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape))
    ours.layers[0].register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    with torch.no_grad():
        torch.testing.assert_close(ours(x, None, ALIGNED), theirs(x, None, ALIGNED))
    assert not packed and seen == [(N, S, E), (N, S, E)]


def test_torchs_layers_in_our_encoder():
    _, theirs = pair()
    ours = nn.TransformerEncoder(theirs.layers[0], 2, theirs.norm).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(N, S, E)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, None, ALIGNED), theirs(x, None, ALIGNED))
    mask = torch.zeros(S, S).masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(ours(x, mask, ALIGNED), theirs(x, mask, ALIGNED))


def test_our_layer_in_torchs_encoder(packed):
    ours, theirs = pair()
    mixed = torch.nn.TransformerEncoder(ours.layers[0], 2, ours.norm).eval()
    mixed.load_state_dict(theirs.state_dict())
    assert mixed.use_nested_tensor  # torch turns the batch into a nested tensor and hands that to our layer
    x = torch.randn(N, S, E)
    with torch.no_grad():
        torch.testing.assert_close(mixed(x, None, ALIGNED), theirs(x, None, ALIGNED))
    assert packed == [15, 15]
    torch.testing.assert_close(mixed(x, None, ALIGNED), theirs(x, None, ALIGNED))  # gradients recorded: padded


def test_a_single_layer_computes_padding():
    ours, theirs = (encoder.layers[0] for encoder in pair())
    x = torch.randn(N, S, E)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, None, ALIGNED), theirs(x, None, ALIGNED))


def test_nested_tensors():
    """As torch's: without gradients and masks; its attention likewise."""
    ours, theirs = (encoder.layers[0] for encoder in pair())
    sequences = [torch.randn(n, E) for n in (3, 1, 6)]
    nested = torch.nested.nested_tensor(sequences)
    with torch.no_grad():
        for mine, peer in zip(ours(nested).unbind(), theirs(nested).unbind(), strict=True):
            torch.testing.assert_close(mine, peer)
        mine, peer = (m.self_attn(nested, nested, nested, need_weights=False)[0] for m in (ours, theirs))
        for a, b in zip(mine.unbind(), peer.unbind(), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"^query, key, value: nested tensors are not taken here"):
        ours.self_attn(nested, nested, nested)  # gradients are recorded
    encoder = nn.TransformerEncoder(ours, 1)
    with pytest.raises(ValueError, match=r"^src: is a nested tensor"):
        encoder(nested)
    for name, change in (("hook", "self_attn"), ("sequence first", None)):
        layer = nn.TransformerEncoderLayer(E, H, HIDDEN, batch_first=name == "hook")
        if change:
            layer.self_attn.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=r"^src: a nested tensor is taken"):
            layer(nested)
