"""Text to integers and back.

Every tokenizer has the same small surface (:class:`Tokenizer`): ``vocab_size``, ``eos_token_id``, ``encode``,
``decode``, ``save(directory)``. :func:`load_tokenizer` reads whichever one a directory holds, so a checkpoint carries
its tokenizer beside its weights.

* :class:`CharTokenizer`: one token per character, no training, no dependency: what a small model learns words from in
  minutes.
* :class:`~.subword.SubwordTokenizer`: byte-pair encoding as GPT-2's, WordPiece as BERT's, unigram as T5's, in
  subword.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from .subword import LOOKED_FOR, BPETokenizer, SubwordTokenizer, train_unigram, train_wordpiece

CHARACTERS_FILE = "characters.json"
KINDS = ("char", "bpe", "wordpiece", "unigram")


@runtime_checkable
class Tokenizer(Protocol):
    """What training and generation need from a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens; ids are 0 … vocab_size - 1."""

    @property
    def eos_token_id(self) -> int | None:
        """Token that ends a document, or None where there is none."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids."""

    def save(self, directory: str | Path) -> Path:
        """Writes the tokenizer into ``directory`` and returns the file."""


class CharTokenizer:
    """One token per character.

    Args:
        characters: the vocabulary, in the order of the ids; no character twice.
        unknown: a character of the vocabulary that stands in for any other; None makes an unknown character an error.

    Raises:
        ValueError: empty or repeated characters, or ``unknown`` outside the vocabulary.
    """

    eos_token_id = None
    pad_token_id = None

    def __init__(self, characters: Sequence[str], unknown: str | None = None) -> None:
        self.characters = tuple(characters)
        self._ids = {character: index for index, character in enumerate(self.characters)}
        if not self.characters or len(self._ids) != len(self.characters):
            raise ValueError(f"characters: expected different characters, at least one; got {len(self.characters)}")
        if any(len(character) != 1 for character in self.characters):
            raise ValueError("characters: every entry must be a single character")
        if unknown is not None and unknown not in self._ids:
            raise ValueError(f"unknown: {unknown!r} is not one of the {len(self.characters)} characters")
        self.unknown = unknown

    @classmethod
    def from_text(cls, text: str, unknown: str | None = None) -> CharTokenizer:
        """The vocabulary of ``text``, sorted."""
        return cls(sorted(set(text)), unknown)

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Ids of the characters; ValueError names the first character outside the vocabulary and where it stands."""
        ids = self._ids
        try:
            return [ids[character] for character in text]
        except KeyError as error:
            if self.unknown is not None:
                substitute = ids[self.unknown]
                return [ids.get(character, substitute) for character in text]
            character = error.args[0]
            raise ValueError(
                f"text: character {character!r} (U+{ord(character):04X}) at position {text.index(character)} is not in "
                f"the tokenizer's {self.vocab_size} characters: {''.join(self.characters)!r}"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        characters = self.characters
        return "".join([characters[index] for index in ids])

    def save(self, directory: str | Path) -> Path:
        path = Path(directory, CHARACTERS_FILE)
        content = {"kind": "char", "characters": list(self.characters), "unknown": self.unknown}
        path.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> CharTokenizer:
        """Reads what :meth:`save` wrote (the file, or the directory it is in)."""
        path = Path(path)
        path = path / CHARACTERS_FILE if path.is_dir() else path
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("kind") != "char" or "characters" not in content:
            raise ValueError(f"{path} is not a character tokenizer")
        return cls(content["characters"], content.get("unknown"))


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what decides the ids: two tokenizers that share it encode alike.

    Args:
        tokenizer: one of this module, or of ``transformers`` or ``tokenizers``.
    """
    if isinstance(tokenizer, CharTokenizer):
        content = json.dumps([tokenizer.characters, tokenizer.unknown], ensure_ascii=False)
    else:
        tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)  # transformers'
        if not isinstance(tokenizer, SubwordTokenizer):
            tokenizer = SubwordTokenizer(tokenizer, {})
        content = tokenizer.serialized()
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int = 1024, **options: Any) -> Tokenizer:
    """A new tokenizer for ``texts``.

    Args:
        kind: ``"char"``, ``"bpe"``, ``"wordpiece"`` or ``"unigram"``.
        texts: one string a document.
        vocab_size: number of tokens; characters need none.
        options: more of :meth:`BPETokenizer.train`, :func:`train_wordpiece` or :func:`train_unigram`.
    """
    if kind == "char":
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return CharTokenizer(sorted(characters))
    if kind not in KINDS:
        raise ValueError(f"tokenizer: got {kind!r}, expected one of {', '.join(KINDS)}, or a directory that holds one")
    train = {"bpe": BPETokenizer.train, "wordpiece": train_wordpiece, "unigram": train_unigram}[kind]
    return train(texts, vocab_size, **options)


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Ids of ``text`` by a tokenizer of this package, of ``tokenizers`` or of ``transformers``."""
    if isinstance(tokenizer, SubwordTokenizer) or hasattr(tokenizer, "save_pretrained"):
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    ids = tokenizer.encode(text)  # one that knows no special tokens, or tokenizers' own
    return list(ids) if isinstance(ids, list) else tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def check_tokenizer(model: Any, tokenizer: Any) -> None:
    """Raises ValueError where the vocabularies of model and tokenizer cannot belong together.

    A model may have a few rows more than there are tokens, to round its table up.
    """
    rows = getattr(model.config, "vocab_size", None)
    size = getattr(tokenizer, "vocab_size", None)
    if callable(getattr(tokenizer, "get_vocab_size", None)):
        size = tokenizer.get_vocab_size()
    elif hasattr(tokenizer, "__len__"):
        size = len(tokenizer)  # transformers' vocab_size leaves out added tokens
    if rows is None or size is None or (size <= rows and rows - size < max(1024, rows // 10)):
        return
    raise ValueError(
        f"tokenizer: has {size} tokens, but the model's table has {rows} (vocab_size); it is another model's tokenizer"
    )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer saved in a directory (such as a checkpoint), or in a file, whichever kind it is.

    Raises:
        FileNotFoundError: there is none; the message names the files looked for.
    """
    path = Path(path)
    if path.name == CHARACTERS_FILE or (path / CHARACTERS_FILE).is_file():
        return CharTokenizer.load(path)
    if not path.exists() or (path.is_dir() and not any((path / name.split(" ")[0]).is_file() for name in LOOKED_FOR)):
        raise FileNotFoundError(f"no tokenizer in {path}: looked for {', '.join((CHARACTERS_FILE, *LOOKED_FOR))}")
    return SubwordTokenizer.load(path)


class IncrementalDecoder:
    """Text of a growing sequence of tokens, piece by piece.

    A byte-level token may end inside a UTF-8 character; such bytes are held back until the character is whole. New
    tokens are decoded behind the piece before them, since many tokenizers drop the space of a token that comes first.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens of the last piece
        self._pending: list[int] = []  # tokens after it

    def push(self, ids: Iterable[int]) -> str:
        """The text that ``ids`` add to what was returned before."""
        self._pending.extend(int(index) for index in ids)
        text = self._tokenizer.decode(self._context + self._pending)
        return "" if text.endswith("\ufffd") else self._take(text)

    def flush(self) -> str:
        """What is still held back; the next token begins a new text."""
        new = self._take(self._tokenizer.decode(self._context + self._pending))
        self._context, self._pending = [], []
        return new

    def _take(self, text: str) -> str:
        new = text[len(self._tokenizer.decode(self._context)) :]
        if new:  # special tokens may have no text: they are no context
            self._context, self._pending = self._pending, []
        return new
