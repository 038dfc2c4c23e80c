"""The order in which samples are seen: shuffled, the same for a seed, exact on resuming, at any number of processes.

The samples of a run form one endless sequence: the first epoch in a random order, then the second in another, and so
on, each order a function of (seed, epoch). Batches are cut from it one after the other, over the end of an epoch
too: every sample is seen once before any is seen twice. Without padding to save, batch n is samples n B … n B + B - 1.

To save padding, samples of similar length share a batch: a *pool*, some hundred batches of the sequence, is sorted by
length, cut into batches, and these are shuffled (as Vaswani et al. 2017, §5.1, batch by length). A batch holds a fixed
number of samples, or as many as stay below a number of tokens, padding included.

So the position in a run is two numbers: the pool, and the place of the next batch in it. All processes cut the same
batches, and each takes every world_size-th sample of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from .batches import Batch, check_rank
from .draws import sample_keys

Collator = Callable[[Sequence[Any], np.ndarray], Batch]


class FixedLength:
    """A dataset of windows that follow each other: sample i is ``tokens[i * length : (i + 1) * length]``.

    Args:
        tokens: (N,) ids as a tensor or an array, or :class:`TokenShards`. The end that fills no window is left out.
        length: of a window.
    """

    def __init__(self, tokens: Any, length: int) -> None:
        count = tokens.numel() if hasattr(tokens, "numel") else len(tokens)
        if length < 1 or count < length:
            raise ValueError(f"length: got {length}, expected 1 to the {count} tokens there are")
        self.tokens, self.length = tokens, length
        self._count = count // length

    def __len__(self) -> int:
        return self._count

    @property
    def lengths(self) -> np.ndarray:
        """``(samples,)``, all the same."""
        return np.full(self._count, self.length)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(f"window {index} of {self._count}")
        start = index * self.length
        read = getattr(self.tokens, "read", None)
        return self.tokens[start : start + self.length] if read is None else read(start, start + self.length)


class Order:
    """The batches of a run as indices of samples.

    Args:
        count: number of samples.
        batch_size: samples in a batch; or
        max_tokens: samples in a batch times the longest of them, at most.
        lengths: ``(count,)``, of the samples; needed for ``pool`` and ``max_tokens``.
        pool: samples that are sorted by length together. None does not sort; with ``max_tokens`` it is about 100
            batches, an epoch at most.
        seed: fixes the order.
        shuffle: False takes the samples in the order they are in.
    """

    def __init__(
        self,
        count: int,
        batch_size: int | None = None,
        *,
        max_tokens: int | None = None,
        lengths: np.ndarray | None = None,
        pool: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if count < 1:
            raise ValueError("dataset: has no samples")
        if (batch_size is None) == (max_tokens is None):
            raise ValueError("batch_size, max_tokens: give one of them")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        if (pool is not None or max_tokens is not None) and (lengths is None or len(lengths) != count):
            raise ValueError(
                f"lengths: needed, one for each of {count} samples, to put those of similar length together"
            )
        self.lengths = None if lengths is None else np.asarray(lengths, dtype=np.int64)
        if max_tokens is not None:
            longest = int(self.lengths.max())  # type: ignore[union-attr]
            if max_tokens < longest:
                raise ValueError(f"max_tokens: {max_tokens} does not hold the longest sample, of {longest} tokens")
            mean = max(1.0, float(self.lengths.mean()))  # type: ignore[union-attr]
            pool = min(count, 100 * max(1, int(max_tokens / mean))) if pool is None else pool
        self.sorts = pool is not None
        self.pool_size = batch_size if pool is None else pool
        if self.pool_size < 1 or (batch_size is not None and self.pool_size % batch_size):
            wanted = "at least 1" if batch_size is None else f"a multiple of batch_size {batch_size}"
            raise ValueError(f"pool: got {pool}, expected {wanted}")
        self.count, self.batch_size, self.max_tokens = count, batch_size, max_tokens
        self.seed, self.shuffle = seed, shuffle
        self.pool = self.place = 0
        self._epochs: dict[int, np.ndarray] = {}
        self._batches: tuple[int, list[tuple[np.ndarray, np.ndarray]]] | None = None

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and indices of the samples of the next batch, each ``(B,)`` int64."""
        if self._batches is None or self._batches[0] != self.pool:
            self._batches = (self.pool, self._cut(self.pool))
        batches = self._batches[1]
        batch = batches[self.place]
        self.place += 1
        if self.place == len(batches):
            self.pool, self.place = self.pool + 1, 0
        return batch

    def seek(self, seed: int, pool: int, place: int) -> None:
        """The next batch is number ``place`` of ``pool``, in the order of ``seed``."""
        self.seed, self.pool, self.place = seed, pool, place
        self._epochs, self._batches = {}, None

    def _cut(self, pool: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The batches of a pool: epochs and indices of their samples."""
        positions = np.arange(pool * self.pool_size, (pool + 1) * self.pool_size)
        epochs, samples = positions // self.count, self._samples(positions)
        if not self.sorts:
            return [(epochs, samples)]
        order = np.argsort(-self.lengths[samples], kind="stable")  # type: ignore[index]
        epochs, samples = epochs[order], samples[order]
        if self.batch_size is not None:
            ends = list(range(self.batch_size, self.pool_size + 1, self.batch_size))
        else:
            ends = _ends(self.lengths[samples], self.max_tokens)  # type: ignore[arg-type,index]
        batches = list(zip(np.split(epochs, ends[:-1]), np.split(samples, ends[:-1])))
        if not self.shuffle:
            return batches
        return [batches[i] for i in np.random.default_rng((self.seed % 2**64, pool, 1)).permutation(len(batches))]

    def _samples(self, positions: np.ndarray) -> np.ndarray:
        epochs = positions // self.count
        if not self.shuffle:
            return positions % self.count
        needed = range(int(epochs.min()), int(epochs.max()) + 1)
        self._epochs = {e: self._epochs[e] if e in self._epochs else self._permutation(e) for e in needed}
        samples = np.empty_like(positions)
        for epoch in needed:
            mine = epochs == epoch
            samples[mine] = self._epochs[epoch][positions[mine] % self.count]
        return samples

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed % 2**64, epoch, 0)).permutation(self.count)


def _ends(lengths: np.ndarray, max_tokens: int) -> list[int]:
    """Where batches end among samples of falling length: each as large as its first, the longest, lets it be."""
    ends = [0]
    while ends[-1] < len(lengths):
        ends.append(min(len(lengths), ends[-1] + max_tokens // max(1, int(lengths[ends[-1]]))))
    if len(ends) > 2 and ends[-1] - ends[-2] < ends[-2] - ends[-3]:
        # The last was left with fewer samples than the one before, perhaps fewer than there are processes: they share.
        ends[-2] = (ends[-3] + ends[-1] + 1) // 2
    return ends[1:]


class Loader:
    """Batches of a dataset without end: iterate, or call :meth:`next_batch`.

    Args:
        dataset: ``len(dataset)`` samples, ``dataset[i]``; ``dataset.lengths`` (samples,) to sort by length.
        collator: ``collator(samples, keys)``, such as those of :mod:`.collators`.
        batch_size: samples in a batch, of all ranks together; or
        max_tokens: samples times the longest of them, at most, of all ranks together.
        seed: fixes the order and what collators draw.
        rank, world_size: this process takes the samples rank, rank + world_size, … of each batch.
        pool: samples sorted by length together (a multiple of ``batch_size``); None does not sort.
        lengths: in place of ``dataset.lengths``.
        shuffle: False keeps the dataset's order.
        prefetch: a thread prepares the next batch during this one's step.
    """

    def __init__(
        self,
        dataset: Any,
        collator: Collator,
        batch_size: int | None = None,
        *,
        max_tokens: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pool: int | None = None,
        lengths: np.ndarray | None = None,
        shuffle: bool = True,
        prefetch: bool = False,
    ) -> None:
        check_rank(rank, world_size, world_size if batch_size is None else batch_size)
        if lengths is None and (pool is not None or max_tokens is not None):
            lengths = getattr(dataset, "lengths", None)
        self.order = Order(
            len(dataset), batch_size, max_tokens=max_tokens, lengths=lengths, pool=pool, seed=seed, shuffle=shuffle
        )
        if max_tokens is not None and world_size > 1:
            longest = int(np.max(self.order.lengths))  # type: ignore[arg-type]
            if self.order.pool_size < world_size:
                raise ValueError(
                    f"pool: {self.order.pool_size} samples for {world_size} processes; expected one for each"
                )
            if max_tokens < 2 * world_size * longest:
                raise ValueError(
                    f"max_tokens: {max_tokens} does not give each of {world_size} processes a sample of {longest} "
                    f"tokens in every batch; expected at least {2 * world_size * longest}"
                )
        self.dataset, self.collator = dataset, collator
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.rank, self.world_size = rank, world_size
        self._executor = ThreadPoolExecutor(1, "fastformer-loader") if prefetch else None
        self._ahead: Future[tuple[Batch, dict[str, Any]]] | None = None
        self._state = self._position()

    def next_batch(self) -> Batch:
        """This rank's part of the next batch; ``_ids`` are its samples' indices."""
        if self._executor is None:
            batch, self._state = self._prepare()
            return batch
        ahead = self._ahead or self._executor.submit(self._prepare)
        self._ahead = None  # an error is raised once, and not prepared beyond
        batch, self._state = ahead.result()
        self._ahead = self._executor.submit(self._prepare)
        return batch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, besides the same dataset and collator."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where ``state`` was taken, at this or another number of processes.

        Raises:
            ValueError: samples, batches or their sorting are not those of the saved run.
        """
        if self._ahead is not None:
            self._ahead.cancel() or self._ahead.exception()
            self._ahead = None
        mine = self._position()
        for name in ("samples", "batch_size", "max_tokens", "pool_size", "shuffle"):
            if state[name] != mine[name]:
                raise ValueError(f"cannot resume: the saved run had {name} = {state[name]}, this one has {mine[name]}")
        self.order.seek(state["seed"], state["pool"], state["place"])
        self._state = self._position()

    def _prepare(self) -> tuple[Batch, dict[str, Any]]:
        epochs, indices = (part[self.rank :: self.world_size] for part in self.order.next())
        samples = [self.dataset[i] for i in indices.tolist()]
        batch = self.collator(samples, sample_keys(self.order.seed, epochs, indices))
        return {**batch, "_ids": indices.tolist()}, self._position()

    def _position(self) -> dict[str, Any]:
        order = self.order
        return {
            "seed": order.seed,
            "pool": order.pool,
            "place": order.place,
            "samples": order.count,
            "batch_size": order.batch_size,
            "max_tokens": order.max_tokens,
            "pool_size": order.pool_size,
            "shuffle": order.shuffle,
        }


class EvaluationLoader:
    """Every sample once, in the dataset's order, the same at every iteration; the last batch may be smaller.

    Args:
        dataset, collator: as in :class:`Loader`. What collators draw is the same each time.
        batch_size: samples in a batch, of all ranks together.
        seed: of what collators draw.
        rank, world_size: this process takes the samples rank, rank + world_size, … of each batch. Where there are none
            for it, it has one with ``_dropped``, so that all have the same number of batches.
    """

    def __init__(
        self, dataset: Any, collator: Collator, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1 or not len(dataset):
            raise ValueError(f"batch_size: got {batch_size} of {len(dataset)} samples, expected at least 1 of 1")
        check_rank(rank, world_size, batch_size)
        self.dataset, self.collator, self.batch_size, self.seed = dataset, collator, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for begin in range(0, len(self.dataset), self.batch_size):
            of_all = np.arange(begin, min(begin + self.batch_size, len(self.dataset)))
            mine = of_all[self.rank :: self.world_size]
            indices = mine if len(mine) else of_all[:1]
            samples = [self.dataset[i] for i in indices.tolist()]
            batch = self.collator(samples, sample_keys(self.seed, np.zeros_like(indices), indices))
            yield batch if len(mine) else {**batch, "_dropped": True}
