"""Documents from wherever text is kept, one at a time, resumed at the exact next one.

:func:`open_source` takes text files, JSON Lines (also compressed), Parquet, a directory of all these, a data set of the
Hugging Face hub or in memory, and the demo's corpora. Whatever it is, one document is in memory at a time (of Parquet,
one row group), and ``state_dict()`` says how far the reading has come: the file, and the byte of the next line or the
next row. ``load_state_dict()`` seeks there, so that resuming costs the same after the last document as after the first.
"""

from __future__ import annotations

import difflib
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..extras import require
from .corpora import TEXT_SUFFIXES, Document, load_corpus

CORPORA = ("shakespeare", "python")
JSON_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
UNDECODABLE = ("error", "guess")


class Source:
    """A stream of documents that knows where it is.

    A loop goes on from where the last one stopped; one that came to the end starts over.
    """

    name: str

    def __iter__(self) -> Iterator[Document]:
        """Documents from the present position to the end."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The position after the last document given out, as plain data that JSON can hold."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state``.

        Raises:
            ValueError: it is another source's, or what it was taken from has changed.
        """
        raise NotImplementedError


def open_source(
    spec: str | Path | Iterable[Any],
    *,
    text_field: str = "text",
    name_field: str = "name",
    split: str = "train",
    undecodable: str = "error",
) -> Source:
    """The documents that ``spec`` stands for.

    Args:
        spec: ``"shakespeare"`` or ``"python"`` (see :func:`load_corpus`); the path of a text file (one document), of
            JSON Lines (``.jsonl``, ``.ndjson``; a document a line), of a Parquet file (a document a row), each of the
            first two also with ``.gz``; a directory of such files, read in the order of their paths; ``"hf:name"`` or
            ``"hf:name/config"``, a data set of the Hugging Face hub, streamed; a ``datasets.Dataset`` or
            ``IterableDataset``; a sequence of texts or Documents.
        text_field: of a record, the field that holds the text. The other fields are the document's metadata.
        name_field: the field that names it; where a record has none, its file and line (or row) do.
        split: of a data set on the hub.
        undecodable: what becomes of bytes that are not UTF-8: "error", or "guess" their encoding (ftfy's guess).

    Raises:
        FileNotFoundError: a path with nothing there.
        ValueError: a directory without readable files, an unknown kind of file, or an argument outside its values.
            While reading: a record without the field (the message names the nearest), a line that is not JSON, text
            that is not UTF-8 (each with file and line), or no document at all.
        MissingPackageError: what reads it is not installed.
    """
    if undecodable not in UNDECODABLE:
        raise ValueError(f"undecodable: got {undecodable!r}, expected one of {', '.join(UNDECODABLE)}")
    if isinstance(spec, Source):
        return spec
    if isinstance(spec, str) and spec in CORPORA:
        corpus = load_corpus(spec)
        return SequenceSource(corpus.documents, name=corpus.name)
    if isinstance(spec, str) and spec.startswith("hf:"):
        path, config = _hub_name(spec.removeprefix("hf:"))
        datasets = require("datasets", f"the data set {path}", "data")
        return DatasetSource(
            datasets.load_dataset(path, config, split=split, streaming=True), text_field, name_field, path
        )
    if isinstance(spec, (str, Path)):
        return FileSource(spec, text_field=text_field, name_field=name_field, undecodable=undecodable)
    if type(spec).__module__.split(".")[0] == "datasets":
        return DatasetSource(spec, text_field, name_field)
    if isinstance(spec, Sequence):
        return SequenceSource(spec)
    raise TypeError(f"spec: got {type(spec).__name__}, expected a path, a name, a data set or a sequence of documents")


class SequenceSource(Source):
    """Documents in memory.

    Args:
        documents: Documents, or texts, which are named by their number.
        name: a title to print.
    """

    def __init__(self, documents: Sequence[Document | str], name: str = "documents") -> None:
        self.name, self.documents, self._position = name, documents, 0
        if not len(documents):
            raise ValueError(f"source: {name} holds no documents")

    def __iter__(self) -> Iterator[Document]:
        while self._position < len(self.documents):
            document = self.documents[self._position]
            self._position += 1
            yield document if isinstance(document, Document) else Document(str(self._position - 1), document)
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"source": self.name, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _check_same(self.name, state)
        if not 0 <= state["position"] <= len(self.documents):
            raise ValueError(f"state: document {state['position']} of {self.name}, which has {len(self.documents)}")
        self._position = state["position"]


class FileSource(Source):
    """Text files, JSON Lines and Parquet; arguments as for :func:`open_source`.

    With ``plain_text`` a single file of no known kind is text, and all lines of text end with ``\\n``, also the last.
    """

    def __init__(
        self,
        path: str | Path,
        text_field: str = "text",
        name_field: str = "name",
        undecodable: str = "error",
        plain_text: bool = False,
    ) -> None:
        path = Path(path).expanduser()
        self.name = str(path)
        self.text_field, self.name_field, self.undecodable = text_field, name_field, undecodable
        self.plain_text = plain_text
        if path.is_dir():
            self.root, self.files = path, sorted(f for f in path.rglob("*") if f.is_file() and _reader(f))
            if not self.files:
                raise ValueError(f"source: {path} holds no files to read (looked for {_known_suffixes()})")
        elif path.is_file():
            self.root, self.files = path.parent, [path]
            if not (_reader(path) or plain_text):
                raise ValueError(f"source: {path} is of no known kind; expected {_known_suffixes()}")
        else:
            raise FileNotFoundError(
                f"source: {str(path)!r} does not exist; expected a file, a directory, one of {', '.join(CORPORA)}, or "
                "hf:NAME for a data set of the Hugging Face hub"
            )
        self._file = 0
        self._position: list[int] = [0, 0]  # what the reader needs to seek, and records read so far

    def __iter__(self) -> Iterator[Document]:
        found = bool(self._file or self._position[1])
        while self._file < len(self.files):
            file = self.files[self._file]
            for document, position in _READERS[_reader(file) or TEXT_SUFFIXES[0]](self, file, *self._position):
                self._position = position
                found = True
                yield document
            self._file, self._position = self._file + 1, [0, 0]
        self._file = 0
        if not found:
            raise ValueError(f"source: {self.name} is empty")

    def state_dict(self) -> dict[str, Any]:
        at_end = self._file >= len(self.files)
        file = None if at_end else self._label(self.files[self._file])
        return {"source": self.name, "files": len(self.files), "file": file, "position": list(self._position)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _check_same(self.name, state)
        labels = [self._label(file) for file in self.files]
        if state["files"] != len(labels) or state["file"] not in labels:
            raise ValueError(
                f"state: stopped in {state['file']!r}, one of {state['files']} files; {self.name} has {len(labels)} "
                f"now, {'with' if state['file'] in labels else 'without'} it"
            )
        self._file, self._position = labels.index(state["file"]), list(state["position"])

    def _label(self, file: Path) -> str:
        return str(file.relative_to(self.root))

    def _read_text(self, file: Path, start: int, count: int) -> Iterator[tuple[Document, list[int]]]:
        if count:
            return
        with _open(file) as stream:
            text = self._decode(stream.read(), str(file))
        if text and self.plain_text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            text += "\n" * (not text.endswith("\n"))
        if text:
            yield Document(self._label(file), text), [0, 1]

    def _read_json(self, file: Path, start: int, count: int) -> Iterator[tuple[Document, list[int]]]:
        with _open(file) as stream:
            stream.seek(start)
            while line := stream.readline():
                start += len(line)
                count += 1
                if line.isspace():
                    continue
                where = f"{file}, line {count}"
                try:
                    record = json.loads(self._decode(line, where))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
                yield self._document(record, where, f"{self._label(file)}:{count}"), [start, count]

    def _read_parquet(self, file: Path, group: int, row: int) -> Iterator[tuple[Document, list[int]]]:
        parquet = require("pyarrow.parquet", f"reading {file}", "data").ParquetFile(file)
        with parquet:
            before = sum(parquet.metadata.row_group(i).num_rows for i in range(group))
            for number in range(group, parquet.num_row_groups):
                rows = parquet.metadata.row_group(number).num_rows
                if row - before < rows:
                    records = parquet.read_row_group(number).slice(row - before).to_batches(max_chunksize=1024)
                    for record in (record for batch in records for record in batch.to_pylist()):
                        row += 1
                        where = f"{file}, row {row}"
                        yield self._document(record, where, f"{self._label(file)}:{row}"), [number, row]
                before += rows

    def _decode(self, data: bytes, where: str) -> str:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if self.undecodable == "guess":
                return require("ftfy", "guessing an encoding", "data").guess_bytes(data)[0]
            raise ValueError(
                f"{where} is not UTF-8 ({error.reason} at byte {error.start}); undecodable='guess' guesses its encoding"
            ) from None

    def _document(self, record: Any, where: str, name: str) -> Document:
        return document_of(record, self.text_field, self.name_field, where, name)


class DatasetSource(Source):
    """A ``datasets.Dataset`` or ``IterableDataset``; arguments as for :func:`open_source`."""

    def __init__(self, dataset: Any, text_field: str = "text", name_field: str = "name", name: str = "") -> None:
        if isinstance(dataset, Mapping):
            raise ValueError(f"source: a data set of the splits {', '.join(map(str, dataset))}; choose one of them")
        self.dataset, self.text_field, self.name_field = dataset, text_field, name_field
        self.name = name or getattr(dataset.info, "dataset_name", None) or "dataset"
        self._row = 0
        self._streamed = hasattr(dataset, "load_state_dict")
        self._loaded: dict[str, Any] | None = None  # a stream's state until it gives a record: before that it has none

    def __iter__(self) -> Iterator[Document]:
        records = self.dataset if self._streamed else (self.dataset[i] for i in range(self._row, len(self.dataset)))
        if self._streamed:
            self.dataset.load_state_dict(self._stream_state())
        for record in records:
            self._row, self._loaded = self._row + 1, None
            where = f"{self.name}, row {self._row}"
            yield document_of(record, self.text_field, self.name_field, where, f"{self.name}:{self._row}")
        if not self._row:
            raise ValueError(f"source: {self.name} is empty")
        self._row, self._loaded = 0, None

    def _stream_state(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded
        return self.dataset.state_dict() if self._row else {}

    def state_dict(self) -> dict[str, Any]:
        stream = {"stream": self._stream_state()} if self._streamed else {}
        return {"source": self.name, "position": self._row, **stream}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _check_same(self.name, state)
        self._row, self._loaded = state["position"], state.get("stream")


def document_of(record: Any, text_field: str, name_field: str, where: str, name: str) -> Document:
    """The document that a record holds.

    Args:
        record: a mapping of fields.
        text_field, name_field: its text and its name.
        where: the place to name in an error.
        name: for a record that has no name.

    Raises:
        ValueError: not a mapping, no such field, or no text in it.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected a record with the field {text_field!r}, got {type(record).__name__}")
    if text_field not in record:
        near = difflib.get_close_matches(text_field, record, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where} has no field {text_field!r}; it has {', '.join(map(repr, record))}{hint}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: the field {text_field!r} holds {type(text).__name__}, expected text")
    named = record.get(name_field)
    metadata = {
        key: value for key, value in record.items() if key != text_field and (key != name_field or named is None)
    }
    return Document(name if named is None else str(named), text, metadata)


_READERS = {
    **dict.fromkeys(TEXT_SUFFIXES, FileSource._read_text),
    **dict.fromkeys(JSON_SUFFIXES, FileSource._read_json),
    **dict.fromkeys(PARQUET_SUFFIXES, FileSource._read_parquet),
}


def _reader(file: Path) -> str:
    """The suffix that says how ``file`` is read, or "" where nothing reads it."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    compressed = bool(suffixes) and suffixes[-1] == ".gz"
    suffix = "".join(suffixes[:-1][-1:] if compressed else suffixes[-1:])
    return suffix if suffix in _READERS and not (compressed and suffix in PARQUET_SUFFIXES) else ""


def _known_suffixes() -> str:
    return f"{', '.join(_READERS)}, all but Parquet also with .gz"


def _open(file: Path) -> BinaryIO:
    return gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")  # type: ignore[return-value]


def _hub_name(name: str) -> tuple[str, str | None]:
    """``owner/name/config`` and ``name`` as (path, config)."""
    parts = name.split("/")
    return ("/".join(parts[:2]), parts[2]) if len(parts) == 3 else (name, None)


def _check_same(name: str, state: Mapping[str, Any]) -> None:
    if state.get("source") != name:
        raise ValueError(f"state: taken from {state.get('source')!r}, loaded into {name!r}")
