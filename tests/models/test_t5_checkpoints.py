"""T5's directories: transformers reads what we write, we read what it writes, now and in older formats."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastformer
from fastformer.models import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Model
from tests.models.t5_pairs import CONFIGS, fields, ids, inputs, theirs_of

CLASSES = {
    "T5Model": T5Model,
    "T5ForConditionalGeneration": T5ForConditionalGeneration,
    "T5EncoderModel": T5EncoderModel,
}


def file_keys(directory):
    with safe_open(directory / "model.safetensors", "pt") as handle:
        return sorted(handle.keys())


def assert_same_state(mine, peers):
    state, wanted = mine.state_dict(), peers.state_dict()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("name", ["1.0", "1.1", "1.1, tied", "decoder of another depth"])
def test_directories_pass_both_ways(tmp_path, name):
    theirs = theirs_of(**CONFIGS[name])
    tied = theirs.config.tie_word_embeddings
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastformer.from_pretrained(tmp_path / "theirs")
    assert type(ours) is T5ForConditionalGeneration and not ours.training
    assert (ours.lm_head.weight is ours.shared.weight) == tied
    assert ours.encoder.embed_tokens.weight is ours.decoder.embed_tokens.weight is ours.shared.weight
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    assert type(again) is transformers.T5ForConditionalGeneration
    assert (again.lm_head.weight is again.shared.weight) == tied
    for model in (ours, again):
        assert_same_state(model, theirs)
        torch.testing.assert_close(model(**inputs()).logits, theirs(**inputs()).logits, rtol=1e-4, atol=1e-4)
    # The same keys in the file, and every entry of their config.json in ours.
    assert file_keys(tmp_path / "ours") == file_keys(tmp_path / "theirs")
    mine, peers = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs"))
    assert {k: mine.get(k, "absent") for k in peers} == peers


def test_an_output_embedding_of_its_own_that_the_configuration_does_not_tell_of(tmp_path):
    """What transformers writes for T5 1.1: tie_word_embeddings is true, and an lm_head that is not the embedding."""
    theirs = theirs_of(**CONFIGS["1.1"])
    theirs.config.tie_word_embeddings = True
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["tie_word_embeddings"] is True
    ours = fastformer.from_pretrained(tmp_path / "theirs")
    assert_same_state(ours, theirs)
    assert not ours.config.scale_decoder_outputs and not ours.config.tie_word_embeddings
    torch.testing.assert_close(ours(**inputs()).logits, theirs(**inputs()).logits, rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    for again in (
        fastformer.from_pretrained(tmp_path / "ours"),
        transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours"),
    ):
        assert_same_state(again, theirs)
        assert again.lm_head.weight is not again.shared.weight and not again.config.scale_decoder_outputs


@pytest.mark.parametrize("saved", CLASSES)
@pytest.mark.parametrize("loaded", CLASSES)
def test_models_of_one_checkpoint(tmp_path, saved, loaded):
    theirs = theirs_of(cls=getattr(transformers, saved))
    theirs.save_pretrained(tmp_path)
    assert type(fastformer.from_pretrained(tmp_path)) is CLASSES[saved]
    if saved == "T5EncoderModel" and loaded != saved:
        with pytest.raises(ValueError, match=r"missing decoder\."):
            CLASSES[loaded].from_pretrained(tmp_path)
        return
    ours = CLASSES[loaded].from_pretrained(tmp_path)
    hidden = ours.get_encoder()(ids()).last_hidden_state
    torch.testing.assert_close(hidden, theirs.get_encoder()(ids()).last_hidden_state, rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    assert_same_state(getattr(transformers, loaded).from_pretrained(tmp_path / "ours"), ours)


def test_a_head_that_the_checkpoint_lacks_is_named(tmp_path):
    theirs_of(cls=transformers.T5Model).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"lm_head\.weight"):
        ours = T5ForConditionalGeneration.from_pretrained(tmp_path, tie_word_embeddings=False)
    assert 0.8 < ours.lm_head.weight.std() < 1.2


def test_sharded_checkpoints(tmp_path):
    theirs = theirs_of(**CONFIGS["1.1"])
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_state(fastformer.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("name", ["1.0", "1.1"])
def test_old_checkpoints(tmp_path, name):
    """pytorch_model.bin with every copy of the embedding, a table that cross-attention never read, and a configuration
    that says neither how the decoder's outputs are scaled nor what the activation is."""
    theirs = theirs_of(**CONFIGS[name])
    state = theirs.state_dict()
    state["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(8, 3)
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = fields(**CONFIGS[name], model_type="t5", task_specific_params={"x": 1}, output_past=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = fastformer.from_pretrained(tmp_path)
    assert_same_state(ours, theirs)
    torch.testing.assert_close(ours(**inputs()).logits, theirs(**inputs()).logits, rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["task_specific_params"] == {"x": 1}


def test_one_copy_of_the_embedding_is_enough(tmp_path):
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    for key in ("lm_head.weight", "decoder.embed_tokens.weight"):
        save_file({(key if k == "shared.weight" else k): v for k, v in whole.items()}, file)
        assert_same_state(T5ForConditionalGeneration.from_pretrained(tmp_path), theirs)
    save_file({k: v for k, v in whole.items() if k != "shared.weight"}, file)
    with pytest.raises(ValueError, match=r"missing shared\.weight"):
        T5ForConditionalGeneration.from_pretrained(tmp_path)


def test_a_stack_with_an_embedding_of_its_own_is_refused(tmp_path):
    theirs_of().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "encoder.embed_tokens.weight": torch.zeros(97, 48)}, file)
    with pytest.raises(ValueError, match=r"^encoder\.embed_tokens\.weight: differs from shared\.weight"):
        fastformer.from_pretrained(tmp_path)


def test_a_broken_checkpoint_is_named(tmp_path):
    T5ForConditionalGeneration(T5Config(**fields())).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    key = "decoder.block.1.layer.1.EncDecAttention.k.weight"
    for state, message in (
        ({k: v for k, v in whole.items() if k != key}, "missing decoder"),
        ({**whole, key: torch.zeros(36, 47)}, r"EncDecAttention\.k\.weight: shape \(36, 47\)"),
        ({**whole, "decoder.block.1.layer.1.extra": torch.zeros(1)}, "unexpected decoder"),
    ):
        save_file(state, file)
        with pytest.raises(ValueError, match=message):
            T5ForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64], ids=str)
def test_dtype_of_a_loaded_model(tmp_path, dtype):
    theirs_of().save_pretrained(tmp_path)
    ours = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype, dropout_rate=0.2)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16 if dtype == "bfloat16" else torch.float64}
    assert ours.config.dropout_rate == 0.2 and ours.decoder.config.dropout_rate == 0.2
