"""Windows of tokens, shuffled, the same for the same seed, and resumable to the exact window.

One epoch cuts the token stream into windows of ``block_size`` from a random offset and visits them in a random order:
but for the ends, shorter than two windows, every token is seen once before any is seen twice.
Window ``n`` of a run is a pure function of (seed, n), so the whole state of the sampler is the number of windows given
out, and a resumed run continues with the very next one.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .corpora import Corpus, Document
from .shards import TokenShards
from .tokenizers import Tokenizer

Batch = dict[str, Any]
"""What a model is called with, under the names of ``transformers``: ``input_ids`` (B, S) int64, ``attention_mask``,
``labels`` … Labels of -100 are not scored; ``shift_labels`` (B, S) are shifted: entry t is scored at position t.
What begins with ``_`` is not for the model: ``_ids`` number the rows' samples, so that a message can name them; of a
batch with ``_dropped``, which a process runs because others have one more, no result counts."""


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """``batch`` with its tensors on ``device``; from pinned memory the copy to a GPU does not wait.

    What is one tensor under two names stays one.
    """
    moved = {id(v): v.to(device, non_blocking=True) for v in batch.values() if isinstance(v, Tensor)}
    return {name: moved.get(id(value), value) for name, value in batch.items()}


FEW = 10  # documents; of fewer the ends are held out
MANY = 100_000  # documents; of so many a share of the hashes is the same share of the text


def split_documents(
    corpus: Corpus, validation_fraction: float = 0.1, *, seed: int = 0
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Train and validation parts that share no document.

    With ten documents or more, whole documents are held out, drawn by a hash of their text: whatever their length and
    their order, and those of the same text together. With fewer, the end of each document is held out.

    Args:
        corpus: what to split.
        validation_fraction: share of the characters to hold out, about, in (0, 1).
        seed: another one draws other documents.

    Returns:
        (train, validation), in reading order.
    """
    documents = corpus.documents
    if len(documents) < FEW:
        check_fraction(validation_fraction)
        train, held_out = [], []
        for document in documents:
            cut = int(len(document.text) * (1.0 - validation_fraction))
            train.append(Document(document.name, document.text[:cut]))
            held_out.append(Document(document.name, document.text[cut:]))
        return tuple(train), tuple(held_out)
    holdout = Holdout(documents, validation_fraction, seed)
    held = [document in holdout for document in documents]
    train = tuple(document for document, out in zip(documents, held) if not out)
    return train, tuple(itertools.compress(documents, held))


class Holdout:
    """Which documents are held out: ``document in holdout``.

    A document's place is the SHA-256 of ``seed`` and its text. In the order of these, documents are taken until they
    hold the share of the text most nearly: at least one, and not all. One that holds more than half of the text (or
    than the share, if that is larger) stays in the training part. Of :data:`MANY` documents or more each is held out
    with the probability of the share, by itself.

    Args:
        documents: read once, as a stream, :data:`MANY` at most; 16 bytes are kept for each.
        validation_fraction, seed: as in :func:`split_documents`.

    Raises:
        ValueError: ``validation_fraction`` is not in (0, 1).
    """

    def __init__(self, documents: Iterable[Document], validation_fraction: float, seed: int = 0) -> None:
        check_fraction(validation_fraction)
        self.seed = seed
        self.limit, self.longest = int(validation_fraction * 2**64), math.inf
        places: dict[int, int] = {}  # characters at each
        lengths = []
        for document in itertools.islice(documents, MANY):
            place = self._place(document)
            places[place] = places.get(place, 0) + len(document.text)
            lengths.append(len(document.text))
        if len(lengths) == MANY:
            return
        total = sum(lengths)
        self.longest = max(validation_fraction, 0.5) * total
        drawn = sorted((place, size) for place, size in places.items() if size <= self.longest)
        held = list(itertools.accumulate(size for _, size in drawn))
        most = len(held) - (len(drawn) == len(places))  # one stays
        if most < 1:
            raise ValueError(f"documents: {len(lengths)} of the same text; expected two that differ")
        count = min(range(1, most + 1), key=lambda n: abs(held[n - 1] - validation_fraction * total))
        self.limit = drawn[count - 1][0] + 1

    def __contains__(self, document: Document) -> bool:
        return len(document.text) <= self.longest and self._place(document) < self.limit

    def _place(self, document: Document) -> int:
        """A number below 2**64, each as likely."""
        text = f"{self.seed}\0{document.text}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def check_fraction(validation_fraction: float) -> None:
    """Raises ValueError unless it is in (0, 1)."""
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"validation_fraction: got {validation_fraction}, expected a number between 0 and 1")


def encode_documents(tokenizer: Tokenizer, documents: tuple[Document, ...]) -> Tensor:
    """All documents as one stream of int32 ids, the tokenizer's end-of-text token (where it has one) after each."""
    ids: list[int] = []
    for document in documents:
        ids.extend(tokenizer.encode(document.text))
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int32)


class Windows:
    """Training batches without end: iterate, or call :meth:`next_batch`.

    Args:
        tokens: (N,) integer ids, or token shards.
        block_size: T, the length of a window.
        batch_size: windows in a batch, of all ranks together.
        seed: fixes offsets and order.
        rank, world_size: this process takes the windows rank, rank + world_size, … of each batch.

    Raises:
        ValueError: fewer tokens than one window, or a size below one; the message names it.
    """

    def __init__(
        self,
        tokens: Tensor | TokenShards,
        block_size: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_windows(tokens, block_size, batch_size)
        check_rank(rank, world_size, batch_size)
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.position = 0  # windows given out
        # One offset less than a window is left for the random start; the last window needs its target.
        self.windows_per_epoch = max(1, (tokens.numel() - 1) // block_size - 1)
        self._slack = tokens.numel() - 1 - self.windows_per_epoch * block_size
        self._epoch = -1
        self._starts = torch.empty(0, dtype=torch.int64)

    def _start(self, epoch: int) -> Tensor:
        """Where the windows of an epoch begin, in the order they are visited: (windows_per_epoch,) int64."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            offset = int(torch.randint(self._slack + 1, (), generator=generator))
            order = torch.randperm(self.windows_per_epoch, generator=generator)
            self._epoch, self._starts = epoch, order * self.block_size + offset
        return self._starts

    def next_batch(self) -> Batch:
        """The next ``input_ids`` and ``shift_labels``, (B, T); ``_ids`` are the windows' numbers in the run."""
        starts = []
        mine = range(self.position + self.rank, self.position + self.batch_size, self.world_size)
        for index in mine:
            epoch, place = divmod(index, self.windows_per_epoch)
            starts.append(self._start(epoch)[place])
        self.position += self.batch_size
        return {**_gather(self.tokens, torch.stack(starts), self.block_size), "_ids": list(mine)}

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    def describe(self, window: int) -> str:
        """Where the window of this number is, so that its text can be found."""
        epoch, place = divmod(window, self.windows_per_epoch)
        return f"{window} (from token {int(self._start(epoch)[place])})"

    def state_dict(self) -> dict[str, int]:
        """All that a resumed run needs, besides the same tokens."""
        return {
            "seed": self.seed,
            "position": self.position,
            "block_size": self.block_size,
            "tokens": self.tokens.numel(),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues where ``state`` was taken.

        Raises:
            ValueError: the tokens or the block size are not those of the saved run.
        """
        for name, mine in (("tokens", self.tokens.numel()), ("block_size", self.block_size)):
            if state[name] != mine:
                raise ValueError(f"cannot resume: the saved run had {name} = {state[name]}, this one has {mine}")
        self.seed, self.position, self._epoch = state["seed"], state["position"], -1


def evaluation_batches(
    tokens: Tensor | TokenShards, block_size: int, batch_size: int, max_windows: int | None = None
) -> Iterator[Batch]:
    """Windows that do not overlap, the same at every call: evenly spaced when ``max_windows`` is fewer than there are.

    The last batch may be smaller than ``batch_size``.
    """
    _check_windows(tokens, block_size, batch_size)
    available = (tokens.numel() - 1) // block_size
    count = available if max_windows is None else max(1, min(max_windows, available))
    starts = torch.arange(count, dtype=torch.int64) * available // count * block_size
    for chunk in starts.split(batch_size):
        yield _gather(tokens, chunk, block_size)


class EvaluationWindows:
    """:func:`evaluation_batches`, the same at every iteration.

    Args:
        tokens, block_size, batch_size, max_windows: as there.
        rank, world_size: this process takes the rows rank, rank + world_size, … of each batch. Where there are none
            for it, it has one that is not scored, so that all have the same number of batches.
    """

    def __init__(
        self,
        tokens: Tensor | TokenShards,
        block_size: int,
        batch_size: int,
        max_windows: int | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_windows(tokens, block_size, batch_size)
        check_rank(rank, world_size, batch_size)
        self.arguments = (tokens, block_size, batch_size, max_windows)
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        for batch in evaluation_batches(*self.arguments):
            mine = {name: rows[self.rank :: self.world_size] for name, rows in batch.items()}
            if not len(mine["input_ids"]):
                mine = {name: rows[:1] for name, rows in batch.items()}
                mine["shift_labels"] = torch.full_like(mine["shift_labels"], -100)
            yield mine


def _gather(tokens: Tensor | TokenShards, starts: Tensor, block_size: int) -> Batch:
    if isinstance(tokens, Tensor):
        windows = tokens[starts[:, None] + torch.arange(block_size + 1)].long()
    else:
        windows = tokens.windows(starts.tolist(), block_size + 1)
    return {"input_ids": windows[:, :-1].contiguous(), "shift_labels": windows[:, 1:].contiguous()}


def check_rank(rank: int, world_size: int, batch_size: int) -> None:
    """Raises ValueError unless ``rank`` is one of ``world_size`` processes that share a batch equally."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank} of world_size = {world_size}, expected 0 <= rank < world_size")
    if batch_size % world_size:
        raise ValueError(
            f"batch_size: {batch_size} rows cannot be shared equally by world_size = {world_size} processes"
        )


def _check_windows(tokens: Tensor | TokenShards, block_size: int, batch_size: int) -> None:
    if block_size < 1 or batch_size < 1:
        raise ValueError(f"block_size and batch_size: got {block_size} and {batch_size}, expected at least 1")
    shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else (tokens.numel(),)
    if len(shape) != 1 or tokens.numel() < block_size + 1:
        raise ValueError(f"tokens: got {shape}, expected one dimension of at least block_size + 1 = {block_size + 1}")
