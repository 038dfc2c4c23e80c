"""``fastformer tokenize``: a corpus, encoded once, as token shards of a training and of a held-out part."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from .batches import split_documents
from .corpora import load_corpus
from .shards import TokenShards, write_shards
from .tokenizers import KINDS, Tokenizer, load_tokenizer, train_tokenizer

PARTS = ("train", "validation")


@dataclass(frozen=True)
class TokenizeConfig:
    """Encode text into token shards, which `fastformer pretrain --data.path` reads."""

    source: str = "shakespeare"
    """A text file, a directory of text files, or the name of a built-in corpus: shakespeare, python."""
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
    corpus = load_corpus(config.source)
    parts = split_documents(corpus, config.validation_fraction)
    if config.tokenizer in KINDS or not Path(config.tokenizer).exists():
        documents = corpus.documents if config.tokenizer == "char" else parts[0]  # every character can be encoded
        tokenizer = train_tokenizer(config.tokenizer, [d.text for d in documents], config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    fresh = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        for name, documents in zip(PARTS, parts):
            write_shards(documents, tokenizer, fresh / name, shard_tokens=config.shard_tokens)
        os.rename(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return load_tokenized(out)


def is_tokenized(path: str | Path) -> bool:
    """Whether :func:`tokenize` wrote ``path``."""
    return Path(path, PARTS[0]).is_dir() and Path(path, PARTS[1]).is_dir()


def load_tokenized(path: str | Path, tokenizer: Tokenizer | None = None) -> TokenizedCorpus:
    """Opens what :func:`tokenize` wrote; with ``tokenizer``, ValueError if another one did."""
    train, validation = (TokenShards(Path(path, part), tokenizer) for part in PARTS)
    return TokenizedCorpus(Path(path).name, train, validation)
