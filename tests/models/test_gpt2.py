"""fastformer's GPT-2 beside transformers', on random checkpoints: logits, losses, every gradient."""

import pytest
import torch
import transformers

from fastformer.models import GPT2Config, GPT2LMHeadModel, KVCache
from tests.models.pairs import VOCAB, fields, ids, ours_of, theirs_of
from tests.models.parity import assert_as_accurate, assert_equal, assert_equal_loss, gradients, labels_of

# name -> fields that differ from a small GPT-2
CONFIGS = {
    "two layers": {},
    "five layers, wide feed-forward": {"n_layer": 5, "n_embd": 32, "n_inner": 200},
    "odd head_dim": {"n_embd": 57, "n_head": 3},  # head_dim 19, rows of 57: no multiple of a vector
    "one head, one layer": {"n_head": 1, "n_layer": 1},
    "exact gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},  # no fused kernel
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"scale_attn_weights": False},
    "upcast": {"reorder_and_upcast_attn": True},
    "untied": {"tie_word_embeddings": False},
    "other epsilon": {"layer_norm_epsilon": 1e-2},
}
# A call that has no fused kernel says so; the tests of such calls ask for it.
unfused = pytest.mark.filterwarnings("ignore:fastformer.attention")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients_in_float64(name):
    theirs = theirs_of(dtype=torch.float64, **CONFIGS[name])
    ours = ours_of(theirs)
    inputs = {"input_ids": ids(), "labels": labels_of(ids())}
    assert_equal(theirs, ours, inputs)
    assert_equal_loss(theirs, ours, inputs)
    # In float64 ours is as well.
    output = ours(**inputs)
    target = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), target.flatten())
    torch.testing.assert_close(output.loss, loss, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_as_accurate_as_transformers_in_float32(name):
    theirs = theirs_of(dtype=torch.float64, **CONFIGS[name])
    inputs = {"input_ids": ids(), "labels": labels_of(ids())}
    assert_as_accurate(theirs, GPT2LMHeadModel, inputs, torch.float32)
    assert_as_accurate(theirs, GPT2LMHeadModel, inputs, torch.float32, ("loss",))


def test_hidden_states():
    theirs = theirs_of(n_layer=3)
    ours = ours_of(theirs)
    mine, peers = (m(ids(), output_hidden_states=True).hidden_states for m in (ours, theirs))
    assert len(mine) == len(peers) == 4
    for state, wanted in zip(mine, peers, strict=True):
        torch.testing.assert_close(state, wanted)
    assert ours(ids()).hidden_states is None


def test_attentions():
    theirs = theirs_of(attn_implementation="eager", dtype=torch.float64, scale_attn_by_inverse_layer_idx=True)
    ours = ours_of(theirs)
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[1, :6] = 0
    mine, peers = (m(ids(), attention_mask=mask, output_attentions=True) for m in (ours, theirs))
    assert len(mine.attentions) == len(peers.attentions) == 2
    real = mask.bool()
    torch.testing.assert_close(mine.logits[real], peers.logits[real], rtol=0, atol=1e-11)
    for weights, wanted in zip(mine.attentions, peers.attentions, strict=True):
        rows = real[:, None, :].expand(-1, 4, -1)
        torch.testing.assert_close(weights[rows], wanted[rows], rtol=0, atol=1e-11)
    assert ours(ids()).attentions is None


def test_other_ways_to_call():
    theirs = theirs_of()
    ours = ours_of(theirs)
    tokens = ids()
    wanted = theirs(tokens).logits
    torch.testing.assert_close(ours(inputs_embeds=ours.get_input_embeddings()(tokens)).logits, wanted)
    torch.testing.assert_close(ours(tokens, logits_to_keep=2).logits, wanted[:, -2:])
    torch.testing.assert_close(ours(tokens, return_dict=False)[0], wanted)
    types = torch.randint(VOCAB, tokens.shape)
    peers = theirs(tokens, token_type_ids=types).logits
    torch.testing.assert_close(ours(tokens, token_type_ids=types).logits, peers)
    positions = torch.arange(17).flip(0)[None]
    torch.testing.assert_close(
        ours(tokens, position_ids=positions).logits, theirs(tokens, position_ids=positions).logits
    )
    output = ours(tokens, labels=tokens)
    assert list(output) == ["loss", "logits"] and output[1] is output["logits"] and "hidden_states" not in output
    with pytest.raises(KeyError):
        output["hidden_states"]


@pytest.mark.parametrize("where", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_dropout(where):
    ours = ours_of(theirs_of(**{where: 0.5}))
    tokens = ids()
    logits = ours(tokens).logits
    ours.train()
    torch.manual_seed(1)
    first = ours(tokens, labels=tokens)
    torch.manual_seed(1)
    second = ours(tokens, labels=tokens)
    third = ours(tokens, labels=tokens)
    assert torch.equal(first.logits, second.logits), "the same seed gives the same mask"
    assert not torch.allclose(first.logits, third.logits) and not torch.allclose(first.logits, logits)
    first.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())
    # Its mean over many masks is near the logits without dropout: scaled by 1 / (1 - p).
    with torch.no_grad():
        hidden = torch.stack([ours.transformer._embed(tokens, None, None, None, 0) for _ in range(400)]).mean(0)
        ours.eval()
        torch.testing.assert_close(hidden, ours.transformer._embed(tokens, None, None, None, 0), rtol=0, atol=0.2)


def test_attention_dropout_with_padding_and_cache():
    """With dropout so small that nothing is dropped."""
    theirs = theirs_of(attn_pdrop=1e-9)
    ours = ours_of(theirs)
    tokens, mask = ids(), torch.ones(3, 17, dtype=torch.long)
    mask[1, :6] = 0
    wanted = ours(tokens, attention_mask=mask).logits
    ours.train()
    torch.testing.assert_close(ours(tokens, attention_mask=mask).logits, wanted)
    cache = KVCache(2)
    parts = [
        ours(tokens[:, a:b], past_key_values=cache, attention_mask=mask[:, :b]).logits for a, b in ((0, 7), (7, 17))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), wanted)


@unfused
def test_a_head_dim_beyond_the_kernels():
    theirs = theirs_of(n_embd=300, n_head=1, n_layer=1)
    torch.testing.assert_close(ours_of(theirs)(ids()).logits, theirs(ids()).logits, rtol=1e-4, atol=1e-4)


def test_a_replaced_layer_is_called():
    ours = ours_of(theirs_of())

    class Adapter(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 1

    wanted = ours(ids()).logits
    for block in ours.transformer.h:
        block.mlp.c_fc = Adapter(block.mlp.c_fc)
    changed = ours(ids()).logits
    assert not torch.allclose(changed, wanted)
    for block in ours.transformer.h:
        block.mlp.c_fc = block.mlp.c_fc.inner
        with torch.no_grad():
            block.mlp.c_fc.bias.add_(1)
    torch.testing.assert_close(ours(ids()).logits, changed)


@pytest.mark.parametrize("path", ["mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2", "attn.c_attn", "attn.c_proj"])
def test_a_hook_is_called(path):
    ours, calls = ours_of(theirs_of()), []
    wanted = ours(ids()).logits
    handle = (
        ours.transformer.h[1].get_submodule(path).register_forward_hook(lambda m, i, out: calls.append(1) or out * 2)
    )
    changed = ours(ids()).logits
    assert calls and not torch.allclose(changed, wanted)
    handle.remove()
    torch.testing.assert_close(ours(ids()).logits, wanted)


def test_initial_values():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**fields(n_embd=128, n_layer=8, vocab_size=500)))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(p, torch.zeros_like(p)), name
        elif ".ln_" in name:
            assert torch.equal(p, torch.ones_like(p)), name
        else:  # section 2.3 of the GPT-2 paper: the 16 projections onto the residual stream share its variance
            std = 0.02 / 4 if "c_proj" in name else 0.02
            assert abs(p.std().item() / std - 1) < 0.05 and abs(p.mean().item()) < 0.05 * std, name


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"n_head": 5}, "n_head"),
        ({"n_layer": 0}, "n_layer"),
        ({"resid_pdrop": -0.1}, "resid_pdrop"),
        ({"activation_function": "gelu_newer"}, "activation_function"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_inner": 0}, "n_inner"),
    ],
)
def test_bad_configurations_are_named(changes, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        GPT2Config(**fields(**changes))


@pytest.mark.parametrize(
    ("inputs", "error", "name"),
    [
        ({}, ValueError, "input_ids"),
        ({"input_ids": torch.full((1, 3), VOCAB)}, ValueError, "input_ids"),
        ({"input_ids": torch.full((1, 3), -1)}, ValueError, "input_ids"),
        ({"input_ids": torch.zeros(1, 3)}, TypeError, "input_ids"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, ValueError, "input_ids"),
        ({"input_ids": torch.zeros(1, 41, dtype=torch.long)}, ValueError, "input_ids"),
        ({"inputs_embeds": torch.zeros(1, 3, 47)}, ValueError, "inputs_embeds"),
        ({"input_ids": ids(), "attention_mask": torch.ones(3, 16)}, ValueError, "attention_mask"),
        ({"input_ids": ids(), "position_ids": torch.full((3, 17), 40)}, ValueError, "position_ids"),
        ({"input_ids": ids(), "position_ids": torch.zeros(2, 17, dtype=torch.long)}, ValueError, "position_ids"),
        ({"input_ids": ids(), "labels": ids()[:, 1:]}, ValueError, "labels"),
        ({"input_ids": ids(), "labels": ids(), "logits_to_keep": 1}, ValueError, "logits_to_keep"),
    ],
)
def test_bad_input_is_named(inputs, error, name):
    with pytest.raises(error, match=f"^{name}"):
        GPT2LMHeadModel(GPT2Config(**fields()))(**inputs)


def test_config_names():
    config = GPT2Config.from_dict({"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "task": "x"})
    assert (config.n_embd, config.n_layer, config.hidden_size, config.intermediate_size) == (96, 3, 96, 384)
    assert config.to_dict()["task"] == "x"
    defaults, theirs = GPT2Config().to_dict(), transformers.GPT2Config().to_dict()
    assert {k: theirs[k] for k in defaults} == defaults
    with pytest.raises(ValueError, match="model_type"):
        GPT2Config.from_dict({"model_type": "bert"})


@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(training):
    ours = ours_of(theirs_of(n_layer=1))
    wanted, gradients_wanted = gradients(ours, input_ids=ids(), labels=ids())
    gradients_wanted = {k: g.clone() for k, g in gradients_wanted.items()}
    ours.train(training)  # without dropout the two differ only in what the compiler sees
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    output, found = gradients(compiled, input_ids=ids(), labels=ids())
    torch.testing.assert_close(output.logits, wanted.logits)
    for name, gradient in gradients_wanted.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient)
