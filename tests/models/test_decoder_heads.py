"""GPT-2's and Llama's classifiers beside transformers': padding on either side, problem types, packed texts, files."""

import json

import pytest
import torch
import transformers

import fastformer
from fastformer.data import PackedCausalLM
from fastformer.models import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)
from tests.models import llama_pairs, pairs
from tests.models.parity import assert_as_accurate, assert_equal, assert_equal_loss, twin_of

SEQUENCE = (GPT2ForSequenceClassification, LlamaForSequenceClassification)
TOKEN = (GPT2ForTokenClassification, LlamaForTokenClassification)
every_class = pytest.mark.parametrize("cls", SEQUENCE + TOKEN, ids=lambda cls: cls.__name__)
of_sequences = pytest.mark.parametrize("cls", SEQUENCE, ids=lambda cls: cls.__name__)
PAD, LENGTH, LABELS = 5, 17, 3
LM = {"GPT2": GPT2LMHeadModel, "Llama": LlamaForCausalLM}


def family(cls):
    return pairs if cls.__name__.startswith("GPT2") else llama_pairs


def theirs_of(cls, dtype=torch.float64, **changes):
    changes = {"pad_token_id": PAD, "num_labels": LABELS, **changes}
    return family(cls).theirs_of(dtype=dtype, cls=getattr(transformers, cls.__name__), **changes)


def inputs_of(padding, masked=True):
    """Three texts: a whole one with the padding token within, and two of 11 and 16 tokens."""
    ids = pairs.ids().masked_fill(pairs.ids() == PAD, 6)
    ids[0, 3] = PAD
    real = torch.ones(3, LENGTH, dtype=torch.long)
    if padding is not None:
        real[1, slice(0, 6) if padding == "left" else slice(11, LENGTH)] = 0
        real[2, slice(0, 1) if padding == "left" else slice(16, LENGTH)] = 0
    inputs = {"input_ids": ids.masked_fill(real == 0, PAD)}
    if masked and padding is not None:
        inputs["attention_mask"] = real
    return inputs


def labels_of(cls):
    labels = torch.tensor([2, 0, -100])
    return labels if cls in SEQUENCE else labels[:, None].repeat(1, LENGTH).index_fill(1, torch.tensor([0, 4]), 1)


# ---- values and gradients --------------------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize(
    ("padding", "masked"), [(None, False), ("left", True), ("left", False), ("right", True), ("right", False)]
)
def test_logits_losses_and_gradients(cls, padding, masked):
    theirs, inputs = theirs_of(cls), inputs_of(padding, masked)
    ours = twin_of(theirs, cls)
    logits = ours(**inputs).logits
    assert logits.shape == ((3, LABELS) if cls in SEQUENCE else (3, LENGTH, LABELS))
    if cls in TOKEN and masked:  # outputs at padding are of no meaning, in a Llama of transformers too
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(logits[real], theirs(**inputs).logits[real], rtol=0, atol=1e-11)
        labels = labels_of(cls).masked_fill(~real, -100)
    else:
        assert_equal(theirs, ours, inputs)
        labels = labels_of(cls)
    assert_equal_loss(theirs, ours, {**inputs, "labels": labels})


@every_class
def test_half_precision(cls):
    inputs = {**inputs_of("right"), "labels": labels_of(cls)}
    assert_as_accurate(theirs_of(cls), cls, inputs, torch.bfloat16, ("loss",))
    assert twin_of(theirs_of(cls, torch.bfloat16), cls)(**inputs).loss.dtype == torch.float32


@of_sequences
@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        ("regression", 1, torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)),
        ("regression", 4, torch.arange(12, dtype=torch.float64).view(3, 4) / 5),
        ("single_label_classification", 5, torch.tensor([4, 0, -100])),
        ("multi_label_classification", 5, (torch.arange(15).view(3, 5) % 2).double()),
    ],
)
def test_problem_types(cls, problem, num_labels, labels):
    theirs = theirs_of(cls, num_labels=num_labels, problem_type=problem)
    ours = twin_of(theirs, cls)
    inputs = {**inputs_of("left"), "labels": labels}
    # The loss of classes in float32, as in transformers.
    assert_equal(theirs, ours, inputs, ("loss", "logits"), 1e-6 if problem[0] == "s" else 1e-10)
    wanted, ours.config.problem_type = ours(**inputs).loss, None
    assert (ours(**inputs).loss == wanted) == (problem != "regression" or num_labels == 1)


@every_class
def test_a_packed_text_has_its_own_logits_and_loss(cls):
    texts = [torch.randint(6, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 1, 12)]
    ours = twin_of(theirs_of(cls, pad_token_id=None), cls)
    batch = PackedCausalLM()(texts)
    batch["labels"] = torch.tensor([2, 0, 1]) if cls in SEQUENCE else batch["labels"] % LABELS
    packed = ours(**batch)
    packed.loss.backward()
    together = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    labels = batch["labels"].view(-1, 1) if cls in SEQUENCE else batch["labels"].split([5, 1, 12], 1)
    alone = [
        ours(text[None], labels=label.view(1, -1)[0] if cls in SEQUENCE else label)
        for text, label in zip(texts, labels)
    ]
    weights = [1, 1, 1] if cls in SEQUENCE else [5, 1, 12]
    (sum(a.loss * w for a, w in zip(alone, weights)) / sum(weights)).backward()
    logits = torch.cat([a.logits for a in alone], 0 if cls in SEQUENCE else 1)
    torch.testing.assert_close(packed.logits, logits, rtol=1e-10, atol=1e-11)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, ours.get_parameter(name).grad, rtol=1e-8, atol=1e-11)


# ---- arguments -------------------------------------------------------------------------------------------------------


@every_class
def test_other_ways_to_call(cls):
    theirs = theirs_of(cls)
    ours, inputs = twin_of(theirs, cls), inputs_of("right")
    wanted = ours(**inputs)
    embeds = ours.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["attention_mask"]
    # transformers takes the last position of embeddings, be it padding.
    torch.testing.assert_close(
        ours(inputs_embeds=embeds, attention_mask=mask).logits, wanted.logits, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        ours(inputs_embeds=embeds).logits, theirs(inputs_embeds=embeds).logits, rtol=0, atol=1e-11
    )
    options = {"output_hidden_states": True, "output_attentions": True}
    mine, peers = ours(**inputs, **options), theirs(**inputs, **options, use_cache=False)
    assert mine.keys() == tuple(peers) and ours(**inputs, return_dict=False)[0].equal(wanted.logits)
    assert len(mine.hidden_states) == len(peers.hidden_states) and len(mine.attentions) == 2
    with torch.no_grad():
        assert "past_key_values" not in ours(**inputs)  # nothing follows
        tokens = inputs["input_ids"][:1]
        cache = getattr(ours, ours.base_model_prefix)(tokens[:, :9]).past_key_values
        found = ours(tokens[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(found[..., -1, :], wanted.logits[0] if cls in SEQUENCE else wanted.logits[:1, -1])


@of_sequences
def test_what_cannot_be_scored_is_named(cls):
    model = twin_of(theirs_of(cls, pad_token_id=None), cls)
    ids = inputs_of(None)["input_ids"]
    assert model(ids[:1]).logits.shape == (1, LABELS)  # one text ends where it ends
    starts = torch.tensor([0, 4, 4, LENGTH], dtype=torch.int32)
    embeds = torch.zeros(2, 3, model.config.hidden_size).double()
    for call, message in (
        (lambda: model(ids), r"^pad_token_id: the configuration has none, so where each of 3 texts"),
        (lambda: model(inputs_embeds=embeds), r"^pad_token_id"),
        (lambda: model(), r"^input_ids"),
        (lambda: model(ids[:1], labels=torch.tensor([0, 1])), r"^labels: shape \(2,\)"),
        (lambda: model(ids[:1], cu_seq_lens_q=starts, cu_seq_lens_k=starts), r"^cu_seq_lens_q: a text without tokens"),
        (lambda: model.generate(ids[:1]), rf"^model: {cls.__name__} does not predict the next token"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="unexpected keyword argument 'token_types'"):
        model(ids[:1], token_types=ids[:1])


def test_labels_of_a_configuration():
    for cls, small in ((GPT2Config, pairs.fields()), (LlamaConfig, llama_pairs.fields())):
        assert cls(**small).num_labels == 2 and "classifier_dropout" not in cls(**small).to_dict()
        config = cls(**small, id2label={0: "no", 1: "yes", 2: "maybe"}, classifier_dropout=0.3)
        assert config.num_labels == 3 and config.label2id["maybe"] == 2 and config.head_dropout == 0.3
        assert cls.from_dict(config.to_dict()) == config
        assert cls.from_dict({**small, "hidden_dropout": 0.2}).head_dropout == 0.2
        config.num_labels = 1
        assert config.id2label == {0: "LABEL_0"} and cls(**small).head_dropout == 0.1
        for changes, name in (
            ({"num_labels": 0}, "num_labels"),
            ({"num_labels": 3, "id2label": {0: "a"}}, "num_labels"),
            ({"problem_type": "ranking"}, "problem_type"),
            ({"classifier_dropout": 1.5}, "classifier_dropout"),
        ):
            with pytest.raises(ValueError, match=f"^{name}"):
                cls(**small, **changes)


# ---- files -----------------------------------------------------------------------------------------------------------


@every_class
def test_directories_pass_both_ways(tmp_path, cls):
    labels = {"no": 0, "yes": 1, "maybe": 2}
    theirs = theirs_of(cls, torch.float32, id2label={i: label for label, i in labels.items()}, label2id=labels)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastformer.from_pretrained(tmp_path / "theirs")
    assert type(ours) is cls and ours.num_labels == 3 and ours.config.id2label[1] == "yes"
    ours.save_pretrained(tmp_path / "ours")
    again = getattr(transformers, cls.__name__).from_pretrained(tmp_path / "ours")
    for state in (ours.state_dict(), again.state_dict()):
        assert state.keys() == theirs.state_dict().keys()
        assert all(value.equal(state[name]) for name, value in theirs.state_dict().items())
    mine, peers = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs"))
    assert {k: mine.get(k, "absent") for k in peers} == peers


@every_class
@pytest.mark.parametrize("tie", [True, False])
def test_from_a_language_model_and_back(tmp_path, cls, tie):
    """The head is new, the body and nothing else is the checkpoint's; a classifier's body makes a language model."""
    causal = LM[cls.__name__.split("For")[0]]
    small = family(cls).fields(tie_word_embeddings=tie, initializer_range=0.05)
    language_model = causal(causal.config_class(**small))
    language_model.save_pretrained(tmp_path / "lm")
    head = "classifier" if cls is GPT2ForTokenClassification else "score"
    with pytest.warns(UserWarning, match=rf"has no {head}\..*; this head starts at random values"):
        reward = cls.from_pretrained(tmp_path / "lm", num_labels=1, pad_token_id=PAD)
    assert reward.config.num_labels == 1 and reward.config.pad_token_id == PAD
    layer = reward.get_submodule(head)
    assert 0.02 < layer.weight.std() < 0.1 and (layer.bias is None or not layer.bias.any())
    assert (layer.bias is None) == (cls in SEQUENCE)
    prefix = reward.base_model_prefix
    for name, p in getattr(language_model, prefix).named_parameters():
        assert p.equal(getattr(reward, prefix).get_parameter(name)), name
    reward.save_pretrained(tmp_path / "reward")
    if tie:
        ids = inputs_of(None)["input_ids"]
        again = causal.from_pretrained(tmp_path / "reward").eval()
        assert again(ids).logits.equal(language_model.eval()(ids).logits)
    else:
        with pytest.warns(UserWarning, match=r"lm_head\.weight; this head starts at random"):
            causal.from_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match=rf"^{head}\.(weight|bias): shape \(1,"):
        cls.from_pretrained(tmp_path / "reward", num_labels=4)
