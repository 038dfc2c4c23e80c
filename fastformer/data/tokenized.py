"""``fastformer tokenize``: a corpus, encoded once, as token shards of a training and of a held-out part."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .batches import held_out_documents, split_documents
from .corpora import Corpus, Document
from .shards import TokenShards, write_shards
from .sources import open_source
from .tokenizers import KINDS, Tokenizer, load_tokenizer, train_tokenizer

PARTS = ("train", "validation")
FEW = 10  # documents; of fewer the ends are held out


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
    if not 0.0 < config.validation_fraction < 1.0:
        raise ValueError(f"validation_fraction: got {config.validation_fraction}, expected a number between 0 and 1")
    if config.tokenizer in KINDS or not Path(config.tokenizer).exists():
        parts = (False, True) if config.tokenizer == "char" else (False,)  # every character can be encoded
        texts = (document.text for held_out in parts for document in _part(config, held_out))
        tokenizer = train_tokenizer(config.tokenizer, texts, config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    fresh = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        for name, held_out in zip(PARTS, (False, True)):
            write_shards(_part(config, held_out), tokenizer, fresh / name, shard_tokens=config.shard_tokens)
        os.rename(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return load_tokenized(out)


def _part(config: TokenizeConfig, held_out: bool) -> Iterator[Document]:
    """The documents of one part, streamed; as :func:`split_documents` where there are few."""
    source = iter(open_source(config.source, text_field=config.text_field))
    first = tuple(itertools.islice(source, FEW))
    if len(first) < FEW:
        yield from split_documents(Corpus(str(config.source), first), config.validation_fraction)[held_out]
        return
    for document, held in held_out_documents(itertools.chain(first, source), config.validation_fraction):
        if held is held_out:
            yield document


def is_tokenized(path: str | Path) -> bool:
    """Whether :func:`tokenize` wrote ``path``."""
    return Path(path, PARTS[0]).is_dir() and Path(path, PARTS[1]).is_dir()


def load_tokenized(path: str | Path, tokenizer: Tokenizer | None = None) -> TokenizedCorpus:
    """Opens what :func:`tokenize` wrote; with ``tokenizer``, ValueError if another one did."""
    train, validation = (TokenShards(Path(path, part), tokenizer) for part in PARTS)
    return TokenizedCorpus(Path(path).name, train, validation)
