"""The loop, its records, slices, worst examples and report, on small models and on answers made up."""

import json
import math
from functools import partial

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is not installed (pip install 'fastformer[eval]')")
pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (pip install 'fastformer[eval]')")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'fastformer[eval]')")

from fastformer.data import CharTokenizer
from fastformer.evaluation import (
    BLEU,
    ChrF,
    Classification,
    Mean,
    Perplexity,
    Record,
    by_label,
    by_length,
    classify_texts,
    evaluate,
    generate_texts,
    perplexity,
    read_records,
    score_examples,
    write_report,
)
from fastformer.models import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

TOKENIZER = CharTokenizer("_.abcdefghijklmnopqrstuvwxyz ")
NAMES = ("negative", "positive")
TEXTS = ["a good one", "bad", "not at all bad i think", "a very long and bad film", "nice", "so so"]
EXAMPLES = [{"text": text, "label": NAMES[i % 2], "id": i} for i, text in enumerate(TEXTS)]


def bert(cls=BertForSequenceClassification, labels=2, positions=32):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=29, max_position_embeddings=positions, num_labels=labels, **sizes)
    return cls(config).double().eval()


def answers(*pairs):
    """A ``predict`` that gives these predictions and references, without a model."""
    return lambda model, data: (Record(p, r, {"text": f"text {i}"}) for i, (p, r) in enumerate(pairs))


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_classification_of_texts(tmp_path):
    """Each text is classified as it is alone, whatever the batch; the file has a line per example."""
    model = bert()
    path = tmp_path / "out" / "records.jsonl"
    predict = partial(classify_texts, tokenizer=TOKENIZER, names=NAMES, batch_size=4)
    found = evaluate(model, iter(EXAMPLES), Classification(NAMES), predict=predict, records=path)
    lines = lines_of(path)
    assert len(found) == len(lines) == 6
    for example, line in zip(EXAMPLES, lines):
        with torch.no_grad():
            out = model(torch.tensor([TOKENIZER.encode(example["text"])]), labels=torch.tensor([line["reference"]]))
        probabilities = out.logits[0].softmax(-1)
        assert line["prediction"] == int(probabilities.argmax()) and NAMES[line["reference"]] == example["label"]
        assert line["confidence"] == pytest.approx(float(probabilities.max()), abs=1e-4)
        assert line["loss"] == pytest.approx(float(out.loss), rel=1e-5)
        assert (line["text"], line["id"]) == (example["text"], example["id"])
    right = [line["prediction"] == line["reference"] for line in lines]
    assert found.scores()["accuracy"] == pytest.approx(sum(right) / 6)
    assert [line["scores"]["classification"] for line in lines] == right
    # the wrong ones first, by their loss
    order = sorted(lines, key=lambda line: (line["scores"]["classification"], -line["loss"]))
    assert [line["index"] for line in found.worst] == [line["index"] for line in order]


def test_long_texts_are_cut_and_labels_may_be_numbers():
    model = bert(positions=8)
    predict = partial(classify_texts, tokenizer=TOKENIZER, names=NAMES)
    examples = [{"text": "ab" * 20, "label": 0}, {"text": "ab", "label": 1}]
    records = list(predict(model, examples))
    with torch.no_grad():
        logits = model(torch.tensor([TOKENIZER.encode("abababab")])).logits
    assert records[0].prediction == int(logits.argmax()) and [r.reference for r in records] == [0, 1]


def test_batches_and_tokens():
    """Batches of tensors; one label per token, padding not scored."""
    model = bert(BertForTokenClassification, labels=3)
    ids, labels = torch.randint(29, (4, 10)), torch.randint(3, (4, 10))
    labels[1, 6:] = -100
    labels[2] = -100
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batches = [
        {"input_ids": i, "attention_mask": m, "labels": w}
        for i, m, w in zip(ids.split(2), mask.split(2), labels.split(2))
    ]
    found = evaluate(model, batches, Classification("abc"))
    with torch.no_grad():
        chosen = model(ids, attention_mask=mask).logits.argmax(-1)
    scored = labels != -100
    assert found.scores()["accuracy"] == pytest.approx(float((chosen == labels)[scored].double().mean()))
    assert len(found) == 4 and len(found.worst) == 3  # the text without labels has no score


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=29, **sizes, **ends)).eval()


def gpt2(positions=64):
    config = GPT2Config(
        vocab_size=29, n_positions=positions, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("build", [t5, gpt2])
def test_generated_text_is_that_of_generate_alone(build):
    """Batches of sources of other lengths, padded on the side the model wants."""
    model = build()
    with torch.no_grad():  # as they are made, the two repeat one token
        for parameter in model.parameters():
            parameter.normal_(std=0.6)
    examples = [{"source": text, "target": text, "id": i} for i, text in enumerate(TEXTS)]
    records = list(generate_texts(model, examples, TOKENIZER, max_new_tokens=7, batch_size=4, prompt="x {} "))
    written = set()
    for example, record in zip(examples, records):
        ids = torch.tensor([TOKENIZER.encode(f"x {example['source']} ")])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False)[0].tolist()
        new = out[1:] if build is t5 else out[ids.shape[1] :]
        new = new[: new.index(1)] if 1 in new else new
        assert record.prediction == TOKENIZER.decode(i for i in new if i != 0 or build is gpt2).strip()
        assert record.reference == example["target"]
        written.add(record.prediction)
        assert record.shown == {"source": example["source"], "id": example["id"]}
    assert len(written) > 2


def test_two_metrics_of_one_text():
    found = evaluate(None, (), [BLEU(), ChrF()], predict=answers(("a b c d e", "a b c d e"), ("a b", "a c")))
    assert set(found.scores()) == {"BLEU", "chrF"} and set(found.intervals(resamples=50)) == {"BLEU", "chrF"}
    assert [line["index"] for line in found.worst] == [1, 0]


def test_perplexity_through_the_loop(tmp_path):
    """Documents of a file: the same corpus score, and which of them is the least likely."""
    model = gpt2().double()
    predict = partial(score_examples, tokenizer=TOKENIZER, context=8, batch_size=2)
    found = evaluate(model, EXAMPLES, Perplexity(), predict=predict, records=tmp_path / "r.jsonl")
    wanted = perplexity(model, TEXTS, TOKENIZER, context=8)
    assert found.scores() == pytest.approx(wanted.compute())
    losses = {line["text"]: line["loss"] for line in lines_of(tmp_path / "r.jsonl")}
    assert found.worst[0]["text"] == max(losses, key=losses.get)
    assert read_records(tmp_path / "r.jsonl", Perplexity()).scores() == pytest.approx(wanted.compute())


def test_slices():
    slices = {"length": by_length(edges=(1, 2, 4)), "label": by_label(NAMES)}
    pairs = [Record(i % 2, i // 2 % 2, {"text": "w " * i}) for i in range(8)]
    found = evaluate(None, (), Classification(NAMES), predict=lambda *_: pairs, slices=slices)
    lengths = found.by_slice("length", resamples=50)
    assert {name: count for name, (count, _) in lengths.items()} == {
        "up to 1": 2,
        "2 to 2": 1,
        "3 to 4": 2,
        "over 4": 3,
    }
    labels = found.by_slice("label", resamples=50)
    assert labels["negative"][1]["accuracy"].score == pytest.approx(0.5)
    with pytest.raises(ValueError, match="slices: id has more than 200 different values"):
        records = (Record(0.0, 0.0, {"id": i}) for i in range(300))
        evaluate(
            None, (), Mean("m", lambda p, r: p), predict=lambda *_: records, slices={"id": lambda r: r.shown["id"]}
        )
    with pytest.raises(ValueError, match=r"edges: got \(3, 1\), expected rising numbers"):
        by_length(edges=(3, 1))


def test_only_the_worst_stay_in_memory():
    pairs = [(float(i * 7 % 50), None) for i in range(50)]
    found = evaluate(None, (), Mean("m", lambda p, r: p), predict=answers(*pairs), worst=3)
    assert [line["prediction"] for line in found.worst] == [0, 1, 2]
    level = evaluate(None, (), Mean("m", lambda p, r: 1), predict=answers(*pairs), worst=2)
    assert [line["index"] for line in level.worst] == [0, 1]  # of equals the first
    error = Mean("m", lambda p, r: p, lower_is_better=True)
    assert [r["prediction"] for r in evaluate(None, (), error, predict=answers(*pairs), worst=2).worst] == [49, 48]


def test_report(tmp_path):
    """All sections, with the numbers of the evaluation in them."""
    truth = [i % 2 for i in range(60)]
    ours = answers(*[(t if i % 6 else 1 - t, t) for i, t in enumerate(truth)])
    before = answers(*[(t if i % 3 else 1 - t, t) for i, t in enumerate(truth)])
    found, old = (
        evaluate(
            None,
            (),
            Classification(NAMES),
            predict=predict,
            records=tmp_path / f"{name}.jsonl",
            slices={"third": lambda record: record.shown["text"][-1] in "048"},
        )
        for name, predict in (("ours", ours), ("old", before))
    )
    baselines = {"before": read_records(tmp_path / "old.jsonl", Classification(NAMES)), "majority": {"accuracy": 0.5}}
    path = write_report(
        found, tmp_path / "report", title="Sentiment", baselines=baselines, resamples=200, command="make it"
    )
    text = path.read_text(encoding="utf-8")
    accuracy = found.intervals(resamples=200)["accuracy"]
    assert f"| accuracy | 0.8333 | [{accuracy.low:.4g}, {accuracy.high:.4g}] |" in text
    assert "| before | accuracy | 0.8333 | 0.6667 | 0.1667 [" in text
    assert "| majority | accuracy | 0.8333 | 0.5 |" in text and "| – |" in text
    assert "## By third" in text and "| negative | 30 |" in text and "60 examples" in text and "make it" in text
    assert "## The 10 worst examples by classification" in text and "| 0 | positive | negative |" in text
    assert (tmp_path / "report" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    (comparison,) = found.compare(old, "old", resamples=500)
    assert comparison.randomisation < 0.01 and comparison.difference.low > 0
    assert "precision positive" not in text.split("## Classes")[0]


def test_a_baseline_on_other_examples_is_refused(tmp_path):
    """The same number of examples, in another order: every pair would be wrong."""
    pairs = [("a b", "a b"), ("c", "d")]
    ours, same, turned = (evaluate(None, (), BLEU(), predict=answers(*p)) for p in (pairs, pairs, pairs[::-1]))
    assert ours.compare(same, "same", resamples=20)[0].difference.score == 0
    with pytest.raises(ValueError, match="baseline other: its references are not the same ones in the same order"):
        ours.compare(turned, "other")


def test_a_report_of_text_has_signatures(tmp_path):
    found = evaluate(None, (), [BLEU(), ChrF()], predict=answers(("a | b", "a b"), ("c", "c")), worst=1)
    text = write_report(found, tmp_path, title="t", resamples=20).read_text(encoding="utf-8")
    assert "- BLEU: `nrefs:1|case:mixed|eff:no|tok:13a" in text and "a \\| b" in text


def test_records_are_whole_or_not_there(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("before\n")

    def breaks(model, data):
        yield Record("a", "a")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(None, (), BLEU(), predict=breaks, records=path)
    assert path.read_text() == "before\n" and [p.name for p in tmp_path.iterdir()] == ["records.jsonl"]


def test_bad_input(tmp_path):
    model = bert()
    texts = partial(classify_texts, tokenizer=TOKENIZER, names=NAMES)
    with pytest.raises(ValueError, match="classification: no examples"):
        evaluate(model, [], Classification(NAMES), predict=texts)
    with pytest.raises(ValueError, match="metrics: expected at least one"):
        evaluate(model, [], [])
    used = BLEU()
    used.add("a", "a")
    with pytest.raises(ValueError, match="metrics: BLEU has examples already"):
        evaluate(model, [], used)
    with pytest.raises(ValueError, match=r"names: 3 \(a, b, c\), but the model has 2 classes"):
        classify_texts(model, [], TOKENIZER, "abc")
    with pytest.raises(ValueError, match="it is another model's tokenizer"):
        classify_texts(model, [], CharTokenizer([chr(i) for i in range(40)]), NAMES)
    with pytest.raises(ValueError, match="example 1: label 'great' is not one of negative, positive"):
        list(texts(model, [EXAMPLES[0], {"text": "a", "label": "great"}]))
    with pytest.raises(ValueError, match="example 0: has no 'text', only 'txt'"):
        list(texts(model, [{"txt": "a"}]))
    with pytest.raises(ValueError, match="all of class 'negative'"):
        evaluate(model, EXAMPLES[::2], Classification(NAMES), predict=texts)
    with pytest.raises(ValueError, match="batch: has input_ids; it needs labels"):
        evaluate(model, [{"input_ids": torch.zeros(1, 2, dtype=torch.long)}], Classification(NAMES))
    with pytest.raises(ValueError, match=r"labels: shape \(1, 2\) is not \(1,\) of class numbers"):
        ids = torch.zeros(1, 2, dtype=torch.long)
        evaluate(model, [{"input_ids": ids, "labels": ids}], Classification(NAMES))
    with pytest.raises(ValueError, match="prompt: 'translate' has no "):
        generate_texts(t5(), [], TOKENIZER, prompt="translate")
    with pytest.raises(ValueError, match="example 0: source has no tokens"):
        list(generate_texts(t5(), [{"source": "", "target": ""}], TOKENIZER))
    (tmp_path / "r.jsonl").write_text('{"prediction": 1, "reference": 0}\n{"prediction": 1}\n')
    with pytest.raises(ValueError, match="line 2 is not a record"):
        read_records(tmp_path / "r.jsonl", Classification(NAMES))
    found = evaluate(None, (), BLEU(), predict=answers(("a", "a")))
    with pytest.raises(ValueError, match="baseline b: 'F1' is not among the scores BLEU"):
        found.compare({"F1": 1.0}, "b")
    assert math.isnan(Perplexity().add((0.0, 0)))
