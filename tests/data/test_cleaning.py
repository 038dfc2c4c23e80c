"""The pipeline: order, streaming, what the report says, configs with their mistakes, files whole or none."""

import json

import pytest

from fastformer import cli
from fastformer.data.cleaning import DEFAULT_STEPS, STEPS, CleaningReport, Pipeline, clean
from fastformer.data.cleaning_steps import (
    Filter,
    FilterLength,
    NormalizeUnicode,
    RemoveControlCharacters,
    RemoveExactDuplicates,
)
from fastformer.data.corpora import Document

SIMPLE = [RemoveControlCharacters(), FilterLength(min_characters=3), RemoveExactDuplicates()]
DOCUMENTS = [
    Document("a", "one\x00", {"year": 1603}),
    Document("b", "on"),
    Document("c", "one"),
    Document("d", "two and three"),
]


class NoShouting(Filter):
    """A step of the user's own."""

    def reason(self, document):
        return "shouts" if document.text.isupper() else None


def test_steps_in_their_order_and_what_the_report_says():
    report = CleaningReport()
    left = list(Pipeline(SIMPLE).run(iter(DOCUMENTS), report))
    assert left == [Document("a", "one", {"year": 1603}), DOCUMENTS[3]]
    control, length, exact = report.steps
    assert (control.documents_in, control.documents_out, control.changed) == (4, 4, 1)
    assert (control.characters_in, control.characters_out) == (22, 21)
    assert (length.documents_in, length.documents_out, length.characters_out) == (4, 3, 19)
    assert (exact.documents_in, exact.documents_out, exact.characters_out) == (3, 2, 16)
    assert exact.repeats == [("c", "a", 1.0)]
    assert (report.documents_in, report.documents_out) == (4, 2)
    assert all(step.seconds > 0 for step in report.steps)
    assert [str(example) for step in report.steps for example in step.examples] == [
        r"a: 'one\x00' → 'one'",
        "b: 2 characters, fewer than 3",
        "c: repeats a",
    ]


def test_the_report_prints_and_is_saved(tmp_path):
    report = CleaningReport()
    list(Pipeline(SIMPLE).run(DOCUMENTS, report))
    head, *rows = str(report).splitlines()
    assert head.split()[:3] == ["step", "documents", "in"]
    assert rows[1].split()[:4] == ["filter_length", "4", "3", "0"]
    assert "filter_length: b: 2 characters, fewer than 3" in rows
    report.save(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert [step["step"] for step in stored["steps"]] == [
        "remove_control_characters",
        "filter_length",
        "remove_exact_duplicates",
    ]
    assert stored["steps"][2]["repeats"] == [["c", "a", 1.0]]
    markdown = (tmp_path / "report.md").read_text()
    assert "| filter_length | 4 | 3 | 0 |" in markdown and "- c: repeats a" in markdown
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md"}


def test_three_examples_and_only_their_surroundings():
    report = CleaningReport()
    list(
        Pipeline([NormalizeUnicode()]).run(
            [Document(str(n), "x" * 500 + "e\u0301" + "y" * 500) for n in range(9)], report
        )
    )
    (step,) = report.steps
    assert len(step.examples) == 3 and step.changed == 9
    assert step.examples[0].before == "…" + "x" * 30 + "e\u0301" + "y" * 28 + "…"
    assert step.examples[0].after == "…" + "x" * 30 + "é" + "y" * 29 + "…"


def test_documents_stream():
    """No more is read than a batch ahead of what was taken."""
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield Document(str(read), f"{read} " * 50_000)

    stream = Pipeline([RemoveExactDuplicates()]).run(endless())
    assert [next(stream).name for _ in range(10)] == [str(n) for n in range(1, 11)]
    assert read < 20


def test_every_run_begins_anew_and_own_steps_are_steps():
    pipeline = Pipeline([RemoveExactDuplicates(), NoShouting()])
    report = CleaningReport()
    for _ in range(2):
        assert [d.name for d in pipeline.run([*DOCUMENTS, Document("e", "HELLO")], report)] == ["a", "b", "c", "d"]
    assert report.steps[1].step == "NoShouting" and report.steps[1].documents_in == 5


def test_a_config_in_yaml(tmp_path):
    path = tmp_path / "cleaning.yaml"
    path.write_text(
        "steps:\n- remove_control_characters\n- filter_length: {min_characters: 3}\n- remove_exact_duplicates:\n"
    )
    assert Pipeline.from_yaml(path).steps == Pipeline(SIMPLE).steps
    everything = Pipeline.from_dict({"steps": list(STEPS)})
    assert [type(step) for step in everything.steps] == list(STEPS.values())
    settings = {
        "near": {"threshold": 1, "verify": True},
        "pii": {"kinds": ["email"], "region": "US"},
        "spelling": {"table": {"a": "b"}},
    }
    steps = [
        {"remove_near_duplicates": settings["near"]},
        {"mask_pii": settings["pii"]},
        {"normalize_spelling": settings["spelling"]},
        {"filter_length": {"max_words": None}},
    ]
    near, pii, spelling, _ = Pipeline.from_dict({"steps": steps}).steps
    assert (near.threshold, near.verify, pii.kinds, spelling.table) == (1, True, ["email"], {"a": "b"})


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"steps": ["filter_langage"]},
            r"there is no step 'filter_langage'; did you mean 'filter_language'\?; there are normalize",
        ),
        (
            {"steps": [{"filter_length": {"min_chars": 5}}]},
            r"filter_length has no setting 'min_chars'; did you mean 'min_characters'\?",
        ),
        ({"steps": [{"filter_length": {"min_words": "5"}}]}, "filter_length.min_words: got '5', expected int"),
        (
            {"steps": [{"filter_length": {"max_words": True}}]},
            "filter_length.max_words: got True, expected int or null",
        ),
        ({"steps": [{"mask_pii": {"kinds": "email"}}]}, "mask_pii.kinds: got 'email', expected a list"),
        ({"steps": [{"normalize_unicode": {"form": "NFX"}}]}, "normalize_unicode.form: got 'NFX', expected one of NFC"),
        ({"steps": [{"remove_near_duplicates": {"threshold": 2}}]}, "remove_near_duplicates.threshold: got 2"),
        ({"steps": [{"repair_encoding": 5}]}, "repair_encoding: got 5, expected a mapping"),
        ({"steps": [{"repair_encoding": {"x": 5}}]}, "repair_encoding has no setting 'x'; it has none"),
        ({"steps": [{"a": {}, "b": {}}]}, "expected a step's name, alone or with its settings"),
        ({"steps": []}, "steps: got none, expected some of normalize_unicode"),
        ({"step": ["repair_encoding"]}, "a list of steps under the one key 'steps'"),
        (None, "a list of steps under the one key 'steps', got None"),
    ],
)
def test_mistakes_in_a_config_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        Pipeline.from_dict(config)


def test_mistakes_in_a_file_name_the_file(tmp_path):
    path = tmp_path / "cleaning.yaml"
    with pytest.raises(FileNotFoundError, match=r"cleaning.yaml does not exist"):
        Pipeline.from_yaml(path)
    for content, message in (
        ("steps: [", r"cleaning.yaml: while parsing"),
        ("steps: 5", r"cleaning.yaml: config: expected"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            Pipeline.from_yaml(path)
    with pytest.raises(TypeError, match="steps: got 'repair_encoding', expected instances of Step"):
        Pipeline(["repair_encoding"])


def test_a_corpus_is_cleaned_into_a_file(tmp_path):
    out = tmp_path / "new" / "cleaned.jsonl"
    report = clean(DOCUMENTS, out, Pipeline(SIMPLE))
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"name": "a", "text": "one", "year": 1603},
        {"name": "d", "text": "two and three"},
    ]
    assert report.documents_out == 2
    assert {path.name for path in out.parent.iterdir()} == {"cleaned.jsonl", "cleaned.report.json", "cleaned.report.md"}


def test_what_cannot_be_finished_leaves_the_old_file(tmp_path):
    out = tmp_path / "cleaned.jsonl"
    out.write_text("old\n")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2 is not JSON"):
        clean(bad, out, Pipeline(SIMPLE))
    with pytest.raises(ValueError, match="nothing is left of documents:\nstep "):
        clean(["a", "b"], out, Pipeline(SIMPLE))
    assert out.read_text() == "old\n"
    assert {path.name for path in tmp_path.iterdir()} == {"bad.jsonl", "cleaned.jsonl"}
    with pytest.raises(ValueError, match=r"out: got .*cleaned.txt', expected a file name that ends in .jsonl"):
        clean(["a"], tmp_path / "cleaned.txt")


def test_the_verb_with_the_default_steps(tmp_path, capsys):
    for package in ("ftfy", "rensa", "tyro"):
        pytest.importorskip(package, reason=f"the package {package} is not installed")
    raw = tmp_path / "raw.jsonl"
    words = " ".join(f"word{n}" for n in range(100))
    texts = ["<p>It doesnâ€™t matter</p>", words, words + " tail", ""]
    raw.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts), encoding="utf-8")
    out = tmp_path / "cleaned.jsonl"
    assert cli.main(["clean", "--source", str(raw), "--out", str(out), "--text-field", "body"]) == 0
    assert [json.loads(line)["text"] for line in out.read_text("utf-8").splitlines()] == ["It doesn’t matter", words]
    printed = capsys.readouterr().out
    assert all(step in printed for step in DEFAULT_STEPS) and "raw.jsonl:3: repeats raw.jsonl:2 (similarity " in printed
    assert cli.main(["clean", "--source", str(raw), "--out", str(out)]) == 1
    assert "raw.jsonl, line 1 has no field 'text'; it has 'body'" in capsys.readouterr().err
