"""Texts packed into one row: each has the outputs, the loss and the gradients it would have alone."""

import pytest
import torch

from fastformer.data import MaskedLM, PackedCausalLM
from fastformer.models import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY = 23
LENGTHS = (5, 1, 12, 7)  # a single token, which scores nothing, between others


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=12, n_embd=16, n_layer=2, n_head=2))


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


BERT = BertConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
)


def texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in LENGTHS]


def gradients(model):
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_packed_text_has_its_own_loss_and_gradient(build):
    torch.manual_seed(0)
    model = build().double().eval()  # float64: any leak from a neighbour would be far above rounding
    documents = texts()
    batch = PackedCausalLM()([[d.numpy() for d in documents]])
    assert batch["input_ids"].shape == (1, sum(LENGTHS)) and batch["max_length_q"] == 12
    packed = model(**batch)
    packed.loss.backward()
    together = gradients(model)

    total, logits, count = 0.0, [], sum(n - 1 for n in LENGTHS)
    for document in documents:
        alone = model(document[None], labels=document[None], use_cache=False)
        logits.append(alone.logits[0])
        if len(document) > 1:
            (alone.loss * (len(document) - 1) / count).backward()
            total += alone.loss.item() * (len(document) - 1) / count
    torch.testing.assert_close(packed.logits[0], torch.cat(logits), rtol=1e-10, atol=1e-10)
    assert packed.loss.item() == pytest.approx(total, rel=1e-10)
    for a, b in zip(together, gradients(model)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_without_gradients_too(build):
    torch.manual_seed(0)
    model = build().eval()
    documents = texts()
    with torch.no_grad():
        packed = model(**PackedCausalLM()(documents))
        alone = torch.cat([model(d[None]).logits[0] for d in documents])
    assert packed.past_key_values is None
    torch.testing.assert_close(packed.logits[0], alone, rtol=1e-4, atol=1e-5)


def test_an_encoder_keeps_packed_texts_apart():
    torch.manual_seed(0)
    model = BertForMaskedLM(BERT).double().eval()
    documents = texts()
    batch = PackedCausalLM()(documents)
    batch["labels"] = batch["input_ids"]
    packed = model(**batch)
    packed.loss.backward()
    together = gradients(model)
    alone = [model(d[None], labels=d[None]) for d in documents]
    sum(a.loss * len(d) for a, d in zip(alone, documents)).div(sum(LENGTHS)).backward()
    torch.testing.assert_close(packed.logits[0], torch.cat([a.logits[0] for a in alone]), rtol=1e-10, atol=1e-10)
    for a, b in zip(together, gradients(model)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    tokens = BertForTokenClassification(BERT).eval()
    batch.pop("labels")
    expected = torch.cat([tokens(d[None]).logits[0] for d in documents])
    torch.testing.assert_close(tokens(**batch).logits[0], expected, rtol=1e-4, atol=1e-5)


def test_transformers_reads_the_same_batch():
    """Its eager attention takes position_ids as the sign of packing; its loss is ours."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    mine = llama().eval()
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{k: v for k, v in mine.config.to_dict().items() if k != "dtype"})
    ).eval()
    theirs.load_state_dict(mine.state_dict())
    batch = PackedCausalLM()(texts())
    expected = theirs(**{k: batch[k] for k in ("input_ids", "labels", "position_ids")}, use_cache=False)
    got = mine(**batch)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_shifted_labels_are_labels_one_step_on():
    ids = torch.stack([texts()[2], texts()[2].flip(0)])
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    for model in (gpt2().eval(), llama().eval()):
        assert torch.equal(model(ids, labels=ids).loss, model(ids, shift_labels=shifted).loss)
        with pytest.raises(ValueError, match="logits_to_keep"):
            model(ids, shift_labels=shifted, logits_to_keep=1)


def test_bad_packing():
    model, bert = gpt2(), BertForMaskedLM(BERT)
    batch = PackedCausalLM()(texts())
    two = torch.zeros(2, 4, dtype=torch.int64)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    for name, call in (
        ("input_ids has 2 rows", lambda: model(two, cu_seq_lens_q=starts, cu_seq_lens_k=starts)),
        ("cu_seq_lens_k: expected the same", lambda: model(two[:1], cu_seq_lens_q=starts)),
        ("attention_mask: not available", lambda: model(**batch, attention_mask=torch.ones(1, 25))),
        ("use_cache: not available", lambda: model(**batch, use_cache=True)),
        ("output_attentions: not available", lambda: bert(**batch, output_attentions=True)),
        ("cu_seqlens_q: ends with 4", lambda: model(two[:1, :3], cu_seq_lens_q=starts, cu_seq_lens_k=starts)),
    ):
        with pytest.raises(ValueError, match=name):
            call()
    for module in (model, llama(), bert):
        with pytest.raises(TypeError, match="unexpected keyword argument 'cu_seqlens'"):
            module(two, cu_seqlens=starts)


def test_masked_rows_go_through_the_encoder():
    collator = MaskedLM(mask_token_id=1, vocab_size=VOCABULARY, probability=1.0)
    batch = collator(texts())
    assert torch.isfinite(BertForMaskedLM(BERT)(**batch).loss)
