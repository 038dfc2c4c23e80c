"""Model directories: transformers reads what we write, we read what it writes, now and in older formats."""

import json

import pytest
import torch
import transformers

import fastformer
from fastformer.models import GPT2Config, GPT2LMHeadModel, GPT2Model
from tests.models.pairs import fields, ids, theirs_of


@pytest.mark.parametrize("tie", [True, False])
def test_directories_pass_both_ways(tmp_path, tie):
    theirs = theirs_of(tie_word_embeddings=tie)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastformer.from_pretrained(tmp_path / "theirs")
    assert type(ours) is GPT2LMHeadModel and not ours.training
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == tie
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is transformers.GPT2LMHeadModel
    for mine, peers in ((ours, theirs), (again, theirs)):
        state, wanted = mine.state_dict(), peers.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[k], wanted[k]) for k in wanted)
    # The same keys in the file, and every entry of their config.json in ours.
    assert file_keys(tmp_path / "ours") == file_keys(tmp_path / "theirs")
    mine, peers = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs"))
    assert {k: mine.get(k, "absent") for k in peers} == peers
    written = {f.name for f in (tmp_path / "ours").iterdir()}
    assert written == {"config.json", "generation_config.json", "model.safetensors"}


def file_keys(directory):
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
        return sorted(handle.keys())


@pytest.mark.parametrize("saved", ["base", "head"])
@pytest.mark.parametrize("loaded", [GPT2Model, GPT2LMHeadModel])
def test_with_and_without_prefix(tmp_path, saved, loaded):
    """A checkpoint of the model without its head has no "transformer." before its keys."""
    head = theirs_of()
    (head if saved == "head" else head.transformer).save_pretrained(tmp_path)
    ours = loaded.from_pretrained(tmp_path)
    hidden = ours(ids(), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, head.transformer(ids()).last_hidden_state)
    expected = GPT2LMHeadModel if saved == "head" else GPT2Model
    assert type(fastformer.from_pretrained(tmp_path)) is expected


def test_sharded_checkpoints(tmp_path):
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (tmp_path / "model.safetensors").exists()
    ours = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        GPT2LMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("limit, files", [("100KB", 4), (1, 28), ("1.5 MB", 1)])
def test_shards_of_ours(tmp_path, limit, files):
    """transformers reads them, and no file of an earlier save stays beside them."""
    torch.manual_seed(0)
    ours = GPT2LMHeadModel(GPT2Config(**fields()))
    ours.save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path, max_shard_size=limit)
    written = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(written) == files  # the tied tensor is stored once
    if len(written) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == written and "model.safetensors" not in written
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in ours.parameters())
    else:
        assert written == ["model.safetensors"] and not list(tmp_path.glob("*.index.json"))
    for again in (fastformer.from_pretrained(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        state = again.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())
    doubled = {key: 2 * tensor for key, tensor in ours.state_dict().items()}
    ours.save_pretrained(tmp_path, state_dict=doubled)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(fastformer.from_pretrained(tmp_path).lm_head.weight, 2 * ours.lm_head.weight)


def test_a_shard_size_that_is_none():
    for size in ("big", 0, "-1GB"):
        with pytest.raises(ValueError, match="max_shard_size: got"):
            GPT2LMHeadModel(GPT2Config(**fields())).save_pretrained("unused", max_shard_size=size)


def test_old_checkpoints(tmp_path):
    """pytorch_model.bin with keys of the base model, the causal masks as buffers, no architectures."""
    theirs = theirs_of()
    state = theirs.transformer.state_dict()
    for layer in range(2):
        state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 40, 40, dtype=torch.uint8).tril()
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = {k: v for k, v in theirs.config.to_dict().items() if k in ("n_embd", "n_head", "n_layer", "vocab_size")}
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_ctx": 40, "n_positions": 40, "model_type": "gpt2"}))
    ours = fastformer.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits)
    ours.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["n_ctx"] == 40


@pytest.mark.parametrize("dtype", [None, "bfloat16", torch.float64], ids=str)
def test_dtype_of_a_loaded_model(tmp_path, dtype):
    theirs_of(dtype=torch.float16).save_pretrained(tmp_path)
    ours = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in ours.parameters()} == {
        {None: torch.float16, "bfloat16": torch.bfloat16}.get(dtype, torch.float64)
    }


def test_fields_of_the_configuration_can_be_changed(tmp_path):
    theirs_of().save_pretrained(tmp_path)
    ours = fastformer.from_pretrained(tmp_path, resid_pdrop=0.3, num_hidden_layers=2)
    assert ours.config.resid_pdrop == 0.3 and ours.config.n_layer == 2
    with pytest.raises(TypeError, match=r"resid_drop: .*did you mean resid_pdrop\?"):
        fastformer.from_pretrained(tmp_path, resid_drop=0.3)


def test_a_broken_checkpoint_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    ours = GPT2LMHeadModel(GPT2Config(**fields()))
    ours.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)

    def load_with(state):
        save_file(state, file)
        GPT2LMHeadModel.from_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"missing transformer\.h\.1\.ln_2\.bias"):
        load_with({k: v for k, v in whole.items() if k != "transformer.h.1.ln_2.bias"})
    with pytest.raises(ValueError, match=r"unexpected transformer\.h\.7\.ln_2\.bias"):
        load_with({**whole, "transformer.h.7.ln_2.bias": torch.zeros(48)})
    with pytest.raises(ValueError, match=r"wpe\.weight: shape \(39, 48\).*\(40, 48\)"):
        load_with({**whole, "transformer.wpe.weight": torch.zeros(39, 48)})
    # One saved under the head's name alone is still whole: the two are the same tensor.
    renamed = {("lm_head.weight" if k == "transformer.wte.weight" else k): v for k, v in whole.items()}
    load_with(renamed)


def test_a_missing_or_foreign_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        fastformer.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        fastformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    with pytest.raises(ValueError, match="MambaForCausalLM"):
        fastformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        fastformer.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    ours = GPT2LMHeadModel(GPT2Config(**fields()))
    ours.save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    import safetensors.torch

    def fail(state, file, metadata):
        file.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        GPT2LMHeadModel(GPT2Config(**fields())).save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
