"""Batches from token shards on disk, ours beside ``torch.utils.data.DataLoader`` with transformers' collators.

One process and one thread in both; the shards are in the operating system's cache. The shape is (samples, tokens in
one); items are tokens read. ``eager`` collates as one would write it with PyTorch: a Python loop over the samples.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.runner import Case, Cost, Problem, Unavailable, incomparable
from fastformer.data import (
    CharTokenizer,
    FixedLength,
    Loader,
    MaskedLM,
    PackedCausalLM,
    PackedRows,
    SpanCorruption,
    TokenShards,
    Windows,
    write_shards,
)

OP = "data_loading"
VOCABULARY, FIRST = 30000, 0x20000  # a character is a token, for a quick start
MASK, SENTINELS = 4, list(range(VOCABULARY - 1, VOCABULARY - 101, -1))
TOKENS, QUICK_TOKENS = 8_000_000, 20_000

KINDS = {"windows": (16, 1024), "packed documents": (16, 1024), "masked": (32, 512), "whole words": (32, 512)}
KINDS["T5 spans"] = (32, 568)
CASES = {
    "cpu": [Case(shape, "int64", False, kind, {"tokens": TOKENS}) for kind, shape in KINDS.items()],
    "cuda": [],
    "quick": [Case((2, 64), "int64", False, kind, {"tokens": QUICK_TOKENS}) for kind in KINDS],
}


class Characters(CharTokenizer):
    """A character is its code point: encoding costs nothing."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-32-le"), dtype="<u4") - FIRST for text in texts]


@functools.cache
def shards(tokens: int) -> tuple[TokenShards, tempfile.TemporaryDirectory]:
    """Documents of some hundred tokens, as on the web."""
    folder = tempfile.TemporaryDirectory()
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(6, 1, tokens // 600).astype(int) + 1
    ids = [generator.integers(5, VOCABULARY - 100, n, dtype=np.uint32) for n in lengths]
    texts = ((row + FIRST).astype("<u4").tobytes().decode("utf-32-le") for row in ids)
    tokenizer = Characters([chr(FIRST + i) for i in range(VOCABULARY)])
    return write_shards(texts, tokenizer, Path(folder.name, "shards")), folder


def setup(case: Case, device: str) -> Problem:
    source, _ = shards(case.options["tokens"])
    return Problem(device, (source,), random=True)


def cost(case: Case) -> Cost:
    return Cost(items=case.shape[0] * case.shape[1])


def dataset(case: Case, source: TokenShards) -> Any:
    return PackedRows(source, case.cols) if case.variant == "packed documents" else FixedLength(source, case.cols)


def collator(case: Case) -> Any:
    if case.variant == "packed documents":
        return PackedCausalLM()
    if case.variant == "T5 spans":
        return SpanCorruption(SENTINELS)
    starts = np.random.default_rng(1).random(VOCABULARY) < 0.7 if case.variant == "whole words" else None
    return MaskedLM(MASK, VOCABULARY, word_starts=starts)


def ours(case: Case, problem: Problem):
    (source,) = problem.args
    batch, length = case.shape
    if case.variant == "windows":
        return Windows(source, length, batch).next_batch
    return Loader(dataset(case, source), collator(case), batch).next_batch


def endless(loader: DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def from_dataloader(case: Case, problem: Problem, collate: Callable[[list[Any]], Any]):
    samples = dataset(case, problem.args[0])
    batches = endless(DataLoader(samples, case.shape[0], shuffle=True, collate_fn=collate, drop_last=True))
    return lambda: next(batches)


@incomparable
def eager(case: Case, problem: Problem):
    return from_dataloader(case, problem, EAGER[case.variant])


def _stacked(samples: list[Any]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.asarray(row).astype(np.int64)) for row in samples])


def _windows(samples: list[Any]) -> dict[str, torch.Tensor]:
    ids = _stacked(samples)
    return {"input_ids": ids, "labels": ids.clone()}


def _packed(samples: list[Any]) -> dict[str, torch.Tensor]:
    ids, labels, positions, bounds = [], [], [], [0]
    for row in samples:
        for document in row:
            ids += document.tolist()
            labels += [-100, *document.tolist()[1:]]
            positions += range(len(document))
            bounds.append(len(ids))
    parts = {"input_ids": ids, "labels": labels, "position_ids": positions, "cu_seq_lens_q": bounds}
    return {name: torch.tensor(part) for name, part in parts.items()}


def _masked(samples: list[Any]) -> dict[str, torch.Tensor]:
    ids = _stacked(samples)
    chosen = torch.rand(ids.shape) < 0.15
    labels = ids.masked_fill(~chosen, -100)
    fate = torch.rand(ids.shape)
    ids = torch.where(chosen & (fate < 0.8), MASK, ids)
    return {
        "input_ids": torch.where(chosen & (fate >= 0.9), torch.randint(VOCABULARY, ids.shape), ids),
        "labels": labels,
    }


def _spans(samples: list[Any]) -> dict[str, torch.Tensor]:
    inputs, targets = [], []
    for row in samples:
        noise = max(1, round(0.15 * len(row)))
        spans = max(1, round(noise / 3))
        parts = []
        for items in (len(row) - noise, noise):
            cuts = sorted((torch.randperm(items - 1)[: spans - 1] + 1).tolist())
            parts.append([b - a for a, b in zip([0, *cuts], [*cuts, items])])
        source, target, at = [], [], 0
        for sentinel, kept, hidden in zip(SENTINELS, *parts):
            source += [*row[at : at + kept].tolist(), sentinel]
            target += [sentinel, *row[at + kept : at + kept + hidden].tolist()]
            at += kept + hidden
        inputs.append(torch.tensor([*source, 1]))
        targets.append(torch.tensor([*target, 1]))
    return {"input_ids": torch.stack(inputs), "labels": torch.stack(targets)}


EAGER = {"windows": _windows, "packed documents": _packed, "masked": _masked, "T5 spans": _spans}
EAGER["whole words"] = _masked  # of single tokens, which is less work


@incomparable
def transformers(case: Case, problem: Problem):
    try:
        from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, PreTrainedTokenizerFast
    except ImportError as error:
        raise Unavailable(str(error)) from None
    if case.variant == "packed documents":
        flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        return from_dataloader(
            case, problem, lambda rows: flatten([{"input_ids": d.tolist()} for row in rows for d in row])
        )
    if case.variant != "masked":
        raise Unavailable("transformers has no such collator")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {f"[{i}]": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[0]")), mask_token=f"[{MASK}]", pad_token="[0]"
    )
    collate = DataCollatorForLanguageModeling(tokenizer)
    return from_dataloader(case, problem, lambda rows: collate([{"input_ids": row.tolist()} for row in rows]))


PROVIDERS = {"ours": ours, "eager": eager, "transformers": transformers}
