"""Documents put together into rows of one length, so that a batch holds tokens rather than padding.

A row keeps its documents apart: each has positions from 0 on, attention within its own bounds (``cu_seqlens``), and no
loss on its first token, so that a packed document has the loss and the gradient it would have alone.

Which documents share a row is bin packing. ``best_fit`` takes them longest first and puts each where it leaves the
least room (Johnson 1974, "Fast algorithms for bin packing"; for language models Ding et al. 2024, arXiv:2404.10830):
rows end up nearly full. The rooms that there are form the bits of one integer, so finding the tightest is one shift.
``next_fit`` keeps the order of the documents and begins a row when one does not fit. Only a document longer than a row
is divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

METHODS = ("best_fit", "next_fit")


@dataclass(frozen=True)
class Packing:
    """Which pieces of which documents make up each row.

    Attributes:
        length: positions in a row.
        document, start, stop: ``(pieces,)`` int64; a piece is ``documents[document][start:stop]``. Row after row.
        rows: ``(rows + 1,)`` int64, where the pieces of each row begin.
    """

    length: int
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each row, ``(rows,)``."""
        return np.diff(np.concatenate([[0], np.cumsum(self.stop - self.start)])[self.rows])

    @property
    def fill(self) -> float:
        """Share of the positions that hold a token."""
        return float((self.stop - self.start).sum()) / (len(self) * self.length)


def pack(lengths: Sequence[int] | np.ndarray, length: int, method: str = "best_fit") -> Packing:
    """Rows of at most ``length`` tokens for documents of these lengths.

    Args:
        lengths: of the documents; one of length 0 is in no row.
        length: of a row.
        method: ``"best_fit"`` or ``"next_fit"``.

    Raises:
        ValueError: a method that is neither, a length below 1, or no tokens at all.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    if length < 1:
        raise ValueError(f"length: got {length}, expected at least 1")
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.ndim != 1 or sizes.size == 0 or sizes.min() < 0 or sizes.max() == 0:
        raise ValueError(f"lengths: shape {sizes.shape}, expected lengths of documents, not all of them 0")
    pieces = -(-sizes // length)
    document = np.repeat(np.arange(len(sizes)), pieces)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = nth * length
    stop = np.minimum(start + length, sizes[document])
    row = (_best_fit if method == "best_fit" else _next_fit)(stop - start, length)
    order = np.argsort(row, kind="stable")
    rows = np.concatenate([[0], np.cumsum(np.bincount(row))])
    return Packing(length, document[order], start[order], stop[order], rows)


def _next_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """The row of each piece, ``(pieces,)``."""
    row, room, rows = -1, 0, []
    for size in sizes.tolist():
        if size > room:
            row, room = row + 1, length
        room -= size
        rows.append(row)
    return np.array(rows)


def _best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """The row of each piece, ``(pieces,)``."""
    by_room: list[list[int]] = [[] for _ in range(length + 1)]  # the rows that have so much room left
    rooms = 0  # bit n is set where by_room[n] is not empty
    rows = np.empty(len(sizes), dtype=np.int64)
    count = 0
    order = np.argsort(-sizes, kind="stable")
    for piece, size in zip(order.tolist(), sizes[order].tolist()):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            row, room, count = count, length, count + 1
        left = room - size
        if left:
            by_room[left].append(row)
            rooms |= 1 << left
        rows[piece] = row
    return rows


class PackedRows:
    """A dataset whose samples are rows: lists of arrays of ids, one for each document in the row.

    Args:
        documents: indexable sequences of ids; :class:`TokenShards` gives them without reading them all.
        length: of a row.
        method: as in :func:`pack`.

    Attributes:
        packing: which documents are where.
        lengths: tokens in each row.
    """

    def __init__(self, documents: Any, length: int, method: str = "best_fit") -> None:
        self.documents = documents
        known = getattr(documents, "lengths", None)
        self.packing = pack([len(d) for d in documents] if known is None else known, length, method)
        self.lengths = self.packing.lengths

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, index: int) -> list[Any]:
        """The documents of row ``index``."""
        p = self.packing
        begin, end = p.rows[index], p.rows[index + 1]
        return [self.documents[p.document[i]][p.start[i] : p.stop[i]] for i in range(begin, end)]
