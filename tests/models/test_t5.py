"""fastformer's T5 beside transformers', on random checkpoints: logits, losses, hidden states, every gradient."""

import copy
import pickle

import pytest
import torch
import transformers

from fastformer.models import (
    EncoderDecoderCache,
    KVCache,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
)
from fastformer.models.outputs import BaseModelOutput
from tests.models.parity import assert_as_accurate, assert_equal, gradients
from tests.models.t5_pairs import CONFIGS, VOCAB, fields, ids, inputs, mask, ours_of, theirs_of

EVERYTHING = ("logits", "loss", "encoder_last_hidden_state")
# A call that has no fused kernel says so; the tests of such calls ask for it.
unfused = pytest.mark.filterwarnings("ignore:fastformer.attention")


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients_in_float64(name):
    theirs = theirs_of(dtype=torch.float64, **CONFIGS[name])
    ours = ours_of(theirs)
    assert_equal(theirs, ours, inputs(), EVERYTHING)
    shared = (ours.encoder.embed_tokens, ours.decoder.embed_tokens)
    assert all(embedding.weight is ours.shared.weight for embedding in shared)
    assert (ours.lm_head.weight is ours.shared.weight) == CONFIGS[name].get("tie_word_embeddings", True)


@pytest.mark.parametrize("name", CONFIGS)
def test_as_accurate_as_transformers_in_float32(name):
    theirs = theirs_of(dtype=torch.float64, **CONFIGS[name])
    assert_as_accurate(theirs, T5ForConditionalGeneration, inputs(), torch.float32, EVERYTHING)


@pytest.mark.parametrize("name", ["1.0", "1.1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, name):
    theirs = theirs_of(dtype=torch.float64, **CONFIGS[name])
    assert_as_accurate(theirs, T5ForConditionalGeneration, inputs(), dtype, EVERYTHING)
    output = ours_of(theirs.to(dtype))(**inputs())
    assert output.loss.dtype == torch.float32 and output.logits.dtype == dtype


@pytest.mark.parametrize("cls", ["T5Model", "T5EncoderModel"])
def test_models_without_a_head(cls):
    theirs = theirs_of(dtype=torch.float64, cls=getattr(transformers, cls))
    given = {"input_ids": ids(), "attention_mask": mask("left")}
    if cls == "T5Model":
        given |= {"decoder_input_ids": ids(length=9, seed=2), "decoder_attention_mask": mask("right", length=9)}
    assert_equal(theirs, ours_of(theirs, {"T5Model": T5Model}.get(cls, T5EncoderModel)), given, ("last_hidden_state",))


def test_texts_longer_than_the_longest_distance():
    """Positions are distances, and all beyond max_distance are alike: there is no longest text."""
    theirs = theirs_of(dtype=torch.float64, relative_attention_max_distance=12)
    given = {"input_ids": ids(2, 90), "decoder_input_ids": ids(2, 70, seed=2)}
    assert_equal(theirs, ours_of(theirs), given)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    """Logits at real tokens are transformers', and those of the text alone; padding has no gradient to the others."""
    theirs = theirs_of(dtype=torch.float64)
    ours = ours_of(theirs)
    encoder_mask, decoder_mask = mask(side), mask(side, length=9, seed=4)
    given = {"input_ids": ids(), "attention_mask": encoder_mask, "decoder_attention_mask": decoder_mask}
    given["decoder_input_ids"] = tokens = ids(length=9, seed=2)
    real = decoder_mask.bool()
    logits = ours(**given).logits
    torch.testing.assert_close(logits[real], theirs(**given).logits[real], rtol=0, atol=1e-11)
    assert torch.isfinite(logits).all()
    for i in range(3):
        alone = ours(ids()[i : i + 1, encoder_mask[i].bool()], decoder_input_ids=tokens[i : i + 1, real[i]]).logits
        torch.testing.assert_close(logits[i, real[i]], alone[0], rtol=0, atol=1e-11)
    given["labels"] = ids(length=9, seed=5).masked_fill(~real, -100)
    mine, my_gradients = gradients(ours, **given)
    peers, their_gradients = gradients(theirs, **given)
    torch.testing.assert_close(mine.loss, peers.loss, rtol=1e-12, atol=0)
    for key, gradient in their_gradients.items():
        torch.testing.assert_close(my_gradients[key], gradient, rtol=0, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")


def test_an_input_of_padding_alone_gives_finite_numbers():
    ours = ours_of(theirs_of())
    output, found = gradients(ours, **inputs(attention_mask=mask("right") * torch.tensor([[1], [0], [1]])))
    assert torch.isfinite(output.logits).all() and all(torch.isfinite(g).all() for g in found.values())


@pytest.mark.parametrize("cached", [False, True])
def test_hidden_states_and_attentions(cached):
    theirs = theirs_of(dtype=torch.float64, num_layers=3, num_decoder_layers=2)
    ours = ours_of(theirs)
    given = {"input_ids": ids(), "attention_mask": mask("right"), "decoder_input_ids": ids(length=9, seed=2)}
    wanted = {"output_hidden_states": True, "output_attentions": True, "use_cache": cached}
    mine, peers = (model(**given, **wanted) for model in (ours, theirs))
    assert list(mine) == list(peers)
    for field in mine:
        if field == "past_key_values":
            continue
        pairs = zip(mine[field], peers[field], strict=True)
        rows = (mask("right").bool()[:, None, :] if field == "encoder_attentions" else torch.ones(1)) != 0
        for x, y in pairs:  # what padding attends to is of no meaning
            torch.testing.assert_close(x * rows[..., None], y * rows[..., None], rtol=0, atol=1e-11)
    assert [len(mine[f]) for f in ("encoder_hidden_states", "decoder_hidden_states", "cross_attentions")] == [4, 3, 2]
    plain = ours(**given)
    assert plain.encoder_attentions is None and plain.decoder_hidden_states is None
    torch.testing.assert_close(plain.logits, mine.logits, rtol=0, atol=1e-12)


# ---- ways to call ----------------------------------------------------------------------------------------------------


def test_labels_are_shifted_to_the_decoders_input():
    theirs = theirs_of(pad_token_id=5, decoder_start_token_id=7)
    ours = ours_of(theirs)
    labels = inputs()["labels"]
    shifted = ours.prepare_decoder_input_ids_from_labels(labels)
    assert torch.equal(shifted, theirs.prepare_decoder_input_ids_from_labels(labels))
    output = ours(ids(), labels=labels)
    assert torch.equal(output.logits, ours(ids(), decoder_input_ids=shifted, use_cache=False).logits)
    assert list(output) == ["loss", "logits", "encoder_last_hidden_state"]


def test_other_ways_to_call():
    theirs = theirs_of()
    ours = ours_of(theirs)
    tokens, target = ids(), ids(length=9, seed=2)
    padding = mask("left")
    wanted = theirs(tokens, padding, target).logits
    close = lambda *a, **k: torch.testing.assert_close(ours(*a, **k).logits, wanted, rtol=1e-4, atol=1e-4)  # noqa: E731
    close(tokens, padding, target)
    embedding = ours.get_input_embeddings()
    close(None, padding, None, inputs_embeds=embedding(tokens), decoder_inputs_embeds=embedding(target))
    mine, peers = ours.get_encoder()(tokens, padding), theirs.get_encoder()(tokens, padding)
    for encoded in (mine, peers, (mine.last_hidden_state,), [mine[0]], BaseModelOutput(mine[0])):
        close(attention_mask=padding, decoder_input_ids=target, encoder_outputs=encoded)
    torch.testing.assert_close(mine.last_hidden_state, peers.last_hidden_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(tokens, padding, target, return_dict=False)[0], ours(tokens, padding, target)[0])
    torch.testing.assert_close(ours(tokens, padding, target, logits_to_keep=2).logits, wanted[:, -2:])
    # A decoder without an encoder is a language model.
    alone, peer = (m.get_decoder()(input_ids=target).last_hidden_state for m in (ours, theirs))
    torch.testing.assert_close(alone, peer, rtol=1e-4, atol=1e-4)


def test_num_items_in_batch_makes_accumulation_exact():
    ours = ours_of(theirs_of(dtype=torch.float64))
    given = inputs()
    counted = (given["labels"] != -100).sum()
    whole, wanted = gradients(ours, **given)
    wanted = {k: g.clone() for k, g in wanted.items()}
    ours.zero_grad()
    parts = [
        ours(**{k: v[part] for k, v in given.items()}, num_items_in_batch=counted).loss
        for part in (slice(0, 1), slice(1, 3))
    ]
    sum(parts).backward()
    torch.testing.assert_close(sum(parts), whole.loss, rtol=1e-13, atol=0)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-9, atol=1e-12)


# ---- caches ----------------------------------------------------------------------------------------------------------


def test_a_cache_changes_nothing():
    """A prompt, one token, several tokens at once; with padding on the decoder's left too. The encoder's keys and
    values are computed once."""
    ours = ours_of(theirs_of(dtype=torch.float64))
    tokens, padding, target, target_mask = ids(), mask("right"), ids(length=9, seed=2), mask("left", length=9)
    wanted = ours(tokens, padding, target, target_mask, use_cache=False)
    assert wanted.past_key_values is None
    calls = []
    ours.decoder.block[1].layer[1].EncDecAttention.v.register_forward_hook(lambda m, i, out: calls.append(out))
    with torch.no_grad():
        encoded = ours.get_encoder()(tokens, padding)
        for cache in (EncoderDecoderCache.with_layers(2, 9), EncoderDecoderCache.with_layers(2), None):
            calls.clear()
            found = []
            for start, end in ((0, 5), (5, 6), (6, 9)):
                output = ours(
                    attention_mask=padding,
                    decoder_input_ids=target[:, start:end],
                    decoder_attention_mask=target_mask[:, :end],
                    encoder_outputs=encoded,
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = output.past_key_values
                found.append(output.logits)
            real = target_mask.bool()
            torch.testing.assert_close(torch.cat(found, 1)[real], wanted.logits[real], rtol=0, atol=1e-12)
            assert cache.get_seq_length() == 9 and len(calls) == 1
            cache.crop(4)
            again = ours(None, padding, target[:, 4:], target_mask, encoded, cache).logits
            torch.testing.assert_close(again[real[:, 4:]], wanted.logits[:, 4:][real[:, 4:]], rtol=0, atol=1e-12)
        assert ours(tokens, padding, target).past_key_values is not None  # the default, as in transformers
    assert ours(tokens, padding, target).past_key_values is None  # not while gradients are recorded


def test_gradients_flow_through_a_cache():
    ours = ours_of(theirs_of(dtype=torch.float64))
    tokens, target = ids(), ids(length=9, seed=2)
    parameters = list(ours.parameters())
    loss = ours(tokens, decoder_input_ids=target, use_cache=False).logits[:, 5:].square().sum()
    wanted = torch.autograd.grad(loss, parameters)
    cache, encoded = EncoderDecoderCache.with_layers(2, 9), ours.get_encoder()(tokens)
    given = {"encoder_outputs": encoded, "past_key_values": cache}
    ours(decoder_input_ids=target[:, :5], **given)
    loss = ours(decoder_input_ids=target[:, 5:], **given).logits.square().sum()
    for mine, gradient in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        torch.testing.assert_close(mine, gradient, rtol=1e-9, atol=1e-10)


def test_reordering_a_cache():
    ours = ours_of(theirs_of())
    tokens, target, order = ids(), ids(length=9, seed=2), torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = ours(tokens, decoder_input_ids=target[:, :5]).past_key_values
        cache.reorder(order)
        encoded = (ours.get_encoder()(tokens[order])[0],)
        given = {"encoder_outputs": encoded, "past_key_values": cache}
        found = ours(decoder_input_ids=target[order, 5:], **given).logits
        wanted = ours(tokens[order], decoder_input_ids=target[order]).logits[:, 5:]
    torch.testing.assert_close(found, wanted)


# ---- training --------------------------------------------------------------------------------------------------------


def test_dropout():
    ours = ours_of(theirs_of(dropout_rate=0.4))
    logits = ours(**inputs()).logits
    ours.train()
    torch.manual_seed(1)
    first = ours(**inputs())
    torch.manual_seed(1)
    second = ours(**inputs())
    third = ours(**inputs())
    assert torch.equal(first.logits, second.logits), "the same seed gives the same mask"
    assert not torch.allclose(first.logits, third.logits) and not torch.allclose(first.logits, logits)
    first.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())


def test_the_probability_of_a_dropout_can_be_changed():
    """With 1 in place of the rate, what a layer adds is nothing."""
    ours, theirs = ours_of(theirs_of()), theirs_of()
    wanted = ours(**inputs()).logits
    paths = [f"{stack}.block.{i}.layer.{j}" for stack, j in (("encoder", 1), ("decoder", 1)) for i in (0, 1)]
    for model in (ours.train(), theirs.train()):
        for path in paths:
            model.get_submodule(path).dropout.p = 1.0
        model.decoder.block[1].layer[2].DenseReluDense.dropout.p = 1.0
    found = ours(**inputs()).logits
    torch.testing.assert_close(found, theirs(**inputs()).logits, rtol=1e-4, atol=1e-4)
    assert (found - wanted).abs().max() > 0.1


@pytest.mark.parametrize("proj", ["relu", "gated-gelu"])
def test_dropout_is_where_transformers_has_it(proj):
    """Each sequence of a batch has masks of its own: over many equal ones, outputs have the same mean and spread."""
    theirs = theirs_of(dropout_rate=0.3, num_layers=1, feed_forward_proj=proj)
    ours = ours_of(theirs)
    given = {"input_ids": ids(1, 5).expand(3000, -1), "decoder_input_ids": ids(1, 3).expand(3000, -1)}
    torch.manual_seed(0)
    with torch.no_grad():
        (mine, my_encoding), (peers, their_encoding) = (
            (output.logits, output.encoder_last_hidden_state)
            for output in (model.train()(**given, use_cache=False) for model in (ours, theirs))
        )
    for x, y in ((mine, peers), (my_encoding, their_encoding)):
        spread = y.std(0)
        assert ((x.mean(0) - y.mean(0)).abs() < 6 * spread * (2 / 3000) ** 0.5).all()
        ratio = x.std(0) / spread
        assert 0.97 < ratio.mean() < 1.03 and ((ratio - 1).abs() < 0.2).all()


def test_dropout_with_padding_and_cache():
    """With dropout so small that nothing is dropped."""
    ours = ours_of(theirs_of(dropout_rate=1e-9))
    tokens, padding, target = ids(), mask("left"), ids(length=9, seed=2)
    wanted = ours(tokens, padding, target).logits
    ours.train()
    torch.testing.assert_close(ours(tokens, padding, target).logits, wanted)
    given = {"attention_mask": padding, "past_key_values": EncoderDecoderCache.with_layers(2)}
    given["encoder_outputs"] = ours.get_encoder()(tokens, padding)
    parts = [ours(decoder_input_ids=target[:, a:b], **given).logits for a, b in ((0, 4), (4, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), wanted)


def test_autocast():
    """Half-precision matmuls beside a float32 residual stream, as transformers does it."""
    exact = theirs_of(dtype=torch.float64, **CONFIGS["1.1"])
    theirs = copy.deepcopy(exact).float()
    ours = ours_of(theirs)
    results = [gradients(exact, **inputs())]
    with torch.autocast("cpu", torch.bfloat16):
        results += [gradients(model, **inputs()) for model in (theirs, ours)]
    for what in ("loss", *results[0][1]):
        wanted, peers, mine = (
            (output[what] if what == "loss" else grads[what]).detach().double() for output, grads in results
        )
        error, peer_error = ((x - wanted).norm().item() for x in (mine, peers))
        assert error <= 2 * peer_error + 1e-3 * wanted.norm().item(), f"{what}: error {error:.3g}, {peer_error:.3g}"


def test_compiles_to_one_graph():
    ours = ours_of(theirs_of(num_layers=1, feed_forward_proj="gated-gelu"))
    wanted, gradients_wanted = gradients(ours, **inputs())
    gradients_wanted = {k: g.clone() for k, g in gradients_wanted.items()}
    ours.train()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    output, found = gradients(compiled, **inputs())
    torch.testing.assert_close(output.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients_wanted.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-5)


def test_gradients_of_each_text():
    """torch.func.vmap over torch.func.grad, with a mask."""
    ours, given = ours_of(theirs_of(dtype=torch.float64)), inputs()
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters, given):
        return torch.func.functional_call(ours, parameters, (), {k: v[None] for k, v in given.items()}).loss

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, given)
    for i in range(3):
        for name, gradient in gradients(ours, **{k: v[i : i + 1] for k, v in given.items()})[1].items():
            torch.testing.assert_close(each[name][i], gradient, rtol=1e-9, atol=1e-12)


def test_exports_with_any_batch_size():
    ours = ours_of(theirs_of(num_layers=1, feed_forward_proj="gated-gelu"))
    given = {"input_ids": ids(), "attention_mask": mask("right"), "decoder_input_ids": ids(length=9, seed=2)}
    shapes = {name: {0: torch.export.Dim("batch", min=2, max=8)} for name in given}
    program = torch.export.export(ours, (), {**given, "use_cache": False}, dynamic_shapes={**shapes, "use_cache": None})
    given = {name: t[:2] for name, t in given.items()} | {"use_cache": False}
    mine, exported = ours(**given), program.module()(**given)
    assert exported.keys() == mine.keys() == ("logits", "encoder_last_hidden_state")
    torch.testing.assert_close(exported.logits, mine.logits, rtol=1e-4, atol=1e-4)


# ---- what users do to models -----------------------------------------------------------------------------------------

LAYERS = [
    "encoder.block.1.layer.0.SelfAttention.q",
    "encoder.block.1.layer.0.SelfAttention.o",
    "encoder.block.1.layer.0.layer_norm",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "encoder.block.1.layer.1.DenseReluDense.{wi}",
    "encoder.block.1.layer.1.DenseReluDense.wo",
    "encoder.embed_tokens",
    "encoder.final_layer_norm",
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "decoder.block.1.layer.0.SelfAttention.v",
    "decoder.block.1.layer.1.EncDecAttention.q",
    "decoder.block.1.layer.1.EncDecAttention.k",
    "decoder.block.1.layer.1.EncDecAttention.o",
    "decoder.block.1.layer.1.layer_norm",
    "decoder.block.1.layer.2.DenseReluDense",
    "decoder.block.1.layer.2.DenseReluDense.dropout",
    "decoder.block.1.layer.0.dropout",
    "decoder.dropout",
    "lm_head",
]


class Doubled(torch.nn.Module):
    """An adapter of the simplest kind."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner(*args) * 2


@pytest.mark.parametrize("path", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_a_hook_and_a_replaced_layer_are_called(path, dtype):
    proj, wi = ("gated-gelu", "wi_1") if dtype == torch.float64 else ("relu", "wi")
    path = path.format(wi=wi)
    theirs = theirs_of(dtype=torch.float64, feed_forward_proj=proj)
    ours = ours_of(theirs).to(dtype)
    given = inputs()
    wanted = ours(**given).logits
    handles = [
        model.get_submodule(path).register_forward_hook(lambda module, args, out: out * 2) for model in (ours, theirs)
    ]
    hooked, peers = ours(**given).logits, theirs(**given).logits
    scale = peers.abs().max().item()
    tolerance = 1e-11 if dtype == torch.float64 else 3e-2 * scale
    torch.testing.assert_close(hooked.double(), peers.double(), rtol=0, atol=tolerance)
    assert (hooked - wanted).abs().max() > 3e-2 * scale
    for handle in handles:
        handle.remove()
    parent, _, name = path.rpartition(".")
    module = ours.get_submodule(parent)
    setattr(module, name, Doubled(getattr(module, name)))
    torch.testing.assert_close(ours(**given).logits, hooked)
    setattr(module, name, getattr(module, name).inner)
    torch.testing.assert_close(ours(**given).logits, wanted)


def test_deepcopy_and_pickle_keep_the_ties():
    ours = ours_of(theirs_of())
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        tied = (twin.lm_head, twin.encoder.embed_tokens, twin.decoder.embed_tokens)
        assert all(module.weight is twin.shared.weight for module in tied)
        torch.testing.assert_close(twin(**inputs()).logits, ours(**inputs()).logits)


def test_frozen_parameters_get_no_gradient():
    ours = ours_of(theirs_of()).requires_grad_(False)
    table = ours.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.requires_grad_(True)
    ours(**inputs()).loss.backward()
    assert [name for name, p in ours.named_parameters() if p.grad is not None] == [
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ]
    assert table.grad.abs().max() > 0


def test_the_embedding_can_be_replaced():
    theirs = theirs_of()
    ours = ours_of(theirs)
    torch.manual_seed(0)
    larger = torch.nn.Embedding(VOCAB, 48)
    for model in (ours, theirs):
        model.set_input_embeddings(larger)
    assert ours.get_input_embeddings() is larger
    torch.testing.assert_close(ours(**inputs()).logits, theirs(**inputs()).logits, rtol=1e-4, atol=1e-4)


def test_construction_on_the_meta_device():
    with torch.device("meta"):
        ours = T5ForConditionalGeneration(T5Config(**fields()))
    assert all(p.is_meta for p in ours.parameters())
    ours = ours.to_empty(device="cpu").eval()
    ours.tie_weights()
    theirs = theirs_of()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(**inputs()).logits, theirs(**inputs()).logits, rtol=1e-4, atol=1e-4)


# ---- initial values, configurations, bad input -----------------------------------------------------------------------


@pytest.mark.parametrize("proj", ["relu", "gated-gelu"])
def test_initial_values(proj):
    """Deviations by the rules of transformers, whose models are drawn here too."""
    sizes = fields(d_model=160, d_kv=40, d_ff=300, num_heads=6, vocab_size=300, feed_forward_proj=proj)
    sizes |= {"relative_attention_num_buckets": 64, "relative_attention_max_distance": 128, "initializer_factor": 0.7}
    torch.manual_seed(0)
    ours = T5ForConditionalGeneration(T5Config(**sizes))
    theirs = dict(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).named_parameters())
    assert dict(ours.named_parameters()).keys() == theirs.keys()
    for name, p in ours.named_parameters():
        std, wanted = p.std().item(), theirs[name].std().item()
        if "layer_norm" in name:
            assert torch.equal(p, theirs[name]), name
        else:
            assert abs(std / wanted - 1) < (0.15 if "relative" in name else 0.05), name
            assert abs(p.mean().item()) < 0.05 * (1 if "relative" not in name else 4) * std, name


def test_an_output_embedding_of_its_own_starts_at_random():
    ours = T5ForConditionalGeneration(T5Config(**fields(tie_word_embeddings=False)))
    assert ours.lm_head.weight is not ours.shared.weight and 0.9 < ours.lm_head.weight.std() < 1.1


def test_config_names():
    config = T5Config.from_dict({"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "task": "x"})
    assert (config.d_model, config.num_layers, config.num_decoder_layers, config.hidden_size) == (96, 3, 3, 96)
    assert config.to_dict()["task"] == "x"
    for changes in ({}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, {"num_decoder_layers": 2}):
        mine = T5Config(**changes, decoder_start_token_id=0).to_dict()
        theirs = transformers.T5Config(**changes, decoder_start_token_id=0).to_dict()
        theirs["tie_word_embeddings"] = mine["tie_word_embeddings"]  # theirs says True, always
        assert {k: theirs[k] for k in mine} == mine
        assert mine["scale_decoder_outputs"] == ("tie_word_embeddings" not in changes)
        again = T5Config.from_dict(theirs)
        assert {k: again.to_dict()[k] for k in mine} == mine
    with pytest.raises(ValueError, match="model_type"):
        T5Config.from_dict({"model_type": "bert"})


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"num_decoder_layers": 0}, "num_decoder_layers"),
        ({"dropout_rate": 1.5}, "dropout_rate"),
        ({"feed_forward_proj": "gelu_newer"}, "feed_forward_proj"),
        ({"feed_forward_proj": "double-gelu"}, "feed_forward_proj"),
        ({"relative_attention_num_buckets": 8, "relative_attention_max_distance": 2}, "relative_attention_num_buckets"),
    ],
)
def test_bad_configurations_are_named(changes, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        T5Config(**fields(**changes))


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        ({"input_ids": None}, ValueError, "input_ids"),
        ({"input_ids": torch.full((3, 17), VOCAB)}, ValueError, "input_ids"),
        ({"input_ids": torch.zeros(3, 17)}, TypeError, "input_ids"),
        ({"attention_mask": torch.ones(3, 16)}, ValueError, "attention_mask"),
        ({"decoder_attention_mask": torch.ones(3, 8)}, ValueError, "attention_mask"),
        ({"labels": None}, ValueError, "decoder_input_ids"),
        ({"labels": ids(2, 9)}, ValueError, "encoder_hidden_states"),
        ({"labels": ids(3, 9)[0]}, ValueError, "labels"),
        ({"decoder_input_ids": ids(3, 8)}, ValueError, "labels"),
        ({"decoder_input_ids": torch.full((3, 9), -1)}, ValueError, "input_ids"),
        ({"decoder_inputs_embeds": torch.zeros(3, 9, 47)}, ValueError, "inputs_embeds"),
        ({"encoder_outputs": torch.zeros(3, 17, 48)}, TypeError, "encoder_outputs"),
        ({"encoder_outputs": (torch.zeros(3, 17, 47),)}, ValueError, "encoder_hidden_states"),
        ({"past_key_values": KVCache(2)}, TypeError, "past_key_values"),
        ({"logits_to_keep": 1}, ValueError, "logits_to_keep"),
    ],
)
def test_bad_input_is_named(changes, error, name):
    with pytest.raises(error, match=f"^{name}"):
        T5ForConditionalGeneration(T5Config(**fields()))(**inputs(**changes))


def test_a_missing_start_token_and_an_encoders_cache_are_named():
    ours = T5ForConditionalGeneration(T5Config(**fields(decoder_start_token_id=None)))
    with pytest.raises(ValueError, match=r"^decoder_start_token_id"):
        ours(**inputs())
    with pytest.raises(ValueError, match=r"^use_cache"):
        ours.encoder(ids(), use_cache=True)
    with torch.no_grad(), pytest.raises(ValueError, match="do not fit into a cache of 8"):
        cache = EncoderDecoderCache.with_layers(2, 8)
        ours(ids(), decoder_input_ids=ids(length=9), past_key_values=cache)


@unfused
def test_a_head_dim_beyond_the_kernels():
    theirs = theirs_of(d_kv=300, num_heads=1, num_layers=1)
    torch.testing.assert_close(ours_of(theirs)(**inputs()).logits, theirs(**inputs()).logits, rtol=1e-3, atol=1e-3)
