"""``fastformer tokenize``: a corpus, encoded once, as token shards of a training and of a held-out part."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .batches import FEW, Holdout, check_fraction, split_documents
from .corpora import Corpus, Document
from .shards import TokenShards, write_shards
from .sources import Source, open_source
from .tokenizers import KINDS, Tokenizer, load_tokenizer, train_tokenizer

PARTS = ("train", "validation")


@dataclass(frozen=True)
class TokenizeConfig:
    """Encode text into token shards, which `fastformer pretrain --data.path` reads."""

    source: str = "shakespeare"
    """What open_source reads: text, JSON Lines, Parquet, a directory of these, hf:name, shakespeare, python."""
    text_field: str = "text"
    """The field of a record that holds its text."""
    out: str = "data/tokens"
    """A new directory, for the shards of both parts and the tokenizer."""
    tokenizer: str = "bpe"
    """char, bpe, wordpiece or unigram (trained on the training part), or a directory that holds a tokenizer."""
    vocab_size: int = 8192
    """Number of tokens a new tokenizer is trained to."""
    validation_fraction: float = 0.1
    """Share of the text held out, in whole documents where there are ten or more."""
    seed: int = 0
    """Another one holds out other documents."""
    shard_tokens: int = 1 << 28
    """Tokens in a file, about."""


@dataclass(frozen=True)
class TokenizedCorpus:
    """What :func:`tokenize` wrote."""

    name: str
    train: TokenShards
    validation: TokenShards

    @property
    def note(self) -> str:
        """Where the text comes from."""
        return f"token shards in {self.train.directory.parent}"

    def __len__(self) -> int:
        """Number of characters."""
        return self.train.characters + self.validation.characters


def tokenize(config: TokenizeConfig) -> TokenizedCorpus:
    """Writes the shards ``config`` describes, whole or not at all.

    Raises:
        FileExistsError: ``config.out`` is there already.
        FileNotFoundError, ValueError: no text, or no such tokenizer.
    """
    out = Path(config.out)
    if out.exists():
        raise FileExistsError(f"out: {out} exists already; choose another --out, or remove it")
    check_fraction(config.validation_fraction)
    parts = _Parts(config)
    if config.tokenizer in KINDS or not Path(config.tokenizer).exists():
        seen = PARTS if config.tokenizer == "char" else PARTS[:1]  # every character can be encoded
        texts = (document.text for name in seen for document in parts.read(name))
        tokenizer = train_tokenizer(config.tokenizer, texts, config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    fresh = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        for name in PARTS:
            write_shards(parts.read(name), tokenizer, fresh / name, shard_tokens=config.shard_tokens)
        os.rename(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return load_tokenized(out)


class _Parts:
    """The parts that :func:`split_documents` makes, streamed: the source is read once more, to see what to hold out."""

    def __init__(self, config: TokenizeConfig) -> None:
        self.config = config
        source = iter(self._open())
        first = tuple(itertools.islice(source, FEW))
        self.few: dict[str, tuple[Document, ...]] = {}
        if len(first) < FEW:
            corpus = Corpus(str(config.source), first)
            self.few = dict(zip(PARTS, split_documents(corpus, config.validation_fraction)))
        else:
            self.holdout = Holdout(itertools.chain(first, source), config.validation_fraction, config.seed)

    def read(self, part: str) -> Iterator[Document]:
        """The documents of one of :data:`PARTS`."""
        if self.few:
            yield from self.few[part]
            return
        held = part == PARTS[1]
        yield from (document for document in self._open() if (document in self.holdout) is held)

    def _open(self) -> Source:
        return open_source(self.config.source, text_field=self.config.text_field)


def is_tokenized(path: str | Path) -> bool:
    """Whether :func:`tokenize` wrote ``path``."""
    return Path(path, PARTS[0]).is_dir() and Path(path, PARTS[1]).is_dir()


def load_tokenized(path: str | Path, tokenizer: Tokenizer | None = None) -> TokenizedCorpus:
    """Opens what :func:`tokenize` wrote; with ``tokenizer``, ValueError if another one did."""
    train, validation = (TokenShards(Path(path, part), tokenizer) for part in PARTS)
    return TokenizedCorpus(Path(path).name, train, validation)
