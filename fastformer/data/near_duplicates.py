"""Documents that say nearly the same, found in one pass over a stream.

Two documents are as alike as their sets of shingles, runs of five words, overlap: Jaccard J(A, B) = |A ∩ B| / |A ∪ B|.
A MinHash signature of n slots keeps for each slot the least of a document's shingles under that slot's hash, and two
signatures agree in a slot with probability J (Broder, "On the resemblance and containment of documents", 1997). The
fraction of slots that agree therefore estimates J with a standard deviation of √(J (1 - J) / n), from n × 4 bytes
however long the document is. Locality-sensitive hashing spares the comparison with all earlier documents: signatures
are cut into b bands of r slots, and only documents that have a whole band in common are compared, a pair at similarity
s with probability 1 - (1 - sʳ)ᵇ (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3).

Fast because no Python object is made for a word: a batch of documents is one array of bytes, in which words are
found and hashed as polynomials by a few array operations, and shingles are sums of five word hashes. The package
``rensa`` turns them into signatures (fast similarity sketching, Dahlgaard et al. 2017: a shingle is hashed about once,
not once for each slot).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..extras import require

UNITS = ("word", "character")
PIECE = 1 << 17  # characters hashed at once, so that the arrays stay in cache; longer documents are hashed in pieces
FOUND_AT_THRESHOLD = 0.99  # the chance that a pair exactly at the threshold is compared at all
_ODD = np.random.default_rng(2**31 - 1).integers(1, 2**63, size=512, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SHINGLE_WEIGHTS, _BAND_WEIGHTS = _ODD[:256], _ODD[256:]
# ASCII letters become lower case, and what is neither letter nor digit 0; other bytes of UTF-8 stay as they are.
_LETTERS = bytes(byte if byte > 127 else ord(chr(byte).lower()) if chr(byte).isalnum() else 0 for byte in range(256))
# First two bytes in UTF-8 of U+2000–207F, U+3000–303F and U+FF00–FF3F: punctuation, which takes three.
_PUNCTUATION = (0xE280, 0xE281, 0xE380, 0xEFBC)


class Repeat(NamedTuple):
    """A document that repeats an earlier one.

    Attributes:
        of: number of the earlier document, counted from 0 in the order in which they were added.
        similarity: the Jaccard similarity of their shingles; an estimate, or exact where candidates are verified.
    """

    of: int
    similarity: float


class NearDuplicates:
    """Says of each document which earlier one it repeats.

    Only documents that repeat nothing are remembered, and compared with: of three that are alike the first is kept.
    A remembered document takes ``num_hashes * 4`` bytes of signature and about 130 bytes for each band; with ``verify``
    8 bytes for each of its different shingles besides. The same documents in the same order give the same answer.

    Args:
        threshold: least Jaccard similarity of a repetition, above 0, at most 1.
        shingle_size: units in a shingle. A document that has fewer is one shingle.
        unit: "word" (runs of letters and digits, in lower case), or "character" for languages that are written without
            spaces.
        num_hashes: slots of a signature.
        verify: compares the shingles themselves where the estimate comes within three standard deviations of the
            threshold or above.
        seed: of the hash functions.

    Raises:
        ValueError: a setting outside these ranges.
        MissingPackageError: ``rensa`` is not installed.
    """

    def __init__(
        self,
        threshold: float = 0.8,
        shingle_size: int = 5,
        unit: str = "word",
        num_hashes: int = 128,
        verify: bool = False,
        seed: int = 0,
    ) -> None:
        check_settings(threshold, shingle_size, unit, num_hashes)
        self.threshold, self.shingle_size, self.unit = threshold, shingle_size, unit
        self.num_hashes, self.verify, self.seed = num_hashes, verify, seed
        self.bands, self.rows = choose_bands(threshold, num_hashes)
        self._sketch = require("rensa", "near-duplicate removal", "data").RMinHash
        deviation = (threshold * (1 - threshold) / num_hashes) ** 0.5
        self._candidate = threshold - 3 * deviation if verify else threshold
        self._signatures = np.empty((0, num_hashes), np.uint32)
        self._numbers: list[int] = []  # of remembered documents, as the caller counts them
        self._shingles: list[np.ndarray] = []  # theirs, where candidates are verified
        self._newest: dict[int, int] = {}  # band key: the last remembered document that has it
        self._older: list[
            tuple[int | None, ...]
        ] = []  # for each document and band, the one before it under the same key
        self._count = 0

    def __len__(self) -> int:
        """Documents remembered."""
        return len(self._numbers)

    def add(self, texts: Sequence[str]) -> list[Repeat | None]:
        """What each document repeats, or None; the more at once the faster, a megabyte is plenty.

        Args:
            texts: documents that follow those added before. One without any unit (no letter or digit) repeats nothing.
        """
        hashes, bounds = shingle_hashes(texts, self.shingle_size, self.unit)
        matrix = self._sketch.digest_matrix_from_flat_token_hashes(hashes, bounds, self.num_hashes, self.seed)
        signatures = np.array(matrix.to_rows(), np.uint32).reshape(len(texts), self.num_hashes)
        keys = self._band_keys(signatures)
        repeats: list[Repeat | None] = []
        for row, signature in enumerate(signatures):
            repeat = None
            if bounds[row + 1] > bounds[row]:
                shingles = np.unique(hashes[bounds[row] : bounds[row + 1]]) if self.verify else None
                repeat = self._find(signature, keys[row], shingles)
                if repeat is None:
                    self._remember(signature, keys[row], shingles)
            repeats.append(repeat)
            self._count += 1
        return repeats

    def _band_keys(self, signatures: np.ndarray) -> list[list[int]]:
        used = signatures[:, : self.bands * self.rows].astype(np.uint64).reshape(len(signatures), self.bands, self.rows)
        weights = np.resize(_BAND_WEIGHTS, self.rows)
        return _mix((used * weights).sum(axis=2) + np.arange(self.bands, dtype=np.uint64) * _ODD[0]).tolist()

    def _find(self, signature: np.ndarray, keys: list[int], shingles: np.ndarray | None) -> Repeat | None:
        newest = list(map(self._newest.get, keys))
        if newest.count(None) == len(newest):
            return None
        candidates = set()
        for band, index in enumerate(newest):
            while index is not None and index not in candidates:
                candidates.add(index)
                index = self._older[index][band]
        order = sorted(candidates)
        similarities = (self._signatures[order] == signature).mean(axis=1)
        if shingles is not None:
            near = np.flatnonzero(similarities >= self._candidate)
            order = [order[i] for i in near]
            similarities = np.array([_jaccard(shingles, self._shingles[index]) for index in order])
        if not len(order) or similarities.max() < self.threshold:
            return None
        best = int(similarities.argmax())
        return Repeat(self._numbers[order[best]], float(similarities[best]))

    def _remember(self, signature: np.ndarray, keys: list[int], shingles: np.ndarray | None) -> None:
        index = len(self._numbers)
        if index == len(self._signatures):
            self._signatures = np.concatenate(
                [self._signatures, np.empty((max(1024, index), self.num_hashes), np.uint32)]
            )
        self._signatures[index] = signature
        self._numbers.append(self._count)
        self._older.append(tuple(map(self._newest.get, keys)))
        self._newest.update(dict.fromkeys(keys, index))
        if shingles is not None:
            self._shingles.append(shingles)


def check_settings(threshold: float, shingle_size: int, unit: str, num_hashes: int) -> None:
    """Raises ValueError for settings that :class:`NearDuplicates` cannot work with."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: got {threshold!r}, expected a Jaccard similarity above 0 and at most 1")
    if not 1 <= shingle_size <= len(_SHINGLE_WEIGHTS):
        raise ValueError(f"shingle_size: got {shingle_size!r}, expected 1 to {len(_SHINGLE_WEIGHTS)}")
    if unit not in UNITS:
        raise ValueError(f"unit: got {unit!r}, expected one of {', '.join(UNITS)}")
    if not 16 <= num_hashes <= 4096:
        raise ValueError(f"num_hashes: got {num_hashes!r}, expected 16 to 4096")


def choose_bands(threshold: float, num_hashes: int) -> tuple[int, int]:
    """(b, r), the longest bands with which a pair exactly at the threshold is still compared 99 times of 100.

    Long bands let few other pairs through; those are compared by their whole signatures, so that a pair too many costs
    time and a pair too few costs an answer.
    """
    for rows in range(num_hashes, 1, -1):
        bands = num_hashes // rows
        if 1 - (1 - threshold**rows) ** bands >= FOUND_AT_THRESHOLD:
            return bands, rows
    return num_hashes, 1


def shingle_hashes(texts: Sequence[str], size: int = 5, unit: str = "word") -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of every document's shingles, in reading order, repeated where the text repeats itself.

    Args:
        texts: N documents. Those longer than 2¹⁷ characters lose the shingles across each border of so many.
        size: units in a shingle.
        unit: "word" or "character".

    Returns:
        hashes (shingles of all documents,) uint64, and bounds (N + 1,) int64: document n has
        ``hashes[bounds[n]:bounds[n + 1]]``.
    """
    parts: list[np.ndarray] = []
    counts = np.zeros(len(texts), np.int64)
    for owners, pieces in _pieces(texts):
        units, lengths = _hash_units(pieces, unit)
        hashes, made = _hash_shingles(units, lengths, size)
        parts.append(hashes)
        np.add.at(counts, owners, made)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    return np.concatenate(parts) if parts else np.empty(0, np.uint64), bounds


def _pieces(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Batches of at most ``PIECE`` characters: the documents' numbers, and their text."""
    owners: list[int] = []
    pieces: list[str] = []
    filled = 0
    for owner, text in enumerate(texts):
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            if filled + len(piece) > PIECE:
                yield owners, pieces
                owners, pieces, filled = [], [], 0
            owners.append(owner)
            pieces.append(piece)
            filled += len(piece)
    if pieces:
        yield owners, pieces


def _hash_units(pieces: list[str], unit: str) -> tuple[np.ndarray, np.ndarray]:
    """Hash of every word (or character) of all pieces together, and how many each piece has."""
    if unit == "character":
        pieces = [" ".join(piece.lower().split()) for piece in pieces]
        lengths = np.array([len(piece) for piece in pieces])
        points = "".join(pieces).encode("utf-32-le", "surrogatepass")
        return _mix(np.frombuffer(points, "<u4").astype(np.uint64) + _ODD[0]), lengths
    # bytes.translate makes ASCII lower case
    encoded = [(p if p.isascii() else p.lower()).encode("utf-8", "surrogatepass") for p in pieces]
    letters = np.frombuffer(bytearray(b"\n".join([*encoded, b""])).translate(_LETTERS), np.uint8)
    if not all(map(str.isascii, pieces)):
        _erase_punctuation(letters)
    edges = np.flatnonzero(np.diff(letters != 0, prepend=False))
    starts, ends = edges[::2], edges[1::2]  # the newline at the end closes the last word
    power, inverse = _powers(1 << len(letters).bit_length())
    before = np.zeros(len(letters) + 1, np.uint64)  # Σ letter · pʲ of all letters before; a word's is a difference,
    np.cumsum(letters * power[: len(letters)], out=before[1:])  # made independent of its place by p to the -start
    words = (before[ends] - before[starts]) * inverse[starts]
    borders = np.cumsum([len(piece) + 1 for piece in encoded])
    return _mix(words), np.diff(np.searchsorted(starts, borders), prepend=0)


def _erase_punctuation(letters: np.ndarray) -> None:
    """Zeroes punctuation beyond ASCII, in place: U+0080–00BF (C2 and a byte) and the blocks of ``_PUNCTUATION``."""
    pairs = letters[:-1].astype(np.uint16) << 8 | letters[1:]
    three = np.flatnonzero(np.logical_or.reduce([pairs == pair for pair in _PUNCTUATION]))
    two = np.flatnonzero(letters[:-1] == 0xC2)
    letters[np.concatenate([three, three + 1, three + 2, two, two + 1])] = 0


def _hash_shingles(units: np.ndarray, lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hash of every run of ``size`` units within a piece, and how many runs each piece has."""
    made = np.where(lengths > 0, np.maximum(lengths - size + 1, 1), 0)
    first = np.cumsum(lengths) - lengths
    starts = np.arange(made.sum()) + np.repeat(first - (np.cumsum(made) - made), made)
    padded = np.concatenate([units, np.zeros(size, np.uint64)])
    hashes = sum(padded[offset : offset + len(units)] * _SHINGLE_WEIGHTS[offset] for offset in range(size))[starts]
    for piece in np.flatnonzero((lengths > 0) & (lengths < size)):
        short = units[first[piece] : first[piece] + lengths[piece]]
        hashes[made[:piece].sum()] = (short * _SHINGLE_WEIGHTS[: len(short)]).sum()
    return _mix(hashes), made


@functools.lru_cache(maxsize=4)
def _powers(length: int) -> tuple[np.ndarray, np.ndarray]:
    """pʲ and p⁻ʲ mod 2⁶⁴ for j < length; an odd p has an inverse."""
    base = int(_ODD[1])
    factors = np.full(length, base, np.uint64), np.full(length, pow(base, -1, 1 << 64), np.uint64)
    for factor in factors:
        factor[0] = 1
    return np.cumprod(factors[0]), np.cumprod(factors[1])


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's last step (Steele et al. 2014): every bit of the result depends on every bit of ``x``."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sorted arrays of different values."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
