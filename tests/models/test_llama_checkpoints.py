"""Llama directories: transformers reads what we write, we read what it writes, now and in older formats; generation."""

import json

import pytest
import torch
import transformers

import fastformer
from fastformer.models import LlamaConfig, LlamaForCausalLM, LlamaModel
from tests.models.llama_pairs import CONFIGS, LLAMA3, LONGROPE, fields, ids, ours_of, theirs_of


@pytest.mark.parametrize(
    "name", ["grouped heads", "one key head, untied", "wide heads", "biases", "llama3", "longrope, long"]
)
def test_directories_pass_both_ways(tmp_path, name):
    theirs = theirs_of(**CONFIGS[name])
    tie = theirs.config.tie_word_embeddings
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastformer.from_pretrained(tmp_path / "theirs")
    assert type(ours) is LlamaForCausalLM and not ours.training
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tie
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits)
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is transformers.LlamaForCausalLM
    for model in (ours, again):
        state, wanted = model.state_dict(), theirs.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[k], wanted[k]) for k in wanted)
    torch.testing.assert_close(again(ids()).logits, theirs(ids()).logits)
    # The same keys in the file, and every entry of their config.json in ours.
    assert file_keys(tmp_path / "ours") == file_keys(tmp_path / "theirs")
    mine, peers = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs"))
    assert {k: mine.get(k, "absent") for k in peers} == peers


def file_keys(directory):
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "pt") as handle:
        return sorted(handle.keys())


@pytest.mark.parametrize("saved", ["base", "head"])
@pytest.mark.parametrize("loaded", [LlamaModel, LlamaForCausalLM])
def test_with_and_without_prefix(tmp_path, saved, loaded):
    head = theirs_of()
    (head if saved == "head" else head.model).save_pretrained(tmp_path)
    ours = loaded.from_pretrained(tmp_path)
    hidden = ours(ids(), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, head.model(ids()).last_hidden_state)
    assert type(fastformer.from_pretrained(tmp_path)) is (LlamaForCausalLM if saved == "head" else LlamaModel)


def test_a_head_that_is_not_there_starts_at_random(tmp_path):
    theirs_of(cls=transformers.LlamaModel, tie_word_embeddings=False).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"has no lm_head\.weight; this head starts at random"):
        ours = LlamaForCausalLM.from_pretrained(tmp_path)
    assert 0.01 < ours.lm_head.weight.std() < 0.03


def test_sharded_checkpoints(tmp_path):
    theirs = theirs_of(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (tmp_path / "model.safetensors").exists()
    ours = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}, LLAMA3, LONGROPE])
def test_old_checkpoints(tmp_path, scaling):
    """pytorch_model.bin with every layer's frequencies, rope_theta and rope_scaling on their own, few fields."""
    changes = {"rope_theta": 5000.0, "rope_scaling": scaling, "head_dim": 8}
    theirs = theirs_of(**changes)
    state = theirs.state_dict()
    for layer in range(2):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    torch.save(state, tmp_path / "pytorch_model.bin")
    kept = {k: v for k, v in {**fields(), **changes}.items() if k != "num_key_value_heads"}
    config = {**kept, "num_key_value_heads": 2, "model_type": "llama", "architectures": ["LLaMAForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    ours = fastformer.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits)
    assert {p.dtype for p in fastformer.from_pretrained(tmp_path).parameters()} == {torch.float16}
    ours.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(ids()).logits, theirs(ids()).logits)


def test_fields_of_the_configuration_can_be_changed(tmp_path):
    theirs_of().save_pretrained(tmp_path)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    ours = fastformer.from_pretrained(tmp_path, rope_parameters=rope, attention_dropout=0.25)
    assert ours.config.attention_dropout == 0.25 and ours.config.rope_parameters["factor"] == 2.0
    torch.testing.assert_close(
        ours(ids()).logits, transformers.LlamaForCausalLM.from_pretrained(tmp_path, rope_parameters=rope)(ids()).logits
    )
    with pytest.raises(TypeError, match=r"rope_parameter: .*did you mean rope_parameters\?"):
        fastformer.from_pretrained(tmp_path, rope_parameter=rope)


def test_a_broken_checkpoint_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    LlamaForCausalLM(LlamaConfig(**fields())).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.self_attn.k_proj.weight"
    save_file({k: v for k, v in whole.items() if k != key}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"missing {key}"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    save_file({**whole, key: torch.zeros(48, 48)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"k_proj.weight: shape \(48, 48\).*\(24, 48\)"):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["grouped heads", "biases", "llama3", "one key head, untied"])
def test_greedy_generation_is_that_of_transformers(name):
    """Token for token, alone and in a padded batch."""
    theirs = theirs_of(**CONFIGS[name], pad_token_id=0, eos_token_id=None)
    ours = ours_of(theirs)
    prompts = ids(3, 9).clamp(min=1)
    mask = torch.ones_like(prompts)
    prompts[1, :4], mask[1, :4] = 0, 0
    found = ours.generate(prompts, attention_mask=mask, max_new_tokens=12)
    wanted = theirs.generate(prompts, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert found.tolist() == wanted.tolist()
    alone = ours.generate(prompts[1:2, 4:], max_new_tokens=12)
    assert alone[0].tolist() == found[1, 4:].tolist()
    assert torch.equal(found, ours.generate(prompts, attention_mask=mask, max_new_tokens=12, use_cache=False))
