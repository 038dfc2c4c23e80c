"""``fastformer evaluate`` on small checkpoints: the report and the records of each task, and clear errors."""

import json

import pytest
import torch

pytest.importorskip("tyro", reason="tyro is not installed (pip install 'fastformer[train]')")
pytest.importorskip("sklearn", reason="scikit-learn is not installed (pip install 'fastformer[eval]')")
pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (pip install 'fastformer[eval]')")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'fastformer[eval]')")

from fastformer import cli
from fastformer.data import CharTokenizer
from fastformer.evaluation import perplexity
from fastformer.models import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

TOKENIZER = CharTokenizer("_.abcdefghijklmnopqrstuvwxyz \n")
TEXT = "the quick brown fox jumps over the lazy dog and runs away\n"
FAST = ("--resamples", "50", "--device", "cpu")


def saved(model, directory):
    model.save_pretrained(directory)
    TOKENIZER.save(directory)
    return str(directory)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": TOKENIZER.vocab_size, "n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return saved(GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=0)), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = {0: "bad", 1: "good"}
    config = BertConfig(vocab_size=TOKENIZER.vocab_size, max_position_embeddings=64, id2label=names, **sizes)
    return saved(BertForSequenceClassification(config), tmp_path_factory.mktemp("bert"))


def jsonl(path, examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(path)


def records(directory):
    return [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]


def test_perplexity_of_a_text(gpt2, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT * 3)
    out = tmp_path / "out"
    arguments = ["--model", gpt2, "--data", str(tmp_path / "text.txt"), "--out", str(out), "--stride", "10", *FAST]
    assert cli.main(["evaluate", *arguments]) == 0
    wanted = perplexity(GPT2LMHeadModel.from_pretrained(gpt2), TEXT * 3, TOKENIZER, stride=10).compute()
    shown = capsys.readouterr().out
    assert f"bits per byte                  {wanted['bits per byte']:.4g} [" in shown
    (record,) = records(out)
    assert record["name"] == "text.txt" and record["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert f"| perplexity | {wanted['perplexity']:.4g} |" in (out / "report.md").read_text()


def test_classification_with_slices_and_baselines(bert, tmp_path, capsys):
    examples = [
        {"text": "a b c " * (i % 9 + 1), "label": ("bad", "good")[i % 2], "source": "xy"[i % 2]} for i in range(30)
    ]
    data = jsonl(tmp_path / "test.jsonl", examples)
    arguments = ["evaluate", "--model", bert, "--data", data, "--task", "classification", *FAST]
    assert cli.main([*arguments, "--out", str(tmp_path / "first")]) == 0
    baselines = ["--baselines", f"before={tmp_path / 'first' / 'records.jsonl'}", "majority:accuracy=0.5"]
    slices = ["--slices", "length", "label", "source"]
    assert cli.main([*arguments, "--out", str(tmp_path / "second"), *baselines, *slices]) == 0
    text = (tmp_path / "second" / "report.md").read_text()
    accuracy = sum(r["prediction"] == r["reference"] for r in records(tmp_path / "second")) / 30
    assert f"| before | accuracy | {accuracy:.4g} | {accuracy:.4g} | 0 [0, 0] | 1 | 1 |" in text
    assert "| majority | accuracy |" in text
    for heading in (
        "## By length",
        "## By label",
        "## By source",
        "| bad | 15 |",
        "| x | 15 |",
        "--slices length label",
    ):
        assert heading in text
    assert (tmp_path / "second" / "confusion.png").is_file()
    assert "30 examples" in capsys.readouterr().out


def test_answers(gpt2, tmp_path):
    pairs = [{"source": "the quick", "target": "brown fox"}, {"source": "the lazy", "target": "dog"}]
    data = jsonl(tmp_path / "pairs.jsonl", pairs)
    out = tmp_path / "out"
    arguments = ["evaluate", "--model", gpt2, "--data", data, "--task", "seq2seq", "--out", str(out), *FAST]
    assert cli.main([*arguments, "--metrics", "chrf", "cer", "exact", "--max-new-tokens", "5", "--prompt", "{} "]) == 0
    text = (out / "report.md").read_text()
    for score in ("| chrF |", "| CER |", "| exact match | 0 |", "- chrF: `nrefs:1"):
        assert score in text
    assert [set(r["scores"]) for r in records(out)] == [{"chrF", "CER", "exact match"}] * 2


def fails(arguments, capsys, status=1):
    try:
        found = cli.main(["evaluate", *arguments])
    except SystemExit as exit:
        found = exit.code
    assert found == status
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_errors_come_before_the_model_runs(gpt2, bert, tmp_path, capsys, monkeypatch):
    def runs(*_, **__):
        raise AssertionError("the model ran")

    monkeypatch.setattr(GPT2LMHeadModel, "forward", runs)
    monkeypatch.setattr(BertForSequenceClassification, "forward", runs)
    good = [{"text": "a", "label": "good"}] * 3
    one_class, empty, broken = (tmp_path / name for name in ("one.jsonl", "empty.jsonl", "broken.jsonl"))
    jsonl(one_class, good)
    empty.write_text("")
    broken.write_text('{"text": "a", "label": "bad"}\nno json\n')
    labels = ["--model", bert, "--task", "classification", *FAST, "--out", str(tmp_path / "out"), "--data"]
    for data, message in (
        (one_class, "every example of"),
        (empty, "is empty"),
        (broken, "line 2 is not JSON"),
        (tmp_path / "no.jsonl", "does not exist"),
    ):
        assert message in fails([*labels, str(data)], capsys), message
    wrong = ["--model", gpt2, "--task", "classification", *FAST, "--data", str(one_class)]
    assert "model: GPT2LMHeadModel has no classes" in fails(wrong, capsys)
    (tmp_path / "empty.txt").write_text("")
    assert "is empty" in fails(["--model", gpt2, "--data", str(tmp_path / "empty.txt")], capsys)
    for bad, message in (
        (["--metrics", "blue"], "metrics: got 'blue', expected one of bleu, chrf"),
        (["--baselines", "before"], "baselines: got 'before', expected NAME=FILE"),
        ([], "data: got '', expected a file or directory"),
    ):
        assert message in fails(["--model", gpt2, *bad, *(["--data", "x"] if bad else [])], capsys, 2), message
    assert not (tmp_path / "out").exists()
