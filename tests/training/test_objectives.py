"""Objectives: transformers' losses on the same weights, the targets they count, and no logits where they are large."""

import pytest
import torch
import transformers

from fastformer.models import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from fastformer.training import check_classes, objectives
from fastformer.training.objectives import OBJECTIVES, causal_lm, instruction, masked_lm, model_loss, seq2seq

B, S, V = 3, 7, 23
BERT = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=V, n_positions=16, n_embd=16, n_layer=2, n_head=2)),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=16,
        ),
    ),
    "bert": (BertForMaskedLM, BertConfig(**BERT, max_position_embeddings=16)),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(
            vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        ),
    ),
}  # fmt: skip


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    cls, config = MODELS[name]
    return cls(config).to(dtype).eval()


def batch(name, masked=True):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, V, (B, S), generator=generator)
    labels = torch.randint(2, V, (B, S), generator=generator)
    if masked:
        labels[0, 3:] = -100
        labels[2, :5] = -100
    kept = {"input_ids": ids, "labels": labels}
    if name in ("gpt2", "llama") and not masked:
        kept = {"input_ids": ids, "shift_labels": labels}
    return kept


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("masked", [True, False], ids=["some labels", "all labels"])
def test_the_loss_without_logits_is_the_loss(name, masked):
    """Values and every gradient, in float64; and nothing but the loss comes back."""
    results = []
    for skip in (False, True):
        model = build(name)
        output = model(**batch(name, masked), skip_logits=skip)
        assert (output.logits is None) == skip
        output.loss.backward()
        results.append((output.loss.detach(), [p.grad for p in model.parameters()]))
    (a, grads_a), (b, grads_b) = results
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    for x, y in zip(grads_a, grads_b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_loss_is_float32(name, dtype):
    loss = build(name, dtype)(**batch(name), skip_logits=True).loss
    exact = build(name)(**batch(name)).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


def test_a_replaced_head_is_called():
    """An adapter around the last layer has to see its input."""

    class Adapter(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) + 1.0 / (1 + torch.arange(V))

    model = build("gpt2")
    model.lm_head = Adapter(model.lm_head)
    losses = [model(**batch("gpt2"), skip_logits=skip).loss for skip in (False, True)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("large", [False, True])
def test_the_objective_skips_large_logits_only(monkeypatch, large):
    monkeypatch.setattr(objectives, "MOST_LOGITS", B * S * V - large)
    model = build("gpt2")
    forward, seen = model.forward, []

    def watched(*args, **kwargs):
        seen.append(kwargs)
        return forward(*args, **kwargs)

    model.forward = watched
    loss, count = causal_lm(model, batch("gpt2", masked=False) | {"_ids": [4, 5, 6]})
    assert seen[0]["skip_logits"] is large and seen[0]["use_cache"] is False and "_ids" not in seen[0]
    assert count == B * S
    torch.testing.assert_close(loss, build("gpt2")(**batch("gpt2", masked=False)).loss, rtol=1e-12, atol=0)


def test_transformers_models_are_trained_as_well():
    ours = build("gpt2")
    config = transformers.GPT2Config(vocab_size=V, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    theirs.load_state_dict(ours.state_dict())
    for given in (batch("gpt2"), batch("gpt2", masked=False)):
        torch.testing.assert_close(
            model_loss(theirs, given), model_loss(ours, given), check_dtype=False, rtol=1e-6, atol=0
        )
    wrapped = torch.nn.Module()
    wrapped.module = ours
    assert objectives.unwrap(wrapped) is ours


def test_counts():
    given = batch("gpt2")
    scored = int((given["labels"] != -100).sum())
    assert masked_lm.count(given) == seq2seq.count(given) == scored == 3 + 7 + 2
    # The first label of a row follows nothing, so no position is scored on it.
    assert causal_lm.count(given) == scored - 2
    assert causal_lm.count(batch("gpt2", masked=False)) == B * S
    classification = OBJECTIVES["sequence_classification"]
    assert classification.count({"labels": torch.tensor([1, -100, 0])}) == 2
    assert classification.count({"labels": torch.rand(4)}) == 4
    assert classification.count({"labels": torch.ones(4, 3)}) == 4
    spans = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    assert OBJECTIVES["question_answering"].count(spans) == 2


def test_instructions_are_scored_on_their_answers_alone():
    model, ids = build("gpt2"), batch("gpt2")["input_ids"]
    mask = torch.zeros_like(ids)
    mask[0, 4:], mask[1, 2:5], mask[2, 6:] = 1, 1, 1
    loss, count = instruction(model, {"input_ids": ids, "answer_mask": mask})
    logits = model(ids).logits.log_softmax(-1)
    chosen = [logits[b, s - 1, ids[b, s]] for b in range(B) for s in range(1, S) if mask[b, s]]
    assert count == len(chosen) == 3 + 3 + 1
    torch.testing.assert_close(loss, -torch.stack(chosen).mean(), rtol=1e-12, atol=0)
    # Labels that a collator has masked already say the same.
    torch.testing.assert_close(
        instruction(model, {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)})[0], loss, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    "cls, objective, labels",
    [
        (BertForSequenceClassification, "sequence_classification", torch.tensor([0, 2, 1])),
        (BertForTokenClassification, "token_classification", torch.randint(3, (B, S))),
    ],
)
def test_classifiers(cls, objective, labels):
    torch.manual_seed(0)
    ours = cls(BertConfig(**BERT, max_position_embeddings=16, num_labels=3)).double().eval()
    config = transformers.BertConfig(**BERT, max_position_embeddings=16, num_labels=3)
    theirs = getattr(transformers, cls.__name__)(config).double().eval()
    theirs.load_state_dict(ours.state_dict())
    given = {"input_ids": batch("bert")["input_ids"], "labels": labels}
    loss, count = OBJECTIVES[objective](ours, given)
    assert count == labels.numel()
    torch.testing.assert_close(loss, theirs(**given).loss, rtol=1e-6, atol=0, check_dtype=False)


def test_errors_name_what_is_missing():
    with pytest.raises(ValueError, match=r"batch: has input_ids; there is nothing that the model scores"):
        model_loss(build("gpt2"), {"input_ids": torch.zeros(1, 2, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"batch: has input_ids; the objective needs labels"):
        masked_lm.count({"input_ids": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match=r"needs start_positions and end_positions"):
        OBJECTIVES["question_answering"].count({"labels": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"every one is 3; a classifier needs two classes"):
        check_classes([3, 3, -100, 3])
    with pytest.raises(ValueError, match=r"labels: there are none"):
        check_classes([-100])
    with pytest.raises(ValueError, match=r"labels: 5 is not in \[0, 3\)"):
        check_classes([0, 1, 5], num_labels=3)
    check_classes([0, 1, 1], num_labels=2)
