"""Where options come from: the call, a generation_config, generation_config.json, the model's configuration."""

import json
import pickle
from copy import deepcopy

import pytest
import torch
import transformers

from fastformer.generation import GenerationConfig
from fastformer.models import GPT2LMHeadModel, from_pretrained
from tests.generation.pairs import END, PAD, models, prompts, some_end_tokens

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")  # theirs


def saved(tmp_path, seed=0, **options):
    """A directory that transformers wrote, loaded by both."""
    _, theirs = models(seed)
    theirs.generation_config.update(**options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT2LMHeadModel.from_pretrained(tmp_path / "theirs")
    return ours, transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "theirs")


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 7},
        {"max_length": 20, "repetition_penalty": 1.4},
        {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True, "num_return_sequences": 2},
        {"eos_token_id": some_end_tokens(), "pad_token_id": 0, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_the_file_beside_a_model_sets_the_defaults(tmp_path, options):
    ours, theirs = saved(tmp_path, **options)
    ids, mask = prompts((9, 5))
    wanted = theirs.generate(ids, attention_mask=mask)
    assert torch.equal(ours.generate(ids, attention_mask=mask), wanted)
    assert not torch.equal(models()[0].generate(ids, attention_mask=mask), wanted), "the file makes a difference"
    for name, value in options.items():
        assert getattr(ours.generation_config, name) == value
    found = ours.generate(ids, attention_mask=mask, max_new_tokens=3, num_beams=1, num_return_sequences=1)
    assert torch.equal(found, theirs.generate(ids, attention_mask=mask, max_new_tokens=3, num_beams=1,
                                              num_return_sequences=1, early_stopping=False))  # fmt: skip


def test_sampling_set_by_the_file(tmp_path):
    ours, _ = saved(tmp_path, do_sample=True, temperature=2.0, top_k=3, min_p=0.01, eos_token_id=None)
    ids, _ = prompts((9,))
    found = ours.generate(ids, seed=0)
    assert torch.equal(found, ours.generate(ids, seed=0, do_sample=True, temperature=2.0, top_k=3, min_p=0.01))
    assert not torch.equal(found, ours.generate(ids, seed=1))
    assert torch.equal(
        ours.generate(ids, do_sample=False, eos_token_id=None), models()[0].generate(ids, eos_token_id=[])
    )
    wide = ours.generate(ids.expand(200, -1), seed=0, max_new_tokens=1)[:, -1].unique()
    assert (
        len(wide) <= 3 < len(ours.generate(ids.expand(200, -1), seed=0, max_new_tokens=1, top_k=None)[:, -1].unique())
    )


def test_files_pass_both_ways_and_keep_what_is_not_ours(tmp_path):
    ours, _ = saved(tmp_path, temperature=0.7, do_sample=True, renormalize_logits=False, num_assistant_tokens=5)
    ours.generation_config.top_p = 0.9
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").generation_config
    assert (again.temperature, again.top_p, again.do_sample, again.num_assistant_tokens) == (0.7, 0.9, True, 5)
    mine, peers = (json.loads((tmp_path / who / "generation_config.json").read_text()) for who in ("ours", "theirs"))
    assert mine == {**peers, "top_p": 0.9}
    assert from_pretrained(tmp_path / "ours").generation_config == ours.generation_config
    GenerationConfig(max_new_tokens=3).save_pretrained(tmp_path / "alone")
    assert GenerationConfig.from_pretrained(tmp_path / "alone") == GenerationConfig(max_new_tokens=3)
    with pytest.raises(FileNotFoundError, match=r"generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object"):
        GenerationConfig.from_pretrained(tmp_path)


def test_a_model_that_was_not_loaded_follows_its_configuration():
    ours, _ = models()
    ids, _ = prompts((9,))
    free = ours.generate(ids, eos_token_id=[])
    ours.config.eos_token_id = int(free[0, 13])
    assert ours.generate(ids).shape[1] <= 14 < free.shape[1]
    assert ours.generation_config.eos_token_id == ours.config.eos_token_id
    ours.generation_config.eos_token_id = None
    assert torch.equal(ours.generate(ids), free)
    for copy in (deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copy.generate(ids), free)
        copy.generation_config.max_new_tokens = 2
        assert ours.generation_config.max_new_tokens is None


def test_a_configuration_for_one_call():
    ours, theirs = models()
    ids, mask = prompts((9, 5))
    options = {"num_beams": 2, "max_new_tokens": 9, "repetition_penalty": 1.2, "pad_token_id": PAD}
    wanted = theirs.generate(ids, attention_mask=mask, generation_config=transformers.GenerationConfig(**options))
    given = {"attention_mask": mask, "generation_config": GenerationConfig(**options)}
    assert torch.equal(ours.generate(ids, **given), wanted)
    theirs_given = {**given, "generation_config": transformers.GenerationConfig(**options)}
    assert torch.equal(ours.generate(ids, **theirs_given), wanted)
    with pytest.raises(TypeError, match=r"^generation_config: .* got dict"):
        ours.generate(ids, generation_config=options)
    assert ours.generate(ids, max_new_tokens=2, **given).shape[1] == 11, "an argument goes first"
    ours.generation_config = transformers.GenerationConfig(eos_token_id=END, **options)
    assert torch.equal(ours.generate(ids, attention_mask=mask), wanted)


def test_a_limit_that_is_passed_is_meant():
    ours, _ = models()
    ids, _ = prompts((9,))
    ours.generation_config.max_new_tokens = 30
    assert ours.generate(ids, max_length=12, eos_token_id=[]).shape == (1, 12)
    assert ours.generate(ids, eos_token_id=[]).shape == (1, 39)


def test_what_has_no_effect_here_is_said():
    ours, _ = models()
    ids, _ = prompts((9,))
    ours.generation_config = GenerationConfig.from_dict({"typical_p": 0.8, "diversity_penalty": 0.0, "comment": "x"})
    with pytest.warns(UserWarning, match=r"no effect here: typical_p=0\.8$"):
        ours.generate(ids, max_new_tokens=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [("max_tokens", "max_new_tokens"), ("token_type_ids", "no such argument"), ("temprature", "mean temperature")],
)
def test_an_unknown_argument_is_named(name, message):
    ours, _ = models()
    with pytest.raises(TypeError, match=f"^{name}: .*{message}"):
        ours.generate(prompts((9,))[0], **{name: 1})


def test_none_is_off():
    ours, theirs = models()
    ids, _ = prompts((9,))
    ours.generation_config.repetition_penalty = 3.0
    wanted = theirs.generate(ids, do_sample=False, eos_token_id=None)
    assert not torch.equal(ours.generate(ids, eos_token_id=None), wanted)
    assert torch.equal(ours.generate(ids, eos_token_id=None, repetition_penalty=None, num_beams=None), wanted)
