"""From samples to a batch: padding, packing, and the corruptions that language models learn to undo.

    CausalLM         ids as they are; the model shifts
    PackedCausalLM   documents laid end to end in one row, each apart from the others
    MaskedLM         15% of the tokens, or words, to find again (Devlin et al. 2018, arXiv:1810.04805, §3.1)
    SpanCorruption   spans behind sentinels, to be written out (Raffel et al. 2020, arXiv:1910.10683, §3.1.4)
    TokenDeletion    tokens left out, the whole to be written (Lewis et al. 2020, arXiv:1910.13461, §2.2)
    Seq2Seq          pairs of input_ids and labels
    Classification   texts with a label, or with one per token

A collator is called with a list of samples and a key for each, ``collator(samples, keys)``, and returns what a model
is called with. What is drawn depends on the key alone (:mod:`.draws`), not on the batch a sample is in: masks are new
in every epoch and the same in a run that resumes. Without keys they are new at every call, from numpy's generator.
A sample is a sequence of ids, or a mapping that has one as ``input_ids``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .batches import Batch
from .draws import as_uniform, uniforms, words, words_at

IGNORED = -100
CHOICE, FATE, TOKEN = 0, 1, 2  # streams of draws
Keys = np.ndarray | None


def pad_rows(rows: Sequence[Any], value: int, multiple_of: int = 1) -> np.ndarray:
    """``(B, S)`` int64: the rows, then ``value``; S is the longest row's length, rounded up to ``multiple_of``."""
    longest = max((len(row) for row in rows), default=0)
    padded = np.full((len(rows), -(-longest // multiple_of) * multiple_of), value, dtype=np.int64)
    for place, row in zip(padded, rows):
        place[: len(row)] = row
    return padded


def _ids(samples: Sequence[Any], name: str = "input_ids") -> list[Any]:
    if not len(samples):
        raise ValueError("samples: a batch needs at least one")
    rows = [sample[name] if isinstance(sample, Mapping) else sample for sample in samples]
    return [np.asarray(row) if isinstance(row, torch.Tensor) else row for row in rows]


def _real(rows: Sequence[Any], width: int) -> np.ndarray:
    """``(B, S)`` bool, False at padding."""
    return np.arange(width) < np.array([len(row) for row in rows])[:, None]


def _batch(real: np.ndarray, **arrays: np.ndarray) -> Batch:
    """Tensors, with an attention_mask if some positions are padding."""
    if not real.all():
        arrays["attention_mask"] = real.astype(np.int64)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _keys(keys: Keys, count: int) -> np.ndarray:
    if keys is None:
        return np.random.randint(0, 2**63, count, dtype=np.uint64)
    if len(keys) != count:
        raise ValueError(f"keys: {len(keys)} for {count} samples")
    return keys


@dataclass(frozen=True)
class CausalLM:
    """Rows of ids with padding at the end; every token after the first is scored.

    Args:
        pad_token_id: fills short rows; any token will do, since it is neither seen nor scored.
        multiple_of: the width is one of this number.
    """

    pad_token_id: int = 0
    multiple_of: int = 1

    def __call__(self, samples: Sequence[Any], keys: Keys = None) -> Batch:
        """``input_ids``, ``labels`` (B, S), ``attention_mask`` where there is padding. A mapping may have its own
        ``labels``, as long as its ids, -100 where a token is not scored (the prompt of an instruction)."""
        rows = _ids(samples)
        ids = pad_rows(rows, self.pad_token_id, self.multiple_of)
        real = _real(rows, ids.shape[1])
        if isinstance(samples[0], Mapping) and "labels" in samples[0]:
            labels = pad_rows(_ids(samples, "labels"), IGNORED, self.multiple_of)
            if labels.shape != ids.shape:
                raise ValueError(f"labels: up to {labels.shape[1]} beside {ids.shape[1]} input_ids; expected as many")
        else:
            labels = np.where(real, ids, IGNORED)
        return _batch(real, input_ids=ids, labels=labels)


@dataclass(frozen=True)
class PackedCausalLM:
    """Documents end to end in one row, under the argument names of ``transformers``' flash attention.

    A sample is a document, or a list of documents such as a row of :class:`.packing.PackedRows`.
    """

    def __call__(self, samples: Sequence[Any], keys: Keys = None) -> Batch:
        """``input_ids``, ``labels``, ``position_ids`` (1, total), ``cu_seq_lens_q``, ``cu_seq_lens_k`` (documents + 1)
        int32 (one tensor), ``max_length_q``, ``max_length_k``. The first token of a document is not scored."""
        documents = [np.asarray(d) for sample in _ids(samples) for d in _documents(sample) if len(d)]
        if not documents:
            raise ValueError("samples: hold no tokens")
        lengths = np.array([len(d) for d in documents])
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.concatenate(documents).astype(np.int64)
        labels = ids.copy()
        labels[bounds[:-1]] = IGNORED
        positions = np.arange(len(ids)) - np.repeat(bounds[:-1], lengths)
        cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
        arrays = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {
            **{name: torch.from_numpy(array)[None] for name, array in arrays.items()},
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": int(lengths.max()),
            "max_length_k": int(lengths.max()),
        }


def _documents(sample: Any) -> Sequence[Any]:
    """The documents of a row; a single document is one."""
    nested = isinstance(sample, (list, tuple)) and len(sample) and not isinstance(sample[0], (int, np.integer))
    return sample if nested else [sample]


@dataclass(frozen=True)
class MaskedLM:
    """Dynamic masking: of the tokens chosen 80% become [MASK], 10% a random token, 10% stay; only they are scored.

    Args:
        mask_token_id: of [MASK].
        vocab_size: random tokens are below it.
        pad_token_id: fills short rows.
        special_ids: tokens that are never chosen, such as [CLS] and [SEP].
        word_starts: ``(vocab_size,)`` bool, from the tokenizer; whole words are chosen then, each of their tokens
            meeting its own fate. None chooses tokens.
        probability: of each token or word to be chosen, independently.
        masked, random: shares of the chosen that are replaced by [MASK] and by a random token.
        multiple_of: the width is one of this number.
    """

    mask_token_id: int
    vocab_size: int
    pad_token_id: int = 0
    special_ids: Sequence[int] = ()
    word_starts: np.ndarray | None = None
    probability: float = 0.15
    masked: float = 0.8
    random: float = 0.1
    multiple_of: int = 1

    def __post_init__(self) -> None:
        _probability("probability", self.probability)
        _probability("masked", self.masked)
        _probability("random", self.random)
        if self.masked + self.random > 1:
            raise ValueError(f"random: {self.random} and masked {self.masked} are more than 1")
        ordinary = np.ones(self.vocab_size, dtype=bool)
        ordinary[np.asarray([*self.special_ids, self.mask_token_id], dtype=np.int64)] = False
        object.__setattr__(self, "_ordinary", ordinary)

    @classmethod
    def for_tokenizer(cls, tokenizer: Any, *, whole_words: bool = False, **options: Any) -> MaskedLM:
        """For a :class:`SubwordTokenizer` that has a mask token."""
        if tokenizer.mask_token_id is None:
            raise ValueError("tokenizer: has no mask token")
        return cls(
            tokenizer.mask_token_id,
            tokenizer.vocab_size,
            pad_token_id=tokenizer.pad_token_id or 0,
            special_ids=tokenizer.all_special_ids,
            word_starts=tokenizer.word_starts() if whole_words else None,
            **options,
        )

    def __call__(self, samples: Sequence[Any], keys: Keys = None) -> Batch:
        """``input_ids``, ``labels`` (B, S), ``attention_mask`` where there is padding."""
        rows = _ids(samples)
        ids = pad_rows(rows, self.pad_token_id, self.multiple_of)
        real = _real(rows, ids.shape[1])
        keys = _keys(keys, len(rows))
        chances = uniforms(keys, ids.shape[1], CHOICE)
        if self.word_starts is not None:
            begins = self.word_starts[ids]
            begins[:, 0] = True
            chances = np.take_along_axis(chances, begins.cumsum(1) - 1, axis=1)  # one for each word
        chosen = chances < self.probability
        chosen &= real
        chosen &= self._ordinary[ids]  # type: ignore[attr-defined]
        labels = np.where(chosen, ids, IGNORED)
        # The rest is about few tokens, so about them alone.
        at = np.nonzero(chosen)
        fate = as_uniform(words_at(keys[at[0]], at[1], FATE))
        tokens = (words_at(keys[at[0]], at[1], TOKEN) % np.uint64(self.vocab_size)).astype(np.int64)
        tokens = np.where(fate < self.masked + self.random, tokens, ids[at])
        ids[at] = np.where(fate < self.masked, self.mask_token_id, tokens)
        return _batch(real, input_ids=ids, labels=labels)


def noise_mask(length: int, density: float, mean_span: float, keys: np.ndarray) -> np.ndarray:
    """T5's random spans for samples of one length: ``(B, length)`` bool, True = corrupted, for keys ``(B,)``.

    round(length density) tokens are noise, in round(noise / mean_span) spans. Both the noise and the rest are divided
    into that many parts, each division equally likely, and the parts alternate, the rest first.
    """
    if length < 2:
        return np.zeros((len(keys), length), dtype=bool)
    noise, spans = _noise(length, density, mean_span)
    draws = words(keys, length - 2, CHOICE)
    parts = np.empty((len(keys), 2 * spans), dtype=np.int64)
    parts[:, 0::2] = _divide(length - noise, spans, draws[:, noise - 1 :])
    parts[:, 1::2] = _divide(noise, spans, draws[:, : noise - 1])
    edges = np.zeros((len(keys), length), dtype=bool)
    np.put_along_axis(edges, parts.cumsum(1)[:, :-1], True, axis=1)
    return np.logical_xor.accumulate(edges, axis=1)


def _noise(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """How many tokens are noise, in how many spans."""
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean_span), 1), noise, length - noise)


def _divide(items: int, parts: int, draws: np.ndarray) -> np.ndarray:
    """Sizes ``(B, parts)``, at least 1 each, that add up to ``items``: the cuts are where ``draws (B, items - 1)`` are
    least."""
    if parts == 1:
        return np.full((len(draws), 1), items)
    cuts = np.sort(np.argpartition(draws, parts - 2, axis=1)[:, : parts - 1], axis=1) + 1
    return np.diff(cuts, axis=1, prepend=0, append=items)


def span_corruption_lengths(input_length: int, density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """How many tokens to corrupt for inputs of exactly ``input_length``, sentinels and end included, and how many
    the targets then are."""
    if input_length < 4:
        raise ValueError(f"input_length: got {input_length}, expected at least 4")

    def lengths(tokens: int) -> tuple[int, int]:
        noise, spans = _noise(tokens, density, mean_span)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = input_length
    while lengths(tokens + 1)[0] <= input_length:
        tokens += 1
    while lengths(tokens)[0] > input_length:
        tokens -= 1
    return tokens, lengths(tokens)[1]


@dataclass(frozen=True)
class SpanCorruption:
    """Each span of noise becomes a sentinel in the input; the target is every sentinel followed by what it hides.

    Args:
        sentinel_ids: <extra_id_0>, <extra_id_1> … (``tokenizer.sentinel_ids``), at least as many as spans.
        eos_token_id: ends inputs and targets; None for neither.
        pad_token_id: fills short rows.
        density: share of the tokens that are noise.
        mean_span: their mean length.
    """

    sentinel_ids: Sequence[int]
    eos_token_id: int | None = 1
    pad_token_id: int = 0
    density: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        _probability("density", self.density)
        if self.mean_span < 1:
            raise ValueError(f"mean_span: got {self.mean_span}, expected at least 1")
        if not len(self.sentinel_ids):
            raise ValueError("sentinel_ids: this tokenizer has none; train it with sentinels")
        object.__setattr__(self, "_sentinels", np.asarray(self.sentinel_ids, dtype=np.int64))

    def __call__(self, samples: Sequence[Any], keys: Keys = None) -> Batch:
        """``input_ids`` (B, S), ``labels`` (B, T), ``attention_mask`` where there is padding."""
        rows = [np.asarray(row, dtype=np.int64) for row in _ids(samples)]
        keys = _keys(keys, len(rows))
        inputs: list[Any] = [None] * len(rows)
        labels: list[Any] = [None] * len(rows)
        lengths = np.array([len(row) for row in rows])
        for length in np.unique(lengths):  # whose rows have as much noise, and so are one array
            same = np.flatnonzero(lengths == length)
            texts = np.stack([rows[i] for i in same])
            noise = noise_mask(int(length), self.density, self.mean_span, keys[same])
            for found, hidden in ((inputs, noise), (labels, ~noise)):
                for i, row in zip(same, self._behind_sentinels(texts, hidden)):
                    found[i] = row
        ids = pad_rows(inputs, self.pad_token_id)
        return _batch(_real(inputs, ids.shape[1]), input_ids=ids, labels=pad_rows(labels, IGNORED))

    def _behind_sentinels(self, texts: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """``texts (B, S)`` with one sentinel for each run of ``hidden``, of which all rows have as many."""
        begins = hidden.copy()
        begins[:, 1:] &= ~hidden[:, :-1]
        spans = int(begins[0].sum())
        sentinels = self._sentinels  # type: ignore[attr-defined]
        if spans > len(sentinels):
            raise ValueError(f"sentinel_ids: {len(sentinels)} for {spans} spans in a sample of {texts.shape[1]} tokens")
        texts = texts.copy()
        texts[begins] = np.tile(sentinels[:spans], len(texts))
        texts = texts[begins | ~hidden].reshape(len(texts), -1)
        return (
            texts if self.eos_token_id is None else np.pad(texts, ((0, 0), (0, 1)), constant_values=self.eos_token_id)
        )


@dataclass(frozen=True)
class TokenDeletion:
    """Denoising: tokens are left out at random, and the model writes the whole text; it has to find out where.

    Args:
        probability: of each token to be left out, independently; one token at least stays.
        pad_token_id: fills short rows.
        special_ids: tokens that always stay, such as the one that ends a text.
    """

    probability: float = 0.15
    pad_token_id: int = 0
    special_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        _probability("probability", self.probability)

    def __call__(self, samples: Sequence[Any], keys: Keys = None) -> Batch:
        """``input_ids`` (B, S), ``labels`` (B, T), ``attention_mask`` where there is padding."""
        rows = [np.asarray(row, dtype=np.int64) for row in _ids(samples)]
        chances = uniforms(_keys(keys, len(rows)), max(len(row) for row in rows), CHOICE)
        inputs = []
        for row, chance in zip(rows, chances):
            chance = chance[: len(row)]
            stays = chance >= self.probability
            if self.special_ids:
                stays |= np.isin(row, self.special_ids)
            if len(row) and not stays.any():
                stays[chance.argmax()] = True
            inputs.append(row[stays])
        ids = pad_rows(inputs, self.pad_token_id)
        return _batch(_real(inputs, ids.shape[1]), input_ids=ids, labels=pad_rows(rows, IGNORED))


@dataclass(frozen=True)
class Seq2Seq:
    """Pairs: mappings with ``input_ids`` and ``labels``, each of its own length. T5 shifts the labels itself."""

    pad_token_id: int = 0

    def __call__(self, samples: Sequence[Mapping[str, Any]], keys: Keys = None) -> Batch:
        """``input_ids`` (B, S), ``labels`` (B, T), ``attention_mask`` where there is padding."""
        rows = _ids(samples)
        ids = pad_rows(rows, self.pad_token_id)
        return _batch(_real(rows, ids.shape[1]), input_ids=ids, labels=pad_rows(_ids(samples, "labels"), IGNORED))


@dataclass(frozen=True)
class Classification:
    """Mappings with ``input_ids``, ``labels``, and ``token_type_ids`` if the model has segments.

    Args:
        pad_token_id: fills short rows.
        per_token: labels are one per token, -100 where none; else a number (or a row of numbers) per text.
    """

    pad_token_id: int = 0
    per_token: bool = False

    def __call__(self, samples: Sequence[Mapping[str, Any]], keys: Keys = None) -> Batch:
        """``input_ids``, ``token_type_ids`` (B, S), ``labels`` (B,) or (B, S), ``attention_mask`` where there is
        padding."""
        rows = _ids(samples)
        arrays = {"input_ids": pad_rows(rows, self.pad_token_id)}
        if "token_type_ids" in samples[0]:
            arrays["token_type_ids"] = pad_rows(_ids(samples, "token_type_ids"), 0)
        if "labels" in samples[0]:
            labels = [sample["labels"] for sample in samples]
            arrays["labels"] = pad_rows(labels, IGNORED) if self.per_token else np.asarray(labels)
            if arrays["labels"].dtype == np.float64:
                arrays["labels"] = arrays["labels"].astype(np.float32)
        return _batch(_real(rows, arrays["input_ids"].shape[1]), **arrays)


def _probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: got {value}, expected a number in [0, 1]")
