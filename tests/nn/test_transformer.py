"""fastformer.nn's transformer layers and stacks beside torch.nn's."""

import copy

import pytest
import torch
from torch.nn import functional as TF

from fastformer import functional, nn
from tests.nn.comparison import assert_as_accurate, assert_drop_in, compare

E, H, HIDDEN = 24, 4, 40  # head_dim 6
N, L, S = 2, 5, 7  # L != S, so a swapped dimension cannot pass

pytestmark = [
    # A mask of torch's slow path, and what its encoder says of a layer it has no fast path for.
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]


def padding(length):
    mask = torch.zeros(N, length, dtype=torch.bool)
    mask[0, -2:] = True
    mask[1, 1] = True
    return mask


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def added(mask):
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


def tokens(length, batch_first=True):
    return torch.randn((N, length, E) if batch_first else (length, N, E))


def pair(name, *arguments, **options):
    """The class of that name here and in torch, with the same weights, none of which is zero or one."""
    torch.manual_seed(0)
    options = {"dropout": 0.0, **options}
    theirs = getattr(torch.nn, name)(E, H, *arguments, dim_feedforward=HIDDEN, **options)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = getattr(nn, name)(E, H, *arguments, dim_feedforward=HIDDEN, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def in_dtype(masks, x):
    """Masks of numbers in the dtype of x, as torch wants them."""
    convert = lambda m: m.to(x.dtype) if isinstance(m, torch.Tensor) and m.is_floating_point() else m  # noqa: E731
    return {name: convert(mask) for name, mask in masks.items()}


# Boolean and floating masks, each alone and together; with the promise and without.
SRC_MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": padding(S)},
    "padding, added": {"src_key_padding_mask": added(padding(S))},
    "causal": {"src_mask": causal(S)},
    "causal, promised, padding": {"src_mask": causal(S), "is_causal": True, "src_key_padding_mask": padding(S)},
    "any": {"src_mask": (torch.rand(S, S) < 0.4) & ~torch.eye(S, dtype=torch.bool)},
    "by head, padding, both added": {
        "src_mask": torch.randn(N * H, S, S),
        "src_key_padding_mask": added(padding(S)),
    },
}


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("masks", SRC_MASKS)
def test_encoder_layer(masks, batch_first, norm_first):
    ours, theirs = pair("TransformerEncoderLayer", batch_first=batch_first, norm_first=norm_first, activation="gelu")
    x = tokens(S, batch_first)
    compare(ours, theirs, [x], lambda m, x: m(x, **in_dtype(SRC_MASKS[masks], x)))
    if masks == "by head, padding, both added":
        return  # torch's path for inference takes numbers to be added for true and false
    for module in (ours.eval(), theirs.eval()):
        module.requires_grad_(False)
    exact = copy.deepcopy(theirs).double()(x.double(), **in_dtype(SRC_MASKS[masks], x.double()))
    assert_as_accurate("inference", *(m(x, **SRC_MASKS[masks]) for m in (ours, theirs)), exact)


TGT_MASKS = {
    "none": {},
    "causal": {"tgt_mask": causal(L)},
    "causal, promised, both padded": {
        "tgt_mask": added(causal(L)),
        "tgt_is_causal": True,
        "tgt_key_padding_mask": torch.zeros(N, L).masked_fill(torch.arange(L) == L - 1, -torch.inf),
        "memory_key_padding_mask": padding(S),
    },
    "memory": {"memory_mask": (torch.rand(L, S) < 0.4) & (torch.arange(S) > 0)},
    "by head": {"tgt_mask": torch.randn(N * H, L, L), "memory_mask": torch.randn(N * H, L, S)},
}


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("masks", TGT_MASKS)
def test_decoder_layer(masks, batch_first, norm_first):
    ours, theirs = pair("TransformerDecoderLayer", batch_first=batch_first, norm_first=norm_first, activation="gelu")
    inputs = [tokens(L, batch_first), tokens(S, batch_first)]
    compare(ours, theirs, inputs, lambda m, x, memory: m(x, memory, **in_dtype(TGT_MASKS[masks], x)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_precision(dtype, norm_first):
    for name, inputs in (
        ("TransformerEncoderLayer", [tokens(S)]),
        ("TransformerDecoderLayer", [tokens(L), tokens(S)]),
    ):
        modules = pair(name, norm_first=norm_first, batch_first=True, activation="gelu", dtype=dtype)
        compare(*modules, [x.to(dtype) for x in inputs])


ACTIVATIONS = {
    "relu": "relu",
    "function": TF.silu,
    "ours": functional.gelu,
    "module": torch.nn.GELU("tanh"),
    "module of ours": nn.ReLU(),
    "of another kind": torch.tanh,
    "with parameters": torch.nn.PReLU(),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_activations(activation, bias):
    function = ACTIVATIONS[activation]
    options = {"activation": function, "bias": bias, "layer_norm_eps": 1e-3, "batch_first": True}
    ours, theirs = pair("TransformerEncoderLayer", **options)
    ours.activation = copy.deepcopy(theirs.activation)  # the parameters of a module are not the other's
    compare(ours, theirs, [tokens(S)])
    if not isinstance(function, torch.nn.Module):  # of which a copy of a decoder layer makes relu, in torch and here
        compare(*pair("TransformerDecoderLayer", **options), [tokens(L), tokens(S)])


def test_known_activations_are_fused(monkeypatch):
    calls = []
    fused = functional.feed_forward
    monkeypatch.setattr(functional, "feed_forward", lambda *a, **k: calls.append(a[5]) or fused(*a, **k))
    for activation in ACTIVATIONS.values():
        pair("TransformerEncoderLayer", activation=activation)[0](tokens(S))
    assert calls == ["relu", "silu", "gelu", "gelu_tanh", "relu"]


STACKS = [
    ("TransformerEncoder", True, True),
    ("TransformerEncoder", False, True),
    ("TransformerEncoder", True, False),
    ("TransformerDecoder", True, True),
    ("TransformerDecoder", False, False),
]


def stacks(name, norm_first, normed, **options):
    """Two layers and, if ``normed``, a final norm; ours and torch's."""
    made = []
    for package in (nn, torch.nn):
        torch.manual_seed(0)
        layer = getattr(package, f"{name}Layer")(
            E, H, HIDDEN, norm_first=norm_first, batch_first=True, **{"dropout": 0.0, **options}
        )
        norm = package.LayerNorm(E, dtype=options.get("dtype")) if normed else None
        made.append(getattr(package, name)(layer, 2, norm))
        for p in made[-1].parameters():
            torch.nn.init.normal_(p, std=0.3)
    return made


@pytest.mark.parametrize(("name", "norm_first", "normed"), STACKS)
def test_stacks(name, norm_first, normed):
    ours, theirs = stacks(name, norm_first, normed, dtype=torch.float64, activation="gelu")
    inputs = [tokens(S).double()] if name == "TransformerEncoder" else [tokens(L).double(), tokens(S).double()]
    masked = {"mask": causal(S)} if name == "TransformerEncoder" else {"tgt_mask": causal(L)}
    compare(ours, theirs, inputs, lambda m, *inputs: m(*inputs, **masked))
    compare(ours.float(), theirs.float(), [x.float() for x in inputs], roundings=32)  # of two layers


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_transformer(batch_first, norm_first):
    options = {"batch_first": batch_first, "norm_first": norm_first, "dtype": torch.float64}
    ours, theirs = pair("Transformer", 2, 2, **options)
    masks = {
        "src_key_padding_mask": padding(S),
        "memory_key_padding_mask": padding(S),
        "tgt_mask": torch.nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64),
    }
    inputs = [tokens(S, batch_first).double(), tokens(L, batch_first).double()]
    compare(ours, theirs, inputs, lambda m, src, tgt: m(src, tgt, **masks))


def test_transformer_with_custom_parts():
    encoder, decoder = torch.nn.Linear(E, E), nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, HIDDEN), 1)

    class Encoder(torch.nn.Module):
        def forward(self, src, mask, src_key_padding_mask, is_causal):
            return encoder(src)

    module = nn.Transformer(E, H, custom_encoder=Encoder(), custom_decoder=decoder, dropout=0.0).eval()
    src, tgt = tokens(S, False), tokens(L, False)
    assert module.decoder is decoder
    torch.testing.assert_close(module(src, tgt), decoder(tgt, encoder(src)))


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder"])
def test_each_dropout_is_where_it_belongs(name, norm_first):
    """With probability 1 a dropout is no random number: only what goes round it remains, as in torch."""
    inputs = [tokens(S)] if name == "TransformerEncoder" else [tokens(L), tokens(S)]
    modules = stacks(name, norm_first, True)
    dropouts = [n for n, m in modules[0].layers[0].named_modules() if isinstance(m, torch.nn.Dropout)]
    assert len(dropouts) == (3 if name == "TransformerEncoder" else 4)
    plain = modules[0](*inputs)
    for i in range(2):
        for dropout in dropouts:
            outs = []
            for module in modules:
                module.layers[i].get_submodule(dropout).p = 1.0
                outs.append(module(*inputs))
                module.eval()
                torch.testing.assert_close(module(*inputs), plain)
                module.train()
                module.layers[i].get_submodule(dropout).p = 0.0
            torch.testing.assert_close(*outs)
            assert not torch.allclose(outs[0], plain)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_dropout_repeats_with_the_seed_and_keeps_the_mean(norm_first):
    ours, _ = stacks("TransformerEncoder", norm_first, False, dropout=0.3)
    x = tokens(S)

    def draw(seed):
        torch.manual_seed(seed)
        return ours(x)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    # What is added last is scaled by 1 / (1 - p): the mean over many masks is the sum without dropout.
    layer = nn.TransformerEncoderLayer(E, H, HIDDEN, 0.0, norm_first=True, batch_first=True)
    wanted = layer(x)
    layer.dropout2.p = 0.5
    with torch.no_grad():
        draws = torch.stack([layer(x) for _ in range(1000)])
    assert ((draws.mean(0) - wanted).abs() < 5 * draws.std(0) / 1000**0.5 + 1e-6).all()


def test_a_dropout_left_on_for_inference_drops():
    ours, theirs = pair("TransformerEncoderLayer", batch_first=True)
    x = tokens(S)
    for module in (ours, theirs):
        module.eval()
        module.dropout1.p = 1.0
        module.dropout1.train()
    torch.testing.assert_close(ours(x), theirs(x.requires_grad_()))  # torch's path for inference would not


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_a_causal_mask_is_found_and_not_read(monkeypatch):
    ours, _ = stacks("TransformerEncoder", True, True)
    x, seen = tokens(S), []
    packed, general = functional.attention_qkvpacked, functional.attention

    def spy(function, *arguments, **options):
        seen.append(options["causal"])
        return function(*arguments, **options)

    monkeypatch.setattr(functional, "attention_qkvpacked", lambda *a, **k: spy(packed, *a, **k))
    monkeypatch.setattr(functional, "attention", lambda *a, **k: spy(general, *a, **k))
    wanted = ours(x, causal(S), is_causal=False)
    for mask in (causal(S), added(causal(S)), added(causal(S)).double()):
        seen.clear()
        torch.testing.assert_close(ours(x, mask), wanted)
        assert seen == [True, True]
    for mask, hint in ((causal(S), False), (causal(S).roll(1, 1), None), (causal(S).t().contiguous(), None)):
        seen.clear()
        ours(x, mask, is_causal=hint)
        assert seen == [False, False]
    decoder, _ = stacks("TransformerDecoder", True, True)
    for hint, expected in ((None, True), (False, False), (True, True)):
        seen.clear()
        decoder(x, x, causal(S), tgt_is_causal=hint)
        assert seen[::2] == [expected, expected]


def test_a_query_that_sees_nothing_gives_no_nan():
    ours, _ = pair("TransformerEncoderLayer", batch_first=True)
    x = tokens(S).requires_grad_()
    ignored = torch.zeros(N, S, dtype=torch.bool)
    ignored[1] = True
    out = ours(x, src_key_padding_mask=ignored)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    torch.testing.assert_close(out[0], ours(x[:1])[0])


# ---- as a module -----------------------------------------------------------------------------------------------------

CONSTRUCTORS = {
    "TransformerEncoderLayer": lambda p, **o: p.TransformerEncoderLayer(E, H, HIDDEN, 0.2, **o),
    "TransformerDecoderLayer": lambda p, **o: p.TransformerDecoderLayer(E, H, HIDDEN, 0.2, **o),
    "TransformerEncoder": lambda p, **o: p.TransformerEncoder(
        p.TransformerEncoderLayer(E, H, HIDDEN, **o), 2, p.LayerNorm(E)
    ),
    "TransformerDecoder": lambda p, **o: p.TransformerDecoder(p.TransformerDecoderLayer(E, H, HIDDEN, **o), 2),
    "Transformer": lambda p, **o: p.Transformer(E, H, 1, 2, HIDDEN, **o),
}


@pytest.mark.parametrize("options", [{}, {"bias": False, "norm_first": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_is_a_drop_in(name, options):
    make = CONSTRUCTORS[name]
    assert_drop_in(lambda: make(nn, **options), lambda: make(torch.nn, **options))
    ours, theirs = make(nn, **options), make(torch.nn, **options)
    assert isinstance(ours, getattr(torch.nn, name))
    for (path, mine), peer in zip(ours.named_modules(), theirs.modules(), strict=True):
        assert isinstance(mine, type(peer)), path
        assert {k for k in mine.__dict__ if not k.startswith("__")} >= peer.__dict__.keys(), path
        plain = {k: v for k, v in peer.__dict__.items() if isinstance(v, bool | int | float | str)}
        assert plain.items() <= mine.__dict__.items(), path
    types = {type(m) for m in ours.modules()}
    assert nn.MultiheadAttention in types and nn.LayerNorm in types and torch.nn.MultiheadAttention not in types


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_device_dtype_and_frozen_parameters(name):
    made = CONSTRUCTORS[name](nn, device="meta", dtype=torch.bfloat16)
    parts = [p for n, p in made.named_parameters() if not n.startswith("norm")]
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in parts) and len(parts) >= 8
    module = CONSTRUCTORS[name](nn).requires_grad_(False)
    inputs = [tokens(S, False).requires_grad_()] * (1 if "Encoder" in name else 2)
    module(*inputs).sum().backward()
    assert inputs[0].grad is not None and all(p.grad is None for p in module.parameters())


def test_layers_may_share_parameters():
    ours, theirs = stacks("TransformerEncoder", True, True)
    for module in (ours, theirs):
        module.layers[1] = module.layers[0]
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    compare(ours, theirs, [tokens(S)], roundings=32)


def test_an_old_pickle_has_no_activation():
    for layer in (nn.TransformerEncoderLayer(E, H), nn.TransformerDecoderLayer(E, H)):
        state = {k: v for k, v in layer.__dict__.items() if k != "activation"}
        loaded = type(layer).__new__(type(layer))
        loaded.__setstate__(state)
        assert loaded.activation is TF.relu


# ---- bad input -------------------------------------------------------------------------------------------------------

x, memory = torch.randn(N, L, E), torch.randn(N, S, E)
encoder_layer = nn.TransformerEncoderLayer(E, H, HIDDEN, batch_first=True)
decoder_layer = nn.TransformerDecoderLayer(E, H, HIDDEN, batch_first=True)
encoder, decoder = nn.TransformerEncoder(encoder_layer, 1), nn.TransformerDecoder(decoder_layer, 1)
transformer = nn.Transformer(E, H, 1, 1, HIDDEN, batch_first=True)
BAD = {
    "d_model: 0 is not positive": lambda: nn.TransformerEncoderLayer(0, 1),
    "nhead: 5 does not divide d_model 24": lambda: nn.TransformerDecoderLayer(E, 5),
    "dim_feedforward: 0": lambda: nn.Transformer(E, H, dim_feedforward=0),
    "dropout: 1.5": lambda: nn.TransformerEncoderLayer(E, H, dropout=1.5),
    "activation: 'gleu' .*did you mean 'gelu'": lambda: nn.TransformerEncoderLayer(E, H, activation="gleu"),
    "activation: 3 is neither": lambda: nn.TransformerDecoderLayer(E, H, activation=3),
    "src: expected a torch.Tensor, got list": lambda: encoder([x]),
    "src: 4 dimensions": lambda: encoder_layer(x[None]),
    "src: last dimension 23 is not d_model, 24": lambda: encoder_layer(x[..., 1:]),
    "src: dtype torch.int64": lambda: encoder_layer(x.long()),
    r"src_mask: shape \(4, 5\) is not \(5, 5\) or \(8, 5, 5\)": lambda: encoder_layer(x, torch.zeros(4, 5)),
    r"^mask: shape \(1, 5, 5\)": lambda: encoder(x, torch.zeros(1, 5, 5)),
    r"src_key_padding_mask: shape \(2, 4\) is not \(2, 5\)": lambda: encoder(x, None, torch.zeros(N, L - 1)),
    r"src_key_padding_mask: torch.int64": lambda: encoder_layer(x, None, torch.zeros(N, L, dtype=torch.int64)),
    "^is_causal: is a promise about src_mask": lambda: encoder_layer(x, is_causal=True),
    "^is_causal: is a promise about mask": lambda: encoder(x, is_causal=True),
    "memory: batch size 1": lambda: decoder_layer(x, memory[:1]),
    "memory: last dimension": lambda: decoder(x, memory[..., 1:]),
    "tgt: last dimension": lambda: decoder(x[..., 1:], memory),
    r"tgt_mask: shape \(7, 5\)": lambda: decoder(x, memory, torch.zeros(S, L)),
    r"memory_mask: shape \(7, 5\)": lambda: decoder_layer(x, memory, None, torch.zeros(S, L)),
    r"tgt_key_padding_mask: shape \(2, 7\)": lambda: decoder(x, memory, None, None, torch.zeros(N, S)),
    r"memory_key_padding_mask: shape \(2, 5\)": lambda: decoder(x, memory, None, None, None, torch.zeros(N, L)),
    "tgt_is_causal: is a promise about tgt_mask": lambda: decoder_layer(x, memory, tgt_is_causal=True),
    "memory_is_causal: is a promise about memory_mask": lambda: decoder(x, memory, memory_is_causal=True),
    r"src: shape \(2, 5, 24\) has another batch than tgt's \(1, 7, 24\)": lambda: transformer(x, memory[:1]),
    "tgt: last dimension 23": lambda: transformer(x, memory[..., 1:]),
    "tgt: is a nested tensor": lambda: decoder_layer(torch.nested.nested_tensor(list(x)), memory),
    "src: a nested tensor is taken": lambda: encoder_layer(torch.nested.nested_tensor(list(x)), torch.zeros(L, L)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
