"""Perplexity beside one forward pass, transformers' strided loop, and a uniform model in closed form."""

import math

import pytest
import torch

from fastformer.data import CharTokenizer
from fastformer.data.collators import PackedCausalLM
from fastformer.evaluation.bootstrap import confidence_intervals
from fastformer.evaluation.evaluate import evaluate
from fastformer.evaluation.perplexity import Perplexity, perplexity, score_batches, token_losses, windows
from fastformer.models import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

TEXT = "it was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness"
TOKENIZER = CharTokenizer.from_text(TEXT)


def gpt2(positions=160, vocab=TOKENIZER.vocab_size, **settings):
    sizes = {"vocab_size": vocab, "n_positions": positions, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **settings))


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=TOKENIZER.vocab_size, max_position_embeddings=160, **sizes))


def ids_of(text):
    return torch.tensor([TOKENIZER.encode(text)])


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_text_that_fits_is_one_forward_pass(build, dtype):
    model = build().to(dtype).eval()
    found = perplexity(model, TEXT, TOKENIZER).compute()
    with torch.no_grad():
        loss = float(model(ids_of(TEXT), labels=ids_of(TEXT)).loss)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert found["loss"] == pytest.approx(loss, rel=tolerance)
    nats = found["loss"] * (len(TEXT) - 1)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits per byte"] == pytest.approx(nats / math.log(2) / (len(TEXT.encode()) - 1))
    assert found["word perplexity"] == pytest.approx(math.exp(nats / len(TEXT.split())))


def strided_loop(model, ids, max_length, stride):
    """The loop of transformers' documentation, with the number of targets it means: those that are new."""
    total, count, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + max_length, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - before)] = -100
        scored = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(ids[:, begin:end], labels=labels).loss) * scored
        count, before = count + scored, end
        if end == ids.shape[1]:
            return total / count, count


# a window that is the text's end; a last window of one token; a stride of one; of the whole context but one
@pytest.mark.parametrize("context, stride", [(32, 16), (27, 20), (30, 13), (8, 1), (33, 32)])
def test_strided_as_in_transformers_documentation(context, stride):
    """There a window of max_length has max_length - 1 tokens whose successor it knows."""
    model = gpt2().double().eval()
    wanted, count = strided_loop(model, ids_of(TEXT), context + 1, stride)
    metric = perplexity(model, TEXT, TOKENIZER, context=context, stride=stride, batch_size=3)
    assert metric.rows()[0, 1] == count == len(TEXT) - 1
    assert metric.compute()["loss"] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("length", range(1, 40))
def test_windows_score_every_token_once(length):
    for context in (1, 2, 7, 16):
        for stride in {1, max(1, context // 2), context}:
            scored = []
            for begin, end, first in windows(length, context, stride):
                assert begin <= first < end <= begin + context
                assert begin == 0 or first - begin >= context - stride
                scored += range(first, end)
            assert scored == list(range(length))


def test_batches_of_texts_are_the_texts_alone():
    """Texts of very different lengths, in windows of a shared batch: the right padding changes nothing."""
    model = gpt2().double()
    texts = [TEXT, "it", TEXT[:50], TEXT[20:], "t", TEXT[:33]]
    together = perplexity(model, iter(texts), TOKENIZER, context=24, stride=10, batch_size=4)
    assert model.training  # as it was
    alone = [perplexity(model, [text], TOKENIZER, context=24, stride=10) for text in texts if len(text) > 1]
    rows = together.rows()
    assert rows[4].tolist() == [0.0, 0.0, 1.0, 0.0]  # one token: there is nothing to predict
    for row, one in zip(rows[rows[:, 1] > 0], alone):
        assert row == pytest.approx(one.rows()[0], rel=1e-12)
    intervals = confidence_intervals(together, resamples=200)
    assert intervals["perplexity"].low < intervals["perplexity"].score < intervals["perplexity"].high


def test_a_prefix_scores_the_first_token_too():
    model = gpt2().double()
    prefix = TOKENIZER.encode(" ")[0]
    metric = perplexity(model, "times", TOKENIZER, prefix_token_id=prefix)
    assert metric.rows()[0, 1:].tolist() == [5, 1, 5]
    assert metric.compute()["loss"] == pytest.approx(perplexity(model, " times", TOKENIZER).compute()["loss"])


def test_a_uniform_model():
    """Zero weights: every token has probability 1/V, so the perplexity is V and a character has log2 V bits."""
    model = gpt2()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = perplexity(model, [TEXT, TEXT[:30]], TOKENIZER, context=16).compute()
    assert found["perplexity"] == pytest.approx(TOKENIZER.vocab_size, rel=1e-6)
    assert found["bits per byte"] == pytest.approx(math.log2(TOKENIZER.vocab_size), rel=1e-6)


def test_models_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = gpt2().eval()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **{
                name: getattr(model.config, name)
                for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
            }
        )
    )
    theirs.load_state_dict(model.state_dict())
    ours = perplexity(model, TEXT, TOKENIZER, context=32).compute()
    assert perplexity(theirs, TEXT, TOKENIZER, context=32).compute() == pytest.approx(ours, rel=1e-5)


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes, decoder_start_token_id=0, pad_token_id=0))


def bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForMaskedLM(BertConfig(vocab_size=40, **sizes))


def gpt2_of_40():
    return gpt2(vocab=40)


@pytest.mark.parametrize(
    "build, extra",
    [
        (gpt2_of_40, "shift_labels"),
        *((build, extra) for build in (gpt2_of_40, bert, t5) for extra in ("", "attention_mask")),
    ],
)
def test_batches_with_labels(build, extra):
    """The mean over all batches is the loss of the one large batch, where some labels are not scored."""
    model = build().double().eval()
    ids, labels = torch.randint(40, (6, 12)), torch.randint(40, (6, 12))
    labels[torch.rand(6, 12) < 0.3] = -100
    labels[2] = -100
    batch = {"input_ids": ids, ("shift_labels" if extra == "shift_labels" else "labels"): labels}
    if extra == "attention_mask":
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][1, 8:] = 0
    with torch.no_grad():
        wanted = float(model(**batch).loss)
    small = [{name: part[i : i + 2] for name, part in batch.items()} for i in (0, 2, 4)]
    found = evaluate(model, small, Perplexity(), predict=score_batches)
    assert found.scores()["loss"] == pytest.approx(wanted, rel=1e-12)
    assert found.metrics[0].rows()[2, 1] == 0 and len(found) == 6


def test_packed_documents_are_scored_as_alone():
    """Documents end to end in one row, which do not see each other."""
    model = gpt2().double()
    texts = [TOKENIZER.encode(text) for text in (TEXT[:20], TEXT[30:75], TEXT[5:12])]
    packed = evaluate(model, [PackedCausalLM()(texts)], Perplexity(), predict=score_batches)
    alone = perplexity(model, [torch.tensor(ids) for ids in texts])
    assert packed.scores()["loss"] == pytest.approx(alone.compute()["loss"], rel=1e-12)


def test_no_table_of_logits_is_made(monkeypatch):
    """The head's weight goes to linear_cross_entropy; the head itself, which would make (B, S, V), is never called."""
    model = gpt2().eval()
    with torch.no_grad():
        wanted = float(model(ids_of(TEXT), labels=ids_of(TEXT)).loss)

    def called(*_):
        raise AssertionError("the head was called")

    monkeypatch.setattr(type(model.lm_head), "forward", called)
    losses = token_losses(model, ids_of(TEXT)[:, :-1], ids_of(TEXT)[:, 1:])
    assert losses.shape == (1, len(TEXT) - 1) and losses.dtype == torch.float32
    assert losses.mean().item() == pytest.approx(wanted, rel=1e-6)


def test_an_adapter_on_the_head_is_called():
    """A head that is no plain linear layer is not read around."""

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    model = gpt2().eval()
    plain = perplexity(model, TEXT, TOKENIZER).compute()["loss"]
    head = Scaled(16, TOKENIZER.vocab_size, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with torch.no_grad():
        wanted = float(model(ids_of(TEXT), labels=ids_of(TEXT)).loss)
    assert perplexity(model, TEXT, TOKENIZER).compute()["loss"] == pytest.approx(wanted, rel=1e-6) != plain


def test_bad_input():
    model = gpt2()
    for options, message in (
        ({"context": 200}, "context: got 200, expected 1 to the model's 160 positions"),
        ({"context": 8, "stride": 9}, "stride: got 9, expected 1 to the context of 8 tokens"),
        ({"batch_size": 0}, "batch_size: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            perplexity(model, TEXT, TOKENIZER, **options)
    with pytest.raises(ValueError, match="perplexity: no examples"):
        perplexity(model, [], TOKENIZER)
    with pytest.raises(ValueError, match="none of the 2 texts has two tokens"):
        perplexity(model, ["", "t"], TOKENIZER)
    with pytest.raises(ValueError, match=r"tokenizer: has 300 tokens, but the model's table has \d+"):
        perplexity(model, TEXT, CharTokenizer([chr(i) for i in range(300)]))
    with pytest.raises(ValueError, match="it is another model's tokenizer"):
        perplexity(gpt2(vocab=5000), TEXT, TOKENIZER)
    with pytest.raises(ValueError, match="tokenizer: is needed"):
        perplexity(model, TEXT)
    with pytest.raises(ValueError, match=r"texts: token 4000 is not in \[0, "):
        perplexity(model, torch.tensor([1, 4000]))
    with pytest.raises(TypeError, match="texts: expected text or"):
        perplexity(model, [3.0], TOKENIZER)
    for other in (bert(), t5()):
        with pytest.raises(ValueError, match=f"model: {type(other).__name__} does not predict the next token"):
            perplexity(other, TEXT, TOKENIZER)
    with pytest.raises(ValueError, match="batch: has input_ids; it needs labels or shift_labels"):
        next(score_batches(model, [{"input_ids": ids_of(TEXT)}]))
    assert Perplexity().lower_is_better
