"""Subword tokenizers: byte-pair encoding, WordPiece and unigram, learned and run by the ``tokenizers`` package.

* BPE (Sennrich et al. 2016, arXiv:1508.07909) over bytes, as GPT-2's: merges the most frequent pair again and again.
  Any text can be encoded and comes back the same.
* WordPiece (Devlin et al. 2018, arXiv:1810.04805), as BERT's: the longest piece first, ``##`` before those inside a
  word, text in lower case between [CLS] and [SEP].
* Unigram (Kudo 2018, arXiv:1804.10959), as T5's: the likeliest segmentation under a distribution over pieces, ``▁`` for
  a space, sentinels <extra_id_0>, <extra_id_1> … for span corruption at the end of the vocabulary. With byte fallback a
  character that was never seen becomes its UTF-8 bytes.

A directory holds ``tokenizer.json`` and ``tokenizer_config.json``, which ``transformers.AutoTokenizer`` reads as well;
``vocab.txt`` and ``vocab.json`` with ``merges.txt`` are read too.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require
from ..models.pretrained import replaced

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
VOCABULARY_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
WORDPIECE_FILE = "vocab.txt"
END_OF_TEXT = "<|endoftext|>"
# What a token is for, and the names it goes by in files that do not say.
ROLES = {
    "bos": ("<s>", END_OF_TEXT),
    "eos": ("</s>", END_OF_TEXT),
    "unk": ("<unk>", "[UNK]"),
    "pad": ("<pad>", "[PAD]"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}
BERT_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
T5_TOKENS = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}


class SubwordTokenizer:
    """What all three kinds share.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
        special_tokens: text of the token for each role of :data:`ROLES` that there is. None looks for the usual names.

    Attributes (ids, None where there is no such token): ``bos_token_id``, ``eos_token_id``, ``unk_token_id``,
    ``pad_token_id``, ``cls_token_id``, ``sep_token_id``, ``mask_token_id``.
    """

    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    pad_token_id: int | None
    cls_token_id: int | None
    sep_token_id: int | None
    mask_token_id: int | None

    def __init__(self, tokenizer: Any, special_tokens: dict[str, str] | None = None) -> None:
        self._tokenizer = tokenizer
        if special_tokens is None:
            found = {role: [n for n in names if tokenizer.token_to_id(n) is not None] for role, names in ROLES.items()}
            special_tokens = {role: names[0] for role, names in found.items() if names}
        self.special_tokens = special_tokens
        self.chat_template: str | None = None  # Jinja, from tokenizer_config.json
        for role in ROLES:
            token = special_tokens.get(role)
            index = None if token is None else tokenizer.token_to_id(token)
            if token is not None and index is None:
                raise ValueError(f"special_tokens: {role} is {token!r}, which is not in the vocabulary")
            setattr(self, f"{role}_token_id", index)

    @property
    def vocab_size(self) -> int:
        """Number of different tokens, special ones included."""
        return self._tokenizer.get_vocab_size()

    @property
    def all_special_ids(self) -> list[int]:
        """Tokens that stand for no text, sentinels included."""
        return sorted(i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)

    @property
    def sentinel_ids(self) -> list[int]:
        """Ids of <extra_id_0>, <extra_id_1> …; empty where there are none."""
        ids: list[int] = []
        while (index := self._tokenizer.token_to_id(f"<extra_id_{len(ids)}>")) is not None:
            ids.append(index)
        return ids

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of ``text``; with ``add_special_tokens`` between or before the tokens that the kind puts there."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encoding(
        self,
        text: str | Sequence[str],
        pair: str | None = None,
        *,
        max_length: int | None = None,
        pretokenized: bool = False,
    ) -> Any:
        """``text``, or two texts, between the kind's special tokens, with where each token comes from.

        Args:
            text: with ``pretokenized`` a sequence of words, which are read as they would be with spaces between them.
            max_length: tokens at most, special ones included; of two texts the longer one is cut first.

        Returns:
            The package's ``Encoding``: ``ids``, ``type_ids``, ``offsets`` (characters), ``word_ids``, ``sequence_ids``.
        """
        tokenizer = self._tokenizer
        if pretokenized and self._keeps_spaces:
            text = [f" {word}" if i else word for i, word in enumerate(text)]
        texts = [tokenizer.encode(text, is_pretokenized=pretokenized, add_special_tokens=False)]
        texts += [] if pair is None else [tokenizer.encode(pair, add_special_tokens=False)]
        if max_length is not None:
            room = max(max_length - self.special_tokens_added(len(texts)), 0)
            lengths = [len(t) for t in texts]
            while sum(lengths) > room:
                lengths[lengths.index(max(lengths))] -= 1
            for t, length in zip(texts, lengths):
                t.truncate(length)
        return tokenizer.post_process(*texts, add_special_tokens=True)

    def special_tokens_added(self, texts: int = 1) -> int:
        """How many special tokens stand around one text or two."""
        return self._tokenizer.num_special_tokens_to_add(texts == 2)

    @property
    def separates_texts(self) -> bool:
        """Whether a special token stands between two texts."""
        return self.special_tokens_added(2) > self.special_tokens_added(1)

    @functools.cached_property
    def _keeps_spaces(self) -> bool:
        """Whether the space before a word is the beginning of its first token, and has to be in the text."""
        steps = json.loads(self._tokenizer.to_str())["pre_tokenizer"] or {}
        steps = steps.get("pretokenizers", [steps])
        return any(step.get("type") == "ByteLevel" and not step["add_prefix_space"] for step in steps)

    def windows(self, text: str, pair: str, max_length: int, stride: int) -> list[Any]:
        """:meth:`encoding` of both, ``pair`` cut into windows that overlap by ``stride`` tokens.

        Raises:
            ValueError: ``text`` leaves no room for more than the overlap.
        """
        tokenizer = self._tokenizer
        first, second = (tokenizer.encode(t, add_special_tokens=False) for t in (text, pair))
        room = max_length - self.special_tokens_added(2) - len(first)
        if room <= stride:
            raise ValueError(
                f"max_length: {max_length} tokens, of which {text!r} leaves {max(room, 0)}; expected more than the "
                f"{stride} that windows overlap by"
            )
        second.truncate(room, stride)
        return [tokenizer.post_process(first, part, True) for part in (second, *second.overflowing)]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """:meth:`encode` of many texts, on all cores."""
        encode = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)  # without offsets
        return [e.ids for e in encode(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=skip_special_tokens)

    def word_starts(self) -> np.ndarray:
        """Which tokens begin a word: (vocab_size,) bool. Special tokens do."""
        pieces = {i: token for token, i in self._tokenizer.get_vocab().items()}
        model = json.loads(self._tokenizer.to_str())["model"]
        special = set(self.all_special_ids)
        starts = np.zeros(max(pieces) + 1, dtype=bool)
        for i, piece in pieces.items():
            if model["type"] == "WordPiece":
                starts[i] = not piece.startswith(model["continuing_subword_prefix"])
            else:  # a space comes first, as Ġ or ▁; or something that is no letter, such as a comma or a line's end (Ċ)
                starts[i] = piece[:1] in ("Ġ", "Ċ", "▁") or not piece[:1].isalnum()
            starts[i] |= i in special
        return starts

    def serialized(self) -> str:
        """The contents of ``tokenizer.json``, without what only calls change (truncation, padding)."""
        # Reading a file moves the last digits of the scores in it.
        content = json.loads(self._tokenizer.to_str(), parse_float=lambda digits: float(f"{float(digits):.6g}"))
        content["truncation"] = content["padding"] = None
        return json.dumps(content, ensure_ascii=False, sort_keys=True)

    def save(self, directory: str | Path) -> Path:
        """Writes ``tokenizer.json`` and ``tokenizer_config.json``, each whole or not at all; returns the former."""
        path = Path(directory, TOKENIZER_FILE)
        with replaced(path) as temporary:
            self._tokenizer.save(str(temporary))
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config.update({f"{role}_token": token for role, token in self.special_tokens.items()})
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        with replaced(Path(directory, CONFIG_FILE)) as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> SubwordTokenizer:
        """Reads a directory (tokenizer.json; or vocab.txt; or vocab.json and merges.txt), or a tokenizer.json.

        Raises:
            FileNotFoundError: none of them is there.
            ValueError: a file that is not what its name says; the message names it.
        """
        path = Path(path)
        directory = path if path.is_dir() else path.parent
        file = directory / TOKENIZER_FILE if path.is_dir() else path
        config = _read_json(directory / CONFIG_FILE) if (directory / CONFIG_FILE).is_file() else {}
        if file.is_file() and file.name != WORDPIECE_FILE:
            try:
                tokenizer = _tokenizers().Tokenizer.from_file(str(file))
            except Exception as error:  # the package raises Exception itself
                raise ValueError(f"{file} is not a tokenizer: {error}") from error
            # Some files were saved with the batching of a fine-tuned model, and would cut every text short.
            tokenizer.no_truncation()
            tokenizer.no_padding()
        elif (directory / WORDPIECE_FILE).is_file():
            tokenizer = _wordpiece_from(directory / WORDPIECE_FILE, config.get("do_lower_case", True))
        else:
            pairs = [(directory / a, directory / b) for a, b in VOCABULARY_FILES]
            pair = next((p for p in pairs if p[0].is_file() and p[1].is_file()), None)
            if pair is None:
                raise FileNotFoundError(f"no tokenizer in {path}: looked for {', '.join(LOOKED_FOR)}")
            tokenizer = _bpe_from(*pair)
        given = {role: config.get(f"{role}_token") for role in ROLES}
        named = {role: t["content"] if isinstance(t, dict) else t for role, t in given.items() if t}
        loaded = cls(tokenizer, named or None)
        template = config.get("chat_template")
        if (directory / TEMPLATE_FILE).is_file():
            template = (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
        if isinstance(template, list):  # several, by name
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        loaded.chat_template = template
        return loaded


LOOKED_FOR = (TOKENIZER_FILE, WORDPIECE_FILE, *(" with ".join(pair) for pair in VOCABULARY_FILES))


class BPETokenizer(SubwordTokenizer):
    """Byte-level byte-pair encoding; any text can be encoded, and decoding gives the same text back."""

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int = 1024, special_tokens: Sequence[str] = ()
    ) -> SubwordTokenizer:
        """Learns merges from ``texts`` until there are ``vocab_size`` tokens.

        Args:
            texts: read once, as a stream.
            vocab_size: 256 bytes, the end of text and ``special_tokens`` included.
            special_tokens: further tokens that stand for no text; looked for under the names of :data:`ROLES`.

        Raises:
            ValueError: ``vocab_size`` is less than those.
        """
        fixed = [END_OF_TEXT, *special_tokens]
        if vocab_size < 256 + len(fixed):
            raise ValueError(
                f"vocab_size: got {vocab_size}, expected at least {256 + len(fixed)} (256 bytes and {', '.join(fixed)})"
            )
        tokenizers = _tokenizers()
        tokenizer = _byte_level(tokenizers, tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=fixed,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_some(texts), trainer)
        return cls(tokenizer)


def train_wordpiece(
    texts: Iterable[str], vocab_size: int = 8192, *, lowercase: bool = True, special_tokens: Sequence[str] = ()
) -> SubwordTokenizer:
    """A WordPiece tokenizer with BERT's special tokens, [PAD] [UNK] [CLS] [SEP] [MASK], as ids 0 to 4.

    Args:
        texts: read once, as a stream.
        vocab_size: of all tokens; every character of ``texts`` is one, with and without ``##``, even if that is more.
        lowercase: everything in lower case and without accents, as bert-base-uncased.
        special_tokens: further tokens, after BERT's.
    """
    tokenizers = _tokenizers()
    tokenizer = _bert(tokenizers, tokenizers.models.WordPiece(unk_token=BERT_TOKENS["unk"]), lowercase)
    fixed = [*BERT_TOKENS.values(), *special_tokens]
    _check_size(vocab_size, len(fixed) + 1)
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False)
    tokenizer.train_from_iterator(_some(texts), trainer)
    _between_cls_and_sep(tokenizers, tokenizer)
    return SubwordTokenizer(tokenizer, BERT_TOKENS)


def train_unigram(
    texts: Iterable[str],
    vocab_size: int = 8192,
    *,
    sentinels: int = 100,
    byte_fallback: bool = True,
    special_tokens: Sequence[str] = (),
) -> SubwordTokenizer:
    """A unigram tokenizer with T5's special tokens: <pad>, </s>, <unk> as ids 0 to 2, the sentinels at the end.

    Text is normalised by NFKC, and runs of white space are one space. Encoding with special tokens ends with </s>.

    Args:
        texts: read once, as a stream.
        vocab_size: of all tokens, at most.
        sentinels: how many of <extra_id_0> …; the first has the largest id, as in T5.
        byte_fallback: 256 of the tokens are bytes, for characters that were never seen; else those are <unk>.
        special_tokens: further tokens, after T5's.
    """
    tokenizers = _tokenizers()
    fixed = [*T5_TOKENS.values(), *special_tokens]
    pieces = vocab_size - sentinels - 256 * byte_fallback
    _check_size(vocab_size, vocab_size - pieces + len(fixed) + 1)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    one_space = tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    strip = tokenizers.normalizers.Strip(left=False)
    tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.NFKC(), one_space, strip])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=pieces, special_tokens=fixed, unk_token=T5_TOKENS["unk"], show_progress=False
    )
    tokenizer.train_from_iterator(_some(texts), trainer)
    decoder = tokenizers.decoders.Metaspace()
    if byte_fallback:
        vocabulary = [tuple(entry) for entry in json.loads(tokenizer.to_str())["model"]["vocab"]]
        least = min(score for _, score in vocabulary)
        vocabulary += [(f"<0x{byte:02X}>", least - 10.0) for byte in range(256)]
        tokenizer.model = tokenizers.models.Unigram(vocabulary, fixed.index(T5_TOKENS["unk"]), True)
        decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), decoder])
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(sentinels))])
    end = T5_TOKENS["eos"]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    return SubwordTokenizer(tokenizer, T5_TOKENS)


def _byte_level(tokenizers: Any, model: Any) -> Any:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _bert(tokenizers: Any, model: Any, lowercase: bool) -> Any:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer


def _between_cls_and_sep(tokenizers: Any, tokenizer: Any) -> None:
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )


def _wordpiece_from(file: Path, lowercase: bool) -> Any:
    tokenizers = _tokenizers()
    pieces = file.read_text(encoding="utf-8").splitlines()
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    missing = [token for token in BERT_TOKENS.values() if token not in vocabulary]
    if missing:
        raise ValueError(f"{file} is not a WordPiece vocabulary: it has no {', '.join(missing)}")
    tokenizer = _bert(tokenizers, tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"), lowercase)
    tokenizer.add_special_tokens(list(BERT_TOKENS.values()))
    _between_cls_and_sep(tokenizers, tokenizer)
    return tokenizer


def _bpe_from(vocabulary: Path, merges: Path) -> Any:
    tokenizers = _tokenizers()
    tokens = _read_json(vocabulary)
    lines = merges.read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    try:
        model = tokenizers.models.BPE(tokens, pairs)
    except Exception as error:
        raise ValueError(f"{vocabulary} and {merges.name} do not belong together: {error}") from error
    tokenizer = _byte_level(tokenizers, model)
    if END_OF_TEXT in tokens:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def _check_size(vocab_size: int, least: int) -> None:
    if vocab_size < least:
        raise ValueError(f"vocab_size: got {vocab_size}, expected at least {least} for the tokens that are fixed")


def _some(texts: Iterable[str]) -> Iterator[str]:
    """``texts``, of which at least one must not be empty."""
    if isinstance(texts, str):
        raise TypeError("texts: got one string, expected several")
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise ValueError("texts: there is no text to learn from")


def _tokenizers() -> Any:
    for part in ("decoders", "models", "normalizers", "pre_tokenizers", "processors", "trainers"):
        require(f"tokenizers.{part}", "a subword tokenizer")
    return require("tokenizers", "a subword tokenizer")
