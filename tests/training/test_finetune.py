"""Fine-tuning end to end on small models: every task learns, resumes to the bit, and names what does not fit."""

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fastformer
from fastformer import cli
from fastformer.data import CharTokenizer, load_tokenizer
from fastformer.data.tasks import Columns, Encoder
from fastformer.evaluation.predictions import classify_texts
from fastformer.task_metrics import likeliest_spans, task_metrics
from fastformer.training import LoraConfig, Parallel, ParallelConfig, find_checkpoint
from fastformer.training.finetune import ExamplesConfig, finetune, prepare
from fastformer.training.logs import read_metrics
from tests.training.jobs import results_of
from tests.training.tuning import WORDS, config_for, reviews, save_base

SPANS = [
    {"question": "who sat", "context": f"the {who} {'fine ' * (i % 5)}film where the mat", "answer": who}
    for i, who in enumerate(["cat", "bad", "good", "awful"] * 12)
]
TAGGED = [
    {"tokens": row["text"].split(), "tags": ["X" if w in ("good", "bad") else "O" for w in row["text"].split()]}
    for row in reviews()
]
PAIRS = [{"source": f"{a} {b}", "target": f"{b}"} for a in WORDS[:6] for b in WORDS[6:12]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {kind: save_base(kind, root / kind) for kind in ("bert", "gpt2", "llama", "t5")}


def losses(out):
    return [record["loss"] for record in read_metrics(out) if "loss" in record]


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_classification_learns_and_can_be_evaluated(bases, tmp_path):
    config = config_for("classification", bases["bert"], tmp_path / "run", epochs=5, run={"keep_best": True})
    result = finetune(config, train=reviews(), metrics=task_metrics, quiet=True)
    assert result.steps == 5 * 58 / 8 // 1 + 1 == 37  # of 64, 6 are held out
    assert result.metrics["accuracy"] == 1.0 and result.metrics["macro_f1"] == 1.0 and result.validation_loss < 0.1
    model = fastformer.from_pretrained(tmp_path / "run" / "best")
    assert model.config.id2label == {0: "neg", 1: "pos"}
    ids = load_tokenizer(tmp_path / "run" / "best").encode("the film good", add_special_tokens=True)
    assert model(torch.tensor([ids])).logits.argmax().item() == 1
    data = tmp_path / "held-out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in reviews(20, seed=9)))
    command = ["evaluate", "--task", "classification", "--model", str(tmp_path / "run"), "--data", str(data)]
    assert cli.main([*command, "--out", str(tmp_path / "report"), "--resamples", "20"]) == 0
    # Another fine-tuning keeps the order of classes the model has learnt.
    again = prepare(config_for("classification", tmp_path / "run", tmp_path / "more"), train=reviews(8), quiet=True)
    assert torch.equal(again.model.classifier.weight.detach(), _newest(tmp_path / "run").classifier.weight.detach())


def _newest(run):
    return fastformer.from_pretrained(run / "checkpoint")


def test_token_classification(bases, tmp_path):
    config = config_for("token_classification", bases["bert"], tmp_path / "run", rate=1e-2, steps=40)
    result = finetune(config, train=TAGGED, metrics=task_metrics, quiet=True)
    assert result.metrics["accuracy"] == 1.0
    assert _newest(tmp_path / "run").config.label2id == {"O": 0, "X": 1}


@pytest.mark.parametrize(("kind", "rank"), [("gpt2", 0), ("llama", 4)])
def test_decoders_classify(bases, tmp_path, capsys, kind, rank):
    """Their tokenizers have no padding token: the end of text is it, and the model's configuration says so."""
    lora = LoraConfig(rank=rank, targets=("all",) if rank else ())
    config = config_for(
        "classification", bases[kind], tmp_path / "run", rate=2e-2 if rank else 1e-2, steps=60, lora=lora
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = finetune(config, train=reviews(), metrics=task_metrics)
    assert result.metrics["accuracy"] == 1.0
    tokenizer = load_tokenizer(bases[kind])
    assert tokenizer.pad_token_id is None
    assert f"; 2 classes, padded with token {tokenizer.eos_token_id}\n" in capsys.readouterr().out
    model = fastformer.from_pretrained(tmp_path / "run" / ("merged" if rank else "checkpoint"))
    assert model.config.pad_token_id == tokenizer.eos_token_id and model.config.id2label == {0: "neg", 1: "pos"}
    records = list(classify_texts(model, reviews(20, seed=9), tokenizer, ["neg", "pos"]))  # of several lengths
    assert [r.prediction for r in records] == [r.reference for r in records] == [0, 1] * 10


def test_a_decoder_tags_a_word_where_it_ends(bases, tmp_path):
    tokenizer = load_tokenizer(bases["gpt2"])
    encoder = Encoder("token_classification", tokenizer, 16, labels=("A", "B"), causal=True)
    sample = encoder([{"tokens": ["cat", "fineat", "mat"], "tags": ["A", "B", 0]}])[0]
    assert sample["input_ids"] == tokenizer.encode("cat fineat mat")
    pieces = len(tokenizer.encode(" fineat"))
    first = len(tokenizer.encode("cat"))
    assert pieces > 1 and sample["labels"] == [*[-100] * (first - 1), 0, *[-100] * (pieces - 1), 1, 0]
    pair = Encoder("classification", tokenizer, 9, labels=("A", "B"), columns=Columns(text_pair="other"), causal=True)
    sample = pair([{"text": "the cat", "other": "a mat", "label": "B"}])[0]
    assert sample == {"input_ids": tokenizer.encode("the cat\na mat"), "labels": 1}
    config = config_for("token_classification", bases["llama"], tmp_path / "run", rate=1e-2, steps=40, dropout=0.0)
    assert finetune(config, train=TAGGED, metrics=task_metrics, quiet=True).metrics["accuracy"] == 1.0
    assert _newest(tmp_path / "run").dropout.p == 0.0


def test_a_decoder_without_any_end_of_text(bases, tmp_path):
    base = save_base("gpt2", tmp_path / "characters")
    CharTokenizer.from_text("".join(map(chr, range(32, 332)))).save(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    with pytest.raises(ValueError, match=r"tokenizer: has no padding token and no end of text"):
        finetune(config_for("classification", base, tmp_path / "run"), train=reviews(), quiet=True)


def test_question_answering(bases, tmp_path):
    config = config_for("question_answering", bases["bert"], tmp_path / "run", steps=45)
    before = prepare(config, train=SPANS, metrics=task_metrics, quiet=True)._measure()
    result = finetune(config, train=SPANS, metrics=task_metrics, quiet=True)
    assert result.metrics["exact"] > 0.8 > before["exact"] and result.metrics["f1"] >= result.metrics["exact"]


class Rank(Parallel):
    """One of two that run after each other; the second has the values of both."""

    world_size = 2

    def __init__(self, rank, values):
        self.rank, self.values = rank, values

    def gather(self, value):
        self.values.append(value)
        return self.values


class Guess(torch.nn.Linear):
    """Spans from anywhere to anywhere after it."""

    def forward(self, input_ids, **_):
        scores = (input_ids * 7919 % 13 + 3 * torch.arange(input_ids.shape[1])).float()
        return SimpleNamespace(start_logits=-scores, end_logits=scores % 17)


def test_spans_measured_by_two_ranks_are_measured_as_by_one(bases, tmp_path):
    prepared = []
    config = config_for("question_answering", bases["bert"], tmp_path / "run")
    prepare(config, train=SPANS, metrics=lambda data, _: prepared.append(data), quiet=True)
    data = replace(prepared[0], validation=prepared[0].train[:9])
    values, model = [], Guess(1, 1)
    *_, of_both = (task_metrics(replace(data, parallel=Rank(rank, values)), 4)(model) for rank in (0, 1))
    assert [len(exact) for exact, _ in values] == [5, 4]  # and one that is dropped
    assert of_both == pytest.approx(task_metrics(data, 4)(model), rel=1e-6) and 0 < of_both["f1"] < 1


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    pytest.importorskip("peft", reason="needs fastformer[finetune]")
    return results_of("tuning", tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["adapters", "frozen", "split", "resumed"])
def test_two_processes_tune_as_one(tuned, job):
    """Adapters with ddp, frozen embeddings with fsdp, T5 with tp; and a job of two that one process continued."""
    (whole,) = tuned["adapters, one" if job == "resumed" else f"{job}, one"]
    for rank in tuned[job]:
        assert len(rank["losses"]) == 12 and rank["losses"] == pytest.approx(whole["losses"], abs=1e-5)
        assert len(rank["metrics"]) == len(whole["metrics"]) >= 2
        for ours, theirs in zip(rank["metrics"], whole["metrics"]):
            assert ours == pytest.approx(theirs, abs=1e-5)
        names = whole["weights"].keys()
        assert rank["weights"].keys() == names
        known = [name for name in names if not name.endswith("key.bias")]  # whose gradient is 0, but for rounding
        assert all(torch.allclose(rank["weights"][n], whole["weights"][n], atol=1e-5, rtol=0) for n in known)
    assert whole["losses"][-1] < whole["losses"][0]


@pytest.mark.slow
def test_an_error_in_a_tuning_job_is_its_reason(tuned):
    assert "the lights went out" in tuned["stopped"][0]


def test_adapters_are_not_sharded(bases, tmp_path):
    with pytest.raises(ValueError, match=r"parallel\.strategy: got 'fsdp' beside lora\.rank"):
        lora = LoraConfig(rank=2)
        config_for("classification", bases["bert"], tmp_path, lora=lora, parallel=ParallelConfig("fsdp"))


def test_seq2seq_and_instructions(bases, tmp_path):
    result = finetune(config_for("seq2seq", bases["t5"], tmp_path / "t5"), train=PAIRS, quiet=True)
    assert losses(tmp_path / "t5")[0] > 5 > 4.2 > result.validation_loss
    result = finetune(config_for("instruction", bases["gpt2"], tmp_path / "gpt2"), train=PAIRS, quiet=True)
    assert losses(tmp_path / "gpt2")[0] > 5 > 4.2 > result.validation_loss


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_only_answers_are_scored(bases):
    tokenizer = load_tokenizer(bases["gpt2"])
    turns = ["the cat", "sat", "on a mat", "good"]
    roles = ("user", "assistant") * 2
    chat = [{"role": role, "content": turn} for role, turn in zip(roles, turns)]

    def read(sample):
        scored = [i for i in sample["labels"] if i != -100]
        return tokenizer.decode(sample["input_ids"], False), tokenizer.decode(scored, False)

    encoder = Encoder("instruction", tokenizer, 64)
    text, answers = read(encoder([{"messages": chat}])[0])
    end = "<|endoftext|>\n"
    assert text == f"User: the cat\nAssistant: sat{end}User: on a mat\nAssistant: good{end}"
    assert answers == f"sat{end}good{end}"
    # The tokenizer's own template, which is kept with it.
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    end = end.strip()
    text, answers = read(encoder([{"messages": chat[:2]}])[0])
    assert text == f"<user>the cat{end}<assistant>sat{end}" and answers == f"sat{end}"
    tokenizer.save(bases["gpt2"])
    assert load_tokenizer(bases["gpt2"]).chat_template == tokenizer.chat_template
    tokenizer.chat_template = None
    tokenizer.save(bases["gpt2"])
    # A prompt and an answer.
    encoder = Encoder("instruction", tokenizer, 64, prompt="Q: {} A: ")
    assert read(encoder([{"source": "the cat", "target": "sat"}])[0]) == (f"Q: the cat A: sat{end}", f"sat{end}")
    with pytest.raises(ValueError, match=r"data example 0: messages: none is of the role 'assistant'"):
        encoder([{"messages": chat[:1]}])
    with pytest.raises(ValueError, match=r"data example 0: messages: expected .* got 'who'"):
        encoder([{"messages": ["who"]}])
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(ValueError, match="it changes what it wrote"):
        encoder([{"messages": chat}])
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="roles must alternate"):
        encoder([{"messages": chat}])


def test_chat_templates_read_as_transformers_reads_them(bases):
    from transformers import AutoTokenizer

    from fastformer.data.chat import render

    ours, theirs = load_tokenizer(bases["gpt2"]), AutoTokenizer.from_pretrained(bases["gpt2"])
    template = """\
{%- if messages[0].role == 'system' %}
    {{- '<s>' + messages[0].content | trim + '\\n' }}
{%- endif %}
{% for message in messages %}
    {% if loop.index0 > 0 %}
{{ message.role }}: {{ message | tojson }}{{ eos_token }}
    {% endif %}
{% endfor %}
"""
    ours.chat_template = template
    chat = [{"role": "system", "content": " über <b> "}, {"role": "user", "content": "hé"}]
    assert render(chat, ours) == theirs.apply_chat_template(chat, chat_template=template, tokenize=False)


def test_spans_in_windows_that_overlap(bases):
    tokenizer = load_tokenizer(bases["bert"])
    encoder = Encoder("question_answering", tokenizer, 16, stride=4)
    context = " ".join(["the cat sat on a mat"] * 3) + " awful film"
    samples = encoder([{"question": "who", "context": context, "answer": "awful film"}])
    assert len(samples) > 1 and all(len(s["input_ids"]) <= 16 for s in samples)
    for sample in samples:
        ids, start, end = sample["input_ids"], sample["start_positions"], sample["end_positions"]
        found = tokenizer.decode(ids[start : end + 1], False)
        whole = "awful film" in tokenizer.decode(ids)
        assert found == ("awful film" if whole else "[CLS]")
        assert sample["token_type_ids"] == [0] * 3 + [1] * (len(ids) - 3)
    assert found == "awful film"
    squad = {"question": "who", "context": "a cat a cat", "answer": {"text": ["cat"], "answer_start": [8]}}
    assert encoder([squad])[0]["start_positions"] == 6
    assert encoder([{**squad, "answer": {"text": [], "answer_start": []}}])[0]["end_positions"] == 0
    with pytest.raises(ValueError, match="data example 0: the context has no 'dog'"):
        encoder([{**squad, "answer": "dog"}])
    start, end = torch.tensor([[0.0, 3.0, 9.0]]), torch.tensor([[5.0, 4.0, 0.0]])
    assert [t.item() for t in likeliest_spans(start, end)] == [2, 2]  # 9 + 5 would end before it begins


def test_words_of_several_tokens_and_two_texts(bases):
    tokenizer = load_tokenizer(bases["bert"])
    encoder = Encoder("token_classification", tokenizer, 16, labels=("A", "B"))
    sample = encoder([{"tokens": ["cat", "fineat", "mat"], "tags": ["A", "B", 0]}])[0]
    pieces = len(tokenizer.encode("fineat"))
    assert pieces > 1 and sample["labels"] == [-100, 0, 1, *[-100] * (pieces - 1), 0, -100]
    assert sample["input_ids"] == tokenizer.encode("cat fineat mat", add_special_tokens=True)
    encoder = Encoder("classification", tokenizer, 9, labels=("A", "B"), columns=Columns(text_pair="other"))
    sample = encoder([{"text": "the cat sat on a mat", "other": "good film", "label": "B"}])[0]
    wanted = tokenizer.encode("the cat sat on", add_special_tokens=True) + tokenizer.encode("good film") + [3]
    assert sample["input_ids"] == wanted and sample["token_type_ids"] == [0] * 6 + [1] * 3


# ---- adapters, resuming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_that_was_ended_goes_on_to_the_bit(bases, tmp_path, rank):
    changes = {"lora": LoraConfig(rank=rank, dropout=0.1 * (rank > 0), targets=("all",))}

    def config(name, steps, **run):
        return config_for("classification", bases["bert"], tmp_path / name, steps=steps, run=run, **changes)

    finetune(config("whole", 12), train=reviews(), quiet=True)
    part = prepare(config("part", 12, save_every=5), train=reviews(), quiet=True)
    step = part.train_step

    def interrupted():
        if part.step == 7:
            raise KeyboardInterrupt
        return step()

    part.train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        part.fit()
    finetune(config("part", 12, save_every=5, resume=True), train=reviews(), quiet=True)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 12
    with pytest.raises(FileExistsError, match="holds a checkpoint already"):
        finetune(config("part", 12), train=reviews(), quiet=True)


def test_adapters_alone_in_checkpoints_and_a_whole_model_in_the_end(bases, tmp_path):
    lora = LoraConfig(rank=4, targets=("all",))
    config = config_for(
        "classification", bases["bert"], tmp_path / "run", rate=2e-2, steps=60, lora=lora, run={"keep_best": True}
    )
    trainer = prepare(config, train=reviews(), quiet=True)
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    result = finetune(config, train=reviews(), metrics=task_metrics, quiet=True)
    assert result.metrics["accuracy"] == 1.0
    checkpoint = tmp_path / "run" / "checkpoint"
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run" / "merged"  # what generate and evaluate take
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    merged = fastformer.from_pretrained(tmp_path / "run" / "merged")
    assert merged.config.id2label == {0: "neg", 1: "pos"}
    from fastformer.models import BertForSequenceClassification
    from fastformer.training import load_lora

    with pytest.warns(UserWarning, match="this head starts at random"):
        base = BertForSequenceClassification.from_pretrained(bases["bert"])
    for name, value in base.named_parameters():
        if f"base_model.model.{name}" in frozen:
            assert torch.equal(value, frozen[f"base_model.model.{name}"])
    ids = torch.tensor([[2, 7, 8, 3]])
    torch.testing.assert_close(merged(ids).logits, load_lora(base, tmp_path / "run" / "best")(ids).logits)


def test_a_frozen_body_stays(bases, tmp_path):
    config = config_for("classification", bases["bert"], tmp_path / "run", steps=3, freeze=("body",))
    finetune(config, train=reviews(), quiet=True)
    before, after = fastformer.from_pretrained(bases["bert"]), _newest(tmp_path / "run").bert
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {"pooler.dense.weight", "pooler.dense.bias"}


# ---- the verb and its errors -----------------------------------------------------------------------------------------


def test_the_verb_reads_tables_and_configs(bases, tmp_path, capsys):
    table = tmp_path / "reviews.csv"
    table.write_text("comment,stars\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in reviews()))
    settings = tmp_path / "run.yaml"
    settings.write_text("data: {columns: {text: comment}, batch_size: 8}\nlora: {rank: 2, targets: [query, value]}\n")
    command = ["finetune", "--config", str(settings), "--model", str(bases["bert"]), "--data.path", str(table)]
    command += ["--data.columns.label", "stars", "--epochs", "1", "--run.no-tensorboard"]
    assert cli.main([*command, "--run.out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "58 samples to train on, 6 to measure on; 2 classes" in shown and "accuracy" in shown
    assert (tmp_path / "run" / "merged" / "config.json").is_file() and (tmp_path / "run" / "loss.png").is_file()
    command[command.index("stars")] = "star"
    assert cli.main([*command, "--run.out", str(tmp_path / "other")]) == 1
    assert "label: data example 0 has no 'star'; did you mean 'stars'?" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "examples", "message"),
    [
        ({}, [{**row, "label": "pos"} for row in reviews()], r"label: every example has 'pos'; a classifier needs two"),
        ({}, [], r"data is empty"),
        ({}, [*reviews(), {"text": "a cat"}], r"label: data example 64 has no 'label'"),
        ({}, [{**row, "label": 0.5} for row in reviews()], r"expected names or whole numbers, got 0\.5"),
        ({"data": ExamplesConfig(max_length=49)}, reviews(), r"data\.max_length: got 49, and the model has 48"),
        (
            {"data": ExamplesConfig(too_long="error", max_length=5)},
            reviews(),
            r"data example \d+: \d+ tokens, and there is room for 5",
        ),
        ({"task": "seq2seq"}, PAIRS, r"is a 'bert', and seq2seq is for t5"),
        ({"freeze": ("bert.encodr",)}, reviews(), r"begins with bert\.encodr; did you mean bert\.encoder\?"),
        ({"lora": LoraConfig(rank=2, targets=("kye",))}, reviews(), r"lora\.targets: no layer is named kye; did you"),
        ({"model": ""}, reviews(), r"model: got ''"),
    ],
)
def test_what_does_not_fit_is_named_before_a_step(bases, tmp_path, changes, examples, message):
    config = replace(config_for("classification", bases["bert"], tmp_path / "run"), **changes)
    with pytest.raises(ValueError, match=message):
        finetune(config, train=examples, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model(bases, tmp_path):
    from fastformer.data import train_wordpiece

    base = save_base("bert", tmp_path / "mixed")
    train_wordpiece([" ".join(map(chr, range(0x4E00, 0x4F00)))], 2000).save(base)
    with pytest.raises(ValueError, match=r"it is another model's tokenizer"):
        finetune(config_for("classification", base, tmp_path / "run"), train=reviews(), quiet=True)
    with pytest.raises(FileNotFoundError, match=r"data: 'nowhere\.csv' does not exist"):
        config = config_for("classification", bases["bert"], tmp_path / "run", data=ExamplesConfig(path="nowhere.csv"))
        finetune(config, quiet=True)
