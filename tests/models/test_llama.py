"""fastformer's Llama beside transformers', on random checkpoints: logits, losses, every gradient."""

import copy

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastformer.models import LlamaConfig, LlamaForCausalLM, LlamaModel
from tests.models.llama_pairs import CONFIGS, LENGTH, LLAMA3, VOCAB, fields, ids, ours_of, theirs_of
from tests.models.parity import assert_as_accurate, assert_equal, assert_equal_loss, gradients, labels_of, twin_of


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients_in_float64(name):
    theirs = theirs_of(torch.float64, **CONFIGS[name])
    ours = ours_of(theirs)
    inputs = {"input_ids": ids(), "labels": labels_of(ids())}
    assert_equal(theirs, ours, inputs, tolerance=1e-11)
    assert_equal_loss(theirs, ours, inputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_as_accurate_as_transformers_in_float32(name):
    theirs, inputs = theirs_of(torch.float64, **CONFIGS[name]), {"input_ids": ids(), "labels": labels_of(ids())}
    assert_as_accurate(theirs, LlamaForCausalLM, inputs, torch.float32)
    assert_as_accurate(theirs, LlamaForCausalLM, inputs, torch.float32, ("loss",))


@pytest.mark.parametrize("model", [transformers.LlamaModel, transformers.LlamaForCausalLM])
def test_hidden_states_and_attentions(model):
    # In float32: transformers' eager attention gives NaN for padding in a float64 model.
    theirs = theirs_of(cls=model, attn_implementation="eager", num_hidden_layers=3)
    ours = twin_of(theirs, LlamaModel if model is transformers.LlamaModel else LlamaForCausalLM)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :6] = 0
    real = mask.bool()
    options = {"attention_mask": mask, "output_hidden_states": True, "output_attentions": True, "use_cache": False}
    mine, peers = (m(ids(), **options) for m in (ours, theirs))
    assert mine.keys() == tuple(peers.keys())
    assert len(mine.hidden_states) == len(peers.hidden_states) == 4
    assert len(mine.attentions) == len(peers.attentions) == 3
    for state, wanted in zip(mine.hidden_states, peers.hidden_states, strict=True):
        torch.testing.assert_close(state[real], wanted[real])
    for weights, wanted in zip(mine.attentions, peers.attentions, strict=True):
        rows = real[:, None, :].expand(-1, 4, -1)
        torch.testing.assert_close(weights[rows], wanted[rows])
    assert ours(ids()).attentions is None and ours(ids()).hidden_states is None


def test_other_ways_to_call():
    theirs = theirs_of()
    ours = ours_of(theirs)
    tokens = ids()
    wanted = theirs(tokens).logits
    torch.testing.assert_close(ours(inputs_embeds=ours.get_input_embeddings()(tokens)).logits, wanted)
    torch.testing.assert_close(ours(tokens, logits_to_keep=2).logits, wanted[:, -2:])
    chosen = torch.tensor([3, 0, 16])
    torch.testing.assert_close(ours(tokens, logits_to_keep=chosen).logits, wanted[:, chosen])
    torch.testing.assert_close(ours(tokens, return_dict=False)[0], wanted)
    positions = torch.arange(LENGTH).flip(0)
    torch.testing.assert_close(
        ours(tokens, position_ids=positions).logits, theirs(tokens, position_ids=positions[None]).logits
    )
    far = torch.arange(100, 100 + LENGTH)[None]  # beyond max_position_embeddings, which limits nothing
    torch.testing.assert_close(ours(tokens, position_ids=far).logits, theirs(tokens, position_ids=far).logits)
    output = ours(tokens, labels=tokens)
    assert list(output) == ["loss", "logits"] and output[1] is output["logits"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_texts_do_not_see_each_other(implementation):
    theirs = theirs_of(attn_implementation=implementation)
    ours = ours_of(theirs)
    tokens = ids()
    lengths = [5, 1, 8, 3]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    options = {"position_ids": positions, "output_attentions": implementation == "eager"}
    inputs = {"input_ids": tokens, **options}
    mine = ours(**inputs, use_cache=False)
    torch.testing.assert_close(mine.logits, theirs(**inputs, use_cache=False).logits)
    start = 0
    for n in lengths:  # each as if it were alone
        torch.testing.assert_close(mine.logits[:, start : start + n], ours(tokens[:, start : start + n]).logits)
        start += n
    # By default transformers makes a cache, and then does not ask; a configuration without one does.
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits)
    ours.config.use_cache = theirs.config.use_cache = False
    torch.testing.assert_close(ours(**inputs).logits, mine.logits)
    with torch.no_grad():  # rows packed in different ways, one of them a single text
        rows = torch.stack([positions[0], torch.arange(LENGTH), positions[0].flip(0)])
        torch.testing.assert_close(ours(tokens, None, rows).logits, theirs(tokens, None, rows).logits)


def test_training_after_generating():
    """What is kept from inference mode, the tables of positions among it, must not stop autograd."""
    ours = ours_of(theirs_of())
    with torch.inference_mode():
        ours(ids())
        ours(ids(), position_ids=torch.arange(LENGTH))
    gradients(ours, input_ids=ids(), labels=ids())
    gradients(ours, input_ids=ids(), labels=ids(), position_ids=torch.arange(LENGTH))


@pytest.mark.parametrize("name", ["dynamic", "longrope, long"])
def test_scalings_that_follow_the_length(name):
    """Longer than trained on, shorter again, and position_ids that reach beyond."""
    theirs = theirs_of(**CONFIGS[name])
    ours = ours_of(theirs)
    for length in (6, LENGTH, 9, 14, 6):
        torch.testing.assert_close(ours(ids(2, length)).logits, theirs(ids(2, length)).logits)
    positions = torch.arange(20, 26)[None]
    tokens = ids(2, 6)
    torch.testing.assert_close(
        ours(tokens, position_ids=positions).logits, theirs(tokens, position_ids=positions).logits
    )


def test_dropout():
    ours = ours_of(theirs_of(attention_dropout=0.5))
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


class Adapter(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 1


LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


@pytest.mark.parametrize("path", LINEARS)
def test_a_replaced_layer_is_called(path):
    biases = {"attention_bias": True, "mlp_bias": True}
    ours = ours_of(theirs_of(**biases))
    wanted = ours(ids()).logits
    parent, _, name = path.rpartition(".")
    layer = ours.model.layers[1].get_submodule(parent)
    setattr(layer, name, Adapter(getattr(layer, name)))
    changed = ours(ids()).logits
    assert not torch.allclose(changed, wanted)
    setattr(layer, name, getattr(layer, name).inner)
    with torch.no_grad():
        getattr(layer, name).bias.add_(1)
    torch.testing.assert_close(ours(ids()).logits, changed)


@pytest.mark.parametrize("path", [*LINEARS, "self_attn", "mlp", "input_layernorm", "post_attention_layernorm"])
def test_a_hook_is_called(path):
    ours, calls = ours_of(theirs_of()), []
    wanted = ours(ids()).logits

    def hook(module, inputs, out):
        calls.append(1)
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    handle = ours.model.layers[1].get_submodule(path).register_forward_hook(hook)
    changed = ours(ids()).logits
    assert calls and not torch.allclose(changed, wanted)
    handle.remove()
    torch.testing.assert_close(ours(ids()).logits, wanted)


def test_the_other_modules_are_called():
    ours = ours_of(theirs_of())
    calls = []
    for path in ("model", "model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"):
        ours.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: calls.append(path))
    ours(ids())
    wanted = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "model", "lm_head"]
    assert calls == wanted


def test_replaced_embeddings():
    ours = ours_of(theirs_of(tie_word_embeddings=False))
    table, head = torch.nn.Embedding(VOCAB, 48), torch.nn.Linear(48, VOCAB, bias=False)
    ours.set_input_embeddings(table)
    ours.set_output_embeddings(head)
    assert ours.get_input_embeddings() is table and ours.model.get_input_embeddings() is table
    assert ours.get_output_embeddings() is head
    hidden = ours.model(inputs_embeds=table(ids())).last_hidden_state
    torch.testing.assert_close(ours(ids()).logits, head(hidden))


def test_frozen_parameters_get_no_gradient():
    ours = ours_of(theirs_of())
    _, wanted = gradients(ours, input_ids=ids(), labels=ids())
    wanted = {k: g.clone() for k, g in wanted.items()}
    ours.zero_grad()
    trained = ("layers.1.self_attn.q_proj", "layers.0.mlp.up_proj")
    for name, p in ours.named_parameters():
        p.requires_grad_(any(t in name for t in trained))
    ours(ids(), labels=ids()).loss.backward()
    for name, p in ours.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted[name])


def test_initial_values():
    torch.manual_seed(0)
    changes = {"hidden_size": 128, "vocab_size": 500, "attention_bias": True, "mlp_bias": True, "pad_token_id": 7}
    model = LlamaForCausalLM(LlamaConfig(**fields(**changes, initializer_range=0.05, tie_word_embeddings=False)))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(p, torch.zeros_like(p)), name
        elif "norm" in name:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            assert abs(p.std().item() / 0.05 - 1) < 0.05 and abs(p.mean().item()) < 0.005, name
    assert not model.model.embed_tokens.weight[7].any() and model.lm_head.weight[7].any()


@pytest.mark.parametrize("bias", [False, True])
def test_projections_are_one_matmul(bias):
    ours = ours_of(theirs_of(attention_bias=bias))
    for twin in (ours, copy.deepcopy(ours), ours.bfloat16()):
        attention = twin.model.layers[0].self_attn
        x = torch.randn(2, 3, 48, dtype=twin.dtype)
        whole = attention.joined_output(x)
        parts = [layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        torch.testing.assert_close(whole, torch.cat(parts, -1))
    # One of them replaced: called one by one, and its output is not written into.
    kept = []
    attention.k_proj.register_forward_hook(lambda m, i, out: kept.append((out, out.clone())))
    with torch.no_grad():
        ours(ids())
    assert attention.joined_output(x) is None and torch.equal(*kept[0])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"head_dim": 7}, "head_dim"),
        ({"head_dim": 0}, "head_dim"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"hidden_act": "silly"}, "hidden_act"),
        ({"pad_token_id": VOCAB}, "pad_token_id"),
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope_parameters: rope_type 'ntk'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: 'linear' needs factor"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters: rope_theta"),
        ({"rope_parameters": 3}, "rope_parameters"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "rope_parameters: 'linear' with a partial_rotary_factor",
        ),
    ],
)
def test_bad_configurations_are_named(changes, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        LlamaConfig(**fields(**changes))


@pytest.mark.parametrize(
    ("inputs", "error", "name"),
    [
        ({}, ValueError, "input_ids"),
        ({"input_ids": torch.full((1, 3), VOCAB)}, ValueError, "input_ids"),
        ({"input_ids": torch.full((1, 3), -1)}, ValueError, "input_ids"),
        ({"input_ids": torch.zeros(1, 3)}, TypeError, "input_ids"),
        ({"input_ids": ids(), "inputs_embeds": torch.zeros(3, LENGTH, 48)}, ValueError, "input_ids"),
        ({"inputs_embeds": torch.zeros(1, 3, 47)}, ValueError, "inputs_embeds"),
        ({"input_ids": ids(), "attention_mask": torch.ones(3, 16)}, ValueError, "attention_mask"),
        ({"input_ids": ids(), "position_ids": torch.full((3, LENGTH), -1)}, ValueError, "position_ids"),
        ({"input_ids": ids(), "position_ids": torch.zeros(2, LENGTH, dtype=torch.long)}, ValueError, "position_ids"),
        ({"input_ids": ids(), "labels": ids()[:, 1:]}, ValueError, "labels"),
        ({"input_ids": ids(), "labels": ids(), "logits_to_keep": 1}, ValueError, "logits_to_keep"),
    ],
)
def test_bad_input_is_named(inputs, error, name):
    with pytest.raises(error, match=f"^{name}"):
        LlamaForCausalLM(LlamaConfig(**fields()))(**inputs)


def test_config_names():
    defaults, theirs = LlamaConfig().to_dict(), transformers.LlamaConfig().to_dict()
    assert {k: theirs[k] for k in defaults} == defaults
    old = {
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "num_key_value_heads": None,
        "task": "x",
    }
    for config in (LlamaConfig.from_dict(old), LlamaConfig(rope_theta=5e5, rope_scaling=old["rope_scaling"])):
        wanted = transformers.LlamaConfig(rope_theta=5e5, rope_scaling=dict(old["rope_scaling"])).rope_parameters
        assert config.rope_parameters == wanted and config.num_key_value_heads == 32
    assert LlamaConfig.from_dict(old).to_dict()["task"] == "x" and "rope_theta" not in LlamaConfig().to_dict()
    assert old["rope_scaling"] == {"type": "linear", "factor": 2.0}, "arguments stay as they are"
    for values in (
        {"rope_scaling": None, "rope_theta": 3.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 3.0, "rope_parameters": {"rope_theta": 7.0}},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 123},
    ):
        peer = transformers.LlamaConfig.from_dict(copy.deepcopy(values))
        LlamaRotaryEmbedding(peer)  # completes rope_parameters
        assert LlamaConfig.from_dict(values).rope_parameters == peer.rope_parameters
    with pytest.raises(ValueError, match="model_type"):
        LlamaConfig.from_dict({"model_type": "gpt2"})
    assert not hasattr(LlamaConfig(), "rope_theta")


def test_entries_of_rope_parameters_without_a_use_are_said_and_kept():
    given = {"type": "yarn", "factor": 4.0, "finetuned": True}  # as a published model has it
    with pytest.warns(UserWarning, match="of type 'yarn' have no use for finetuned"):
        config = LlamaConfig(rope_scaling=given)
    assert config.to_dict()["rope_parameters"]["finetuned"] is True
    LlamaModel(LlamaConfig(**fields(rope_parameters={"rope_type": "default"})))


@pytest.mark.parametrize("name", ["grouped heads", "longrope, long"])
def test_compiles_to_one_graph(name):
    ours = ours_of(theirs_of(num_hidden_layers=1, **CONFIGS[name]))
    wanted, gradients_wanted = gradients(ours, input_ids=ids(), labels=ids())
    gradients_wanted = {k: g.clone() for k, g in gradients_wanted.items()}
    torch._dynamo.reset()
    compiled = torch.compile(ours.train(), backend="aot_eager", fullgraph=True)
    output, found = gradients(compiled, input_ids=ids(), labels=ids())
    torch.testing.assert_close(output.logits, wanted.logits)
    for key, gradient in gradients_wanted.items():
        torch.testing.assert_close(found[f"_orig_mod.{key}"], gradient)
    positions = torch.arange(LENGTH)[None]
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids(), position_ids=positions).logits, wanted.logits)
        packed = torch.cat((torch.arange(5), torch.arange(LENGTH - 5)))[None]
        for twin in (ours, compiled):
            found = twin(ids(), position_ids=packed, use_cache=False).logits
            torch.testing.assert_close(found[:, :5], wanted.logits[:, :5])
            torch.testing.assert_close(found[:, 5:], ours(ids()[:, 5:]).logits)


def test_compiles_before_it_ever_ran():
    """Tables made while the compiler traces."""
    ours = ours_of(theirs_of(num_hidden_layers=1))
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        first, second = compiled(ids()).logits, compiled(ids()).logits
    torch.testing.assert_close(first, ours_of(theirs_of(num_hidden_layers=1))(ids()).logits)
    assert torch.equal(first, second)


def test_exports():
    ours = ours_of(theirs_of(num_hidden_layers=1))
    options = {"use_cache": False, "return_dict": False}
    program = torch.export.export(ours, (ids(),), options)
    assert not ours.model.rotary_emb._tables, "nothing of the tracer's stays"
    torch.testing.assert_close(program.module()(ids(), **options)[0], ours(ids()).logits)


def test_meta_device_and_dtype():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**fields()))
    assert all(p.is_meta for p in model.parameters())
    real = model.to_empty(device="cpu")
    real.load_state_dict(theirs_of().state_dict())
    real.tie_weights()
    torch.testing.assert_close(real(ids()).logits, theirs_of()(ids()).logits)
