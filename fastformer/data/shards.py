"""Token shards: a corpus encoded once, then read from memory-mapped files.

A directory holds ``tokens-00000.bin``, ``tokens-00001.bin`` … (the ids alone, little-endian, two bytes each where the
vocabulary has at most 65,536 tokens, else four), ``documents.npy`` (where each document begins, int64), the tokenizer's
own files, and ``index.json``, which says how many tokens each file must have and which tokenizer made them. It is
written beside its place and renamed, so it is whole or not there.

The operating system reads the pages that a batch touches and keeps them while there is memory; nothing is copied before
a batch is put together.
"""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from .corpora import Document
from .tokenizers import Tokenizer, fingerprint, load_tokenizer

INDEX_FILE = "index.json"
DOCUMENTS_FILE = "documents.npy"
FORMAT = 1
BATCH_CHARACTERS = 1 << 20  # given to the tokenizer at a time, which spreads the documents over the cores


def write_shards(
    documents: Iterable[str | Document],
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    shard_tokens: int = 1 << 28,
    add_special_tokens: bool = False,
) -> TokenShards:
    """Encodes ``documents`` into a new ``directory``.

    Args:
        documents: read once, as a stream; those without text are left out.
        tokenizer: its end-of-text token, where it has one, ends every document.
        shard_tokens: a file is closed when it has so many; a document is never divided.
        add_special_tokens: encode each document with the tokenizer's special tokens, as [CLS] and [SEP].

    Returns:
        The shards, opened.

    Raises:
        FileExistsError: ``directory`` is there already.
        ValueError: no text.
        OSError: the disk is full, or not to be written to. Nothing is left behind.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"directory: {directory} exists already; shards are only written to a new one")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens: got {shard_tokens}, expected at least 1")
    fresh = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    fresh.mkdir(parents=True)
    try:
        dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        texts = _Texts(documents)
        offsets, counts = _write_tokens(fresh, _encoded(texts, tokenizer, add_special_tokens), dtype, shard_tokens)
        if not counts:
            raise ValueError("documents: there is no text in them")
        np.save(fresh / DOCUMENTS_FILE, np.frombuffer(offsets, dtype=np.int64))
        tokenizer.save(fresh)
        index = {
            "format": FORMAT,
            "dtype": dtype,
            "tokens": offsets[-1],
            "documents": len(offsets) - 1,
            "characters": texts.characters,
            "vocab_size": tokenizer.vocab_size,
            "eos_token_id": tokenizer.eos_token_id,
            "tokenizer": fingerprint(tokenizer),
            "shards": [{"file": _shard(i), "tokens": count} for i, count in enumerate(counts)],
        }
        (fresh / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        for path in [*fresh.iterdir(), fresh]:
            _flush(path)
        os.rename(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return TokenShards(directory)


class _Texts:
    """The documents that are not empty, as text, and how many characters went by."""

    def __init__(self, documents: Iterable[str | Document]) -> None:
        self.documents, self.characters = documents, 0

    def __iter__(self) -> Iterator[str]:
        for document in self.documents:
            text = document if isinstance(document, str) else document.text
            self.characters += len(text)
            if text:
                yield text


def _encoded(texts: Iterable[str], tokenizer: Tokenizer, special: bool) -> Iterator[list[int]]:
    options = {"add_special_tokens": True} if special else {}
    many = getattr(tokenizer, "encode_batch", None)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in _batched(texts):
        for ids in many(batch, **options) if many else [tokenizer.encode(text, **options) for text in batch]:
            yield ids if not end or list(ids[-1:]) == end else [*ids, *end]


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_tokens(
    folder: Path, documents: Iterator[list[int]], dtype: str, shard_tokens: int
) -> tuple[array[int], list[int]]:
    """Writes the shards; returns where each document begins, and the number of tokens in each file."""
    offsets, counts = array("q", [0]), []
    file: BinaryIO | None = None
    try:
        for ids in documents:
            if file is None or counts[-1] >= shard_tokens:
                if file is not None:
                    file.close()
                file = open(folder / _shard(len(counts)), "wb")
                counts.append(0)
            file.write(np.asarray(ids, dtype=dtype).tobytes())
            counts[-1] += len(ids)
            offsets.append(offsets[-1] + len(ids))
    finally:
        if file is not None:
            file.close()
    return offsets, counts


class TokenShards:
    """What :func:`write_shards` wrote: ``shards[i]`` is a document, ``len(shards)`` how many there are.

    Args:
        directory: where they are.
        tokenizer: the one that will be used with them, to be sure that it is the one that made them.

    Attributes:
        offsets: ``(documents + 1,)`` int64, where each document begins in the one long stream.
        vocab_size, eos_token_id: of the tokenizer.
        characters: of the text.

    Raises:
        FileNotFoundError: not a directory of shards.
        ValueError: a file is shorter or longer than the index says, or was made by another tokenizer.
    """

    def __init__(self, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
        self.directory = Path(directory)
        path = self.directory / INDEX_FILE
        if not path.is_file():
            raise FileNotFoundError(f"no token shards in {directory}: {path} does not exist")
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']}, expected {FORMAT}")
            names = [(entry["file"], int(entry["tokens"])) for entry in index["shards"]]
            self.dtype = np.dtype(index["dtype"])
            self.vocab_size, self.eos_token_id = int(index["vocab_size"]), index["eos_token_id"]
            self.characters = int(index["characters"])
            self._fingerprint = index["tokenizer"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not an index of token shards: {error!r}") from error
        if tokenizer is not None and fingerprint(tokenizer) != self._fingerprint:
            raise ValueError(
                f"tokenizer: is not the one that made {directory}, whose ids mean other tokens; "
                "load_tokenizer on that directory loads it"
            )
        for name, count in names:
            self._check_size(self.directory / name, count * self.dtype.itemsize)
        self._shards = [np.memmap(self.directory / name, dtype=self.dtype, mode="r") for name, _ in names]
        self._begins = np.cumsum([0, *(count for _, count in names)])
        self.offsets = np.load(self._documents_file(int(index["documents"])), mmap_mode="r")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made them."""
        return load_tokenizer(self.directory)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Document ``index``: ``(length,)``, not copied, not to be written to."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        return self.read(int(self.offsets[index]), int(self.offsets[index + 1]))

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each document, ``(documents,)`` int64."""
        return np.diff(self.offsets)

    def numel(self) -> int:
        """Tokens in all documents."""
        return int(self._begins[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of the stream: ``(stop - start,)``, copied only where files meet."""
        if not 0 <= start <= stop <= self.numel():
            raise IndexError(f"tokens {start} to {stop} of {self.numel()}")
        first = int(np.searchsorted(self._begins, start, side="right")) - 1
        parts = []
        for i in range(first, len(self._shards)):
            begin = int(self._begins[i])
            if begin >= stop and parts:
                break
            parts.append(self._shards[i][max(start - begin, 0) : stop - begin])
        if not parts:
            return np.empty(0, dtype=self.dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def windows(self, starts: Iterable[int], length: int) -> Tensor:
        """``(B, length)`` int64: the tokens from each of B starts on."""
        starts = list(starts)
        rows = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(rows, starts):
            row[:] = self.read(start, start + length)
        return torch.from_numpy(rows)

    def __repr__(self) -> str:
        return f"TokenShards({str(self.directory)!r}, {self.numel():,} tokens in {len(self):,} documents)"

    def _documents_file(self, documents: int) -> Path:
        path = self.directory / DOCUMENTS_FILE
        header = np.lib.format.open_memmap(path, mode="r") if path.is_file() and path.stat().st_size > 128 else None
        if header is None or len(header) != documents + 1:
            found = "is missing or empty" if header is None else f"lists {len(header) - 1:,}"
            raise ValueError(
                f"{path}: the index says {documents:,} documents, the file {found}; write the shards again"
            )
        return path

    @staticmethod
    def _check_size(path: Path, expected: int) -> None:
        if not path.is_file():
            raise ValueError(f"{path} is missing: the index lists it; write the shards again")
        size = path.stat().st_size
        if size != expected:
            what = "truncated" if size < expected else "longer than it was written"
            raise ValueError(f"{path} is {what}: {size:,} bytes, the index says {expected:,}; write the shards again")


def _shard(number: int) -> str:
    return f"tokens-{number:05d}.bin"


def _flush(path: Path) -> None:
    """To the disk before the rename, or a power cut could leave the new name on empty files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
