"""fastformer's BERT beside transformers', on random checkpoints: outputs, losses, every gradient."""

import copy
import pickle

import pytest
import torch

from fastformer import nn
from fastformer.models import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from tests.models.bert_pairs import (
    CLASSES,
    SEGMENTS,
    SMALL,
    VOCAB,
    draw,
    ids,
    labels_of,
    mask,
    ours_of,
    targets_of,
    theirs_of,
)
from tests.models.parity import assert_as_accurate, assert_equal, assert_equal_loss, gradients, twin_of

# name -> fields that differ from a small BERT
CONFIGS = {
    "two layers": {},
    "four layers, wide feed-forward": {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 200},
    "odd head_dim": {"hidden_size": 57, "num_attention_heads": 3},  # head_dim 19, rows of 57: no multiple of a vector
    "one head, one layer": {"num_attention_heads": 1, "num_hidden_layers": 1},
    "tanh gelu": {"hidden_act": "gelu_new"},
    "mish": {"hidden_act": "mish"},  # no fused kernel
    "untied": {"tie_word_embeddings": False},
    "other epsilon": {"layer_norm_eps": 1e-2},
    "no padding token": {"pad_token_id": None, "type_vocab_size": 1},
}
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
# A call that has no fused kernel says so; the tests of such calls ask for it.
unfused = pytest.mark.filterwarnings("ignore:fastformer.attention")


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients_in_float64(name):
    theirs = theirs_of(**CONFIGS[name])
    ours = twin_of(theirs, BertForMaskedLM)
    types = draw(theirs.config.type_vocab_size, 3, 17)
    inputs = {"input_ids": ids(), "attention_mask": mask(), "token_type_ids": types}
    assert_equal(theirs, ours, inputs)
    inputs["labels"] = labels_of(BertForMaskedLM)
    assert_equal(theirs, ours, inputs, ("loss", "logits"))


@every_class
def test_every_class_in_float64(cls):
    theirs = theirs_of(cls)
    ours = twin_of(theirs, cls)
    assert_equal(theirs, ours, {"input_ids": ids()}, CLASSES[cls][1])
    if cls is not BertModel:
        assert_equal_loss(theirs, ours, {"input_ids": ids(), "attention_mask": mask(), **targets_of(cls)})


@pytest.mark.parametrize("name", CONFIGS)
def test_as_accurate_as_transformers_in_float32(name):
    theirs = theirs_of(**CONFIGS[name])
    inputs = {"input_ids": ids(), "attention_mask": mask()}
    assert_as_accurate(theirs, BertForMaskedLM, inputs, torch.float32)


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(cls, dtype):
    theirs = theirs_of(cls)
    inputs = {"input_ids": ids(), "attention_mask": mask(), "token_type_ids": draw(SEGMENTS, 3, 17)}
    assert_as_accurate(theirs, cls, inputs, dtype, CLASSES[cls][1])
    if cls is not BertModel:
        inputs |= targets_of(cls)
        assert_as_accurate(theirs, cls, inputs, dtype, ("loss",))
        output = twin_of(theirs.to(dtype), cls)(**inputs)
        assert output.loss.dtype == torch.float32 and output[1].dtype == dtype


@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        ("regression", 1, torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)),
        ("regression", 1, torch.tensor([[0.3], [-1.0], [2.0]], dtype=torch.float64)),
        ("regression", 4, torch.randn(3, 4, dtype=torch.float64)),
        ("single_label_classification", 5, torch.tensor([4, 0, -100])),
        ("multi_label_classification", 5, (torch.arange(15).view(3, 5) % 2).double()),
    ],
)
def test_problem_types(problem, num_labels, labels):
    """Named in the configuration; not named, they follow from the labels where these leave no doubt."""
    cls, inputs = BertForSequenceClassification, {"input_ids": ids(), "labels": labels}
    theirs = theirs_of(cls, num_labels=num_labels, problem_type=problem)
    ours = twin_of(theirs, cls)
    assert ours.classifier.out_features == num_labels
    assert_equal(theirs, ours, inputs, ("loss", "logits"))
    wanted = ours(**inputs).loss
    ours.config.problem_type = None
    assert (ours(**inputs).loss == wanted) == (problem != "regression" or num_labels == 1)
    assert ours.config.problem_type is None


# ---- arguments and outputs -------------------------------------------------------------------------------------------


@every_class
def test_hidden_states_and_attentions(cls):
    theirs = theirs_of(cls, num_hidden_layers=3)
    ours = twin_of(theirs, cls)
    inputs = {"input_ids": ids(), "attention_mask": mask()}
    mine, peers = (m(**inputs, output_hidden_states=True, output_attentions=True) for m in (ours, theirs))
    assert len(mine.hidden_states) == len(peers.hidden_states) == 4
    assert len(mine.attentions) == len(peers.attentions) == 3
    for found, wanted in zip(mine.hidden_states + mine.attentions, peers.hidden_states + peers.attentions, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(mine[0], ours(**inputs)[0], rtol=0, atol=1e-12)
    assert ours(**inputs).hidden_states is None and ours(**inputs).attentions is None


def test_other_ways_to_call():
    theirs = theirs_of(BertModel)
    ours = twin_of(theirs, BertModel)

    def agree(**inputs):
        mine, peers = ours(**inputs), theirs(**inputs)
        torch.testing.assert_close(mine.last_hidden_state, peers.last_hidden_state, rtol=0, atol=1e-12)
        return mine.last_hidden_state

    wanted = agree(input_ids=ids())
    embeds = ours.get_input_embeddings()(ids())
    torch.testing.assert_close(agree(inputs_embeds=embeds), wanted, rtol=0, atol=1e-12)
    backwards, types = torch.arange(17).flip(0)[None], draw(SEGMENTS, 3, 17)
    for options in ({}, {"position_ids": backwards}, {"token_type_ids": types}):
        agree(input_ids=ids(), **options)
        agree(inputs_embeds=embeds, **options)
    agree(input_ids=ids(), position_ids=draw(40, 3, 17), token_type_ids=types, attention_mask=mask().bool())
    agree(input_ids=ids()[:, :1])
    agree(input_ids=draw(VOCAB, 1, 40))
    last, pooled = ours(ids(), return_dict=False)
    assert torch.equal(last, wanted) and torch.equal(pooled, ours(ids()).pooler_output)
    output = ours_of()(ids(), labels=ids())
    assert list(output) == ["loss", "logits"] and output[1] is output["logits"] and "hidden_states" not in output


def test_without_a_pooler():
    theirs = theirs_of(BertModel)
    ours = BertModel(BertConfig(**SMALL), add_pooling_layer=False).double().eval()
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing.missing_keys and missing.unexpected_keys == ["pooler.dense.weight", "pooler.dense.bias"]
    output = ours(ids())
    assert output.keys() == ("last_hidden_state",)
    torch.testing.assert_close(output[0], theirs(ids())[0], rtol=0, atol=1e-12)


def test_padding_changes_nothing():
    """Real tokens get what they get alone; what stands in the padding, and what its outputs are used for, is theirs."""
    theirs = theirs_of(BertModel)
    ours = twin_of(theirs, BertModel)
    tokens = ids()
    last = ours(tokens, attention_mask=mask()).last_hidden_state
    alone = ours(tokens[2:, :11]).last_hidden_state
    torch.testing.assert_close(last[2:, :11], alone, rtol=0, atol=1e-12)
    other = torch.where(mask() == 0, (tokens + 1) % VOCAB, tokens)
    real = mask().bool()
    torch.testing.assert_close(ours(other, attention_mask=mask())[0][real], last[real], rtol=0, atol=1e-12)
    torch.testing.assert_close(last, theirs(tokens, attention_mask=mask())[0], rtol=0, atol=1e-12)


def test_a_text_of_nothing_but_padding_is_finite():
    ours, hidden = ours_of(), mask()
    hidden[1] = 0
    output, found = gradients(ours, input_ids=ids(), attention_mask=hidden, labels=ids())
    assert torch.isfinite(output.logits).all() and all(torch.isfinite(g).all() for g in found.values())


@unfused
def test_a_head_dim_beyond_the_kernels():
    theirs = theirs_of(hidden_size=300, num_attention_heads=1, num_hidden_layers=1)
    assert_equal(theirs, twin_of(theirs, BertForMaskedLM), {"input_ids": ids(), "attention_mask": mask()})


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "where"),
    [
        *((cls, where) for cls in CLASSES for where in ("hidden_dropout_prob", "attention_probs_dropout_prob")),
        (BertForSequenceClassification, "classifier_dropout"),
        (BertForTokenClassification, "classifier_dropout"),
    ],
)
def test_dropout(cls, where):
    ours = ours_of(cls, torch.float32, **{where: 0.5})
    inputs = {"input_ids": ids(), "attention_mask": mask()}
    calm = ours(**inputs)[0]
    ours.train()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(ours(**inputs)[0])
    assert torch.equal(results[0], results[1]), "the same seed gives the same mask"
    assert not torch.allclose(results[0], results[2]) and not torch.allclose(results[0], calm)
    results[2].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)
    assert torch.equal(ours.eval()(**inputs)[0], calm)


def test_dropout_stands_where_transformers_has_it():
    """All embeddings dropped, or all of both sublayers' outputs, or the classifier's input: what remains is exact."""
    for where, p in (("embeddings", 1.0), ("encoder", 1.0), ("classifier", 1.0)):
        theirs = theirs_of(BertForTokenClassification).train()
        ours = twin_of(theirs, BertForTokenClassification)
        for model in (theirs, ours):
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Dropout):
                    inside = "classifier" if name == "dropout" else name.split(".")[1]
                    module.p = p if inside == where else 0.0
        found, wanted = (model(ids(), attention_mask=mask()).logits for model in (ours, theirs))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_fully_dropped_attention_has_no_gradient_to_its_projections():
    ours = ours_of(attention_probs_dropout_prob=1.0).train()
    _, found = gradients(ours, input_ids=ids(), labels=ids())
    for name, gradient in found.items():
        if ".attention.self." in name:
            assert not gradient.any(), name


def test_the_row_of_padding_has_no_gradient():
    _, found = gradients(ours_of(tie_word_embeddings=False), input_ids=ids().clamp(max=1), labels=ids())
    rows = found["bert.embeddings.word_embeddings.weight"]
    assert not rows[0].any() and rows[1].any()


def test_query_key_and_value_are_one_matmul():
    """Before and after loading, steps, copies and conversions; three parameters all the same."""
    ours = ours_of(dtype=torch.float32)
    attention, x = ours.bert.encoder.layer[1].attention.self, torch.randn(2, 5, 48)
    optimizer = torch.optim.AdamW(ours.parameters())
    gradients(ours, input_ids=ids(), labels=ids())
    optimizer.step()
    wanted = torch.cat([layer(x) for layer in (attention.query, attention.key, attention.value)], -1)
    torch.testing.assert_close(attention.joined_output(x), wanted)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours.double().float()):
        assert twin.bert.encoder.layer[1].attention.self.joined_output(x) is not None
    attention.key.weight = torch.nn.Parameter(attention.key.weight.detach().clone())
    expected = ours(ids()).logits
    assert attention.joined_output(x) is None
    torch.testing.assert_close(copy.deepcopy(ours)(ids()).logits, expected)


def test_autocast():
    """Half-precision matmuls beside a float32 residual stream, as transformers does it."""
    exact = theirs_of()
    theirs = copy.deepcopy(exact).float()
    inputs = {"input_ids": ids(), "attention_mask": mask(), "labels": labels_of(BertForMaskedLM)}
    results = [gradients(exact, **inputs)]
    with torch.autocast("cpu", torch.bfloat16):
        results += [gradients(model, **inputs) for model in (theirs, twin_of(theirs, BertForMaskedLM))]
    for what in ("loss", *results[0][1]):
        wanted, peers, mine = (
            (output[what] if what == "loss" else grads[what]).detach().double() for output, grads in results
        )
        error, peer_error = ((x - wanted).norm().item() for x in (mine, peers))
        assert error <= 2 * peer_error + 1e-3 * wanted.norm().item(), f"{what}: error {error:.3g}, {peer_error:.3g}"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", [BertForMaskedLM, BertForSequenceClassification], ids=lambda cls: cls.__name__)
def test_compiles_to_one_graph(cls, training):
    ours = ours_of(cls, torch.float32, num_hidden_layers=1)
    inputs = {"input_ids": ids(), "attention_mask": mask(), "labels": labels_of(cls)}
    wanted, gradients_wanted = gradients(ours, **inputs)
    gradients_wanted = {k: g.clone() for k, g in gradients_wanted.items()}
    ours.train(training)  # without dropout the two differ only in what the compiler sees
    torch._dynamo.reset()
    output, found = gradients(torch.compile(ours, backend="aot_eager", fullgraph=True), **inputs)
    torch.testing.assert_close(output.logits, wanted.logits)
    assert len(found) == len(gradients_wanted)
    for name, gradient in gradients_wanted.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient)


def test_gradients_of_each_text():
    """torch.func.vmap over torch.func.grad, with a mask."""
    ours, labels = ours_of(), labels_of(BertForMaskedLM)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters, tokens, mask, labels):
        inputs = {"input_ids": tokens[None], "attention_mask": mask[None], "labels": labels[None]}
        return torch.func.functional_call(ours, parameters, (), inputs).loss

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(parameters, ids(), mask(), labels)
    for i in range(3):
        alone = {"input_ids": ids()[i : i + 1], "attention_mask": mask()[i : i + 1], "labels": labels[i : i + 1]}
        for name, gradient in gradients(ours, **alone)[1].items():
            torch.testing.assert_close(each[name][i], gradient, rtol=1e-9, atol=1e-12)


def test_exports_with_any_batch_size():
    ours = ours_of(BertForTokenClassification, torch.float32, num_hidden_layers=1)
    batch = {0: torch.export.Dim("batch", min=2, max=8)}
    shapes = {"input_ids": batch, "attention_mask": batch}
    program = torch.export.export(ours, (ids(),), {"attention_mask": mask()}, dynamic_shapes=shapes)
    inputs = {"attention_mask": mask()[:2]}
    output = program.module()(ids()[:2], **inputs)
    assert output.keys() == ("logits",)
    torch.testing.assert_close(output.logits, ours(ids()[:2], **inputs).logits)


# ---- what users do to models -----------------------------------------------------------------------------------------

LAYER = "bert.encoder.layer.1."
SUBMODULES = [
    *("bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings", "bert.embeddings.LayerNorm"),
    *("bert.embeddings.token_type_embeddings", "bert.embeddings.dropout", "bert.embeddings"),
    *(LAYER + f"attention.self.{name}" for name in ("query", "key", "value")),
    *(LAYER + f"attention.output{name}" for name in ("", ".dense", ".dropout", ".LayerNorm")),
    *(LAYER + name for name in ("intermediate", "intermediate.dense")),
    *(LAYER + f"output{name}" for name in ("", ".dense", ".dropout", ".LayerNorm")),
    *("bert.encoder.layer.1", "cls", "cls.predictions", "cls.predictions.transform", "cls.predictions.decoder"),
    *("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
]


@pytest.mark.parametrize("path", SUBMODULES)
def test_hooks_and_replacements_are_called(path):
    """As in transformers, of the same name."""
    theirs = theirs_of()
    ours = twin_of(theirs, BertForMaskedLM)
    expected, calls = ours(ids()).logits, []
    found = []
    for model in (theirs, ours):
        handle = model.get_submodule(path).register_forward_hook(lambda m, i, out: calls.append(1) or out * 1.5)
        found.append(model(ids()).logits)
        handle.remove()
    assert len(calls) == 2 and not torch.allclose(found[1], expected)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)

    class Scaled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            return 1.5 * self.inner(*args)

    parent, _, name = path.rpartition(".")
    inner = ours.get_submodule(path)
    setattr(ours.get_submodule(parent), name, Scaled(inner))
    torch.testing.assert_close(ours(ids()).logits, found[0], rtol=0, atol=1e-12)
    embeds = theirs.get_input_embeddings()(ids()) * (1.5 if path.endswith("word_embeddings") else 1)
    torch.testing.assert_close(ours(inputs_embeds=embeds).logits, found[0], rtol=0, atol=1e-12)
    setattr(ours.get_submodule(parent), name, inner)
    torch.testing.assert_close(ours(ids()).logits, expected, rtol=0, atol=0)


def test_modules_have_the_names_of_transformers():
    for cls in CLASSES:
        mine, peers = ({name for name, _ in model.named_modules()} for model in (ours_of(cls), theirs_of(cls)))
        assert mine <= peers
        # Activations are no modules here.
        assert all(name.endswith("act_fn") for name in peers - mine)


def test_an_embedding_with_options_of_its_own():
    theirs = theirs_of(BertModel)
    ours = twin_of(theirs, BertModel)
    for model in (theirs, ours):
        limited = torch.nn.Embedding(VOCAB, 48, max_norm=0.2, dtype=torch.float64)
        limited.load_state_dict(model.get_input_embeddings().state_dict())
        model.set_input_embeddings(limited)
    torch.testing.assert_close(ours(ids())[0], theirs(ids())[0], rtol=0, atol=1e-12)
    assert ours.get_input_embeddings()(ids()).norm(dim=-1).max() < 0.21


def test_get_and_set_embeddings():
    ours = ours_of()
    larger = nn.Embedding(VOCAB + 3, 48, dtype=torch.float64)
    ours.set_input_embeddings(larger)
    assert ours.get_input_embeddings() is larger is ours.bert.embeddings.word_embeddings
    decoder = nn.Linear(48, VOCAB + 3, dtype=torch.float64)
    ours.set_output_embeddings(decoder)
    assert ours.get_output_embeddings() is decoder and ours.cls.predictions.bias is decoder.bias
    assert ours(ids() + 3).logits.shape == (3, 17, VOCAB + 3)


def test_deepcopy_and_pickle_keep_the_ties():
    ours = ours_of()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        head = twin.cls.predictions
        assert head.decoder.weight is twin.bert.embeddings.word_embeddings.weight and head.decoder.bias is head.bias
        torch.testing.assert_close(twin(ids()).logits, ours(ids()).logits)


def test_frozen_encoder():
    ours = ours_of(BertForTokenClassification)
    ours.bert.requires_grad_(False)
    _, found = gradients(ours, input_ids=ids(), labels=labels_of(BertForTokenClassification))
    assert set(found) == {"classifier.weight", "classifier.bias"}
