"""Texts to vectors: by a language model, or by hashing their words.

:class:`EncodedTexts` is what policies see: numbers of a :class:`.observations.TextTable` in, vectors out, each text
embedded once while the encoder stays as it is.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import load_tokenizer
from ..data.collators import pad_rows
from ..data.tokenizers import encode
from ..models.pretrained import read_config
from ..training.checkpoint import find_checkpoint
from .observations import TextTable

# config.json's model_type -> the class without a head
BODIES = {"bert": "BertModel", "gpt2": "GPT2Model", "llama": "LlamaModel", "t5": "T5EncoderModel"}


class WordHashes(nn.Module):
    """Counts of words and of up to ``ngram`` neighbours, hashed into ``size`` numbers with signs, scaled to length 1.

    Weinberger et al. 2009, "Feature hashing for large scale multitask learning". Nothing to train, microseconds a text:
    the baseline of a language model, and enough where an environment has a few dozen words. Six neighbours tell which
    door it is that is "red door 3 ahead 1 left".
    """

    def __init__(self, size: int = 1024, ngram: int = 6) -> None:
        super().__init__()
        for name, value in (("size", size), ("ngram", ngram)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.size, self.ngram = size, ngram

    def forward(self, texts: Sequence[str]) -> Tensor:
        """B texts -> ``(B, size)``."""
        counts = torch.zeros(len(texts), self.size)
        for row, text in zip(counts.numpy(), texts):
            words = re.findall(r"\w+", text.lower())
            for length in range(1, self.ngram + 1):
                for first in range(len(words) - length + 1):
                    value = zlib.crc32(" ".join(words[first : first + length]).encode())
                    row[(value >> 1) % self.size] += 1.0 if value & 1 else -1.0
        return nn.functional.normalize(counts, dim=1)


class LanguageModelEncoder(nn.Module):
    """The mean of a language model's last hidden states, scaled to length 1 (Reimers & Gurevych 2019, Sentence-BERT).

    Args:
        model: BERT, GPT-2, Llama or T5's encoder, without a head.
        tokenizer: its tokenizer.
        max_length: tokens that are read of a text.
        trained: its weights are trained with the policy's.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, max_length: int = 256, trained: bool = False) -> None:
        super().__init__()
        self.model, self.tokenizer, self.trained = model, tokenizer, trained
        config: Any = model.config
        self.size = int(config.hidden_size)
        self.max_length = min(max_length, getattr(config, "max_position_embeddings", None) or max_length)
        self.requires_grad_(trained)
        self.eval()

    @classmethod
    def load(cls, directory: str | Path, **options: Any) -> LanguageModelEncoder:
        """From a model directory, or a run that holds a checkpoint; ``options`` as of the class.

        Raises:
            FileNotFoundError: there is none.
            ValueError: a model of another kind.
        """
        from .. import models

        path = find_checkpoint(directory)
        kind = read_config(path).get("model_type")
        if kind not in BODIES:
            raise ValueError(f"text_encoder: {path} is a {kind!r}, expected one of {', '.join(BODIES)}")
        model = getattr(models, BODIES[kind]).from_pretrained(path, dtype=torch.float32)
        return cls(model, load_tokenizer(path), **options)

    def train(self, mode: bool = True) -> LanguageModelEncoder:
        """Stays without dropout: an agent acts and learns on the same function."""
        return super().train(False)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """B texts -> ``(B, size)``."""
        device = next(self.model.parameters()).device
        rows = [encode(self.tokenizer, text, add_special_tokens=True)[: self.max_length] or [0] for text in texts]
        ids = torch.from_numpy(pad_rows(rows, 0)).to(device)
        real = torch.from_numpy(pad_rows([[1] * len(row) for row in rows], 0)).to(device)
        hidden = self.model(input_ids=ids, attention_mask=real).last_hidden_state.float()
        mask = real[:, :, None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


class EncodedTexts(nn.Module):
    """Numbers of texts -> their vectors; zeros for -1.

    An encoder that stays as it is embeds each text of the table once, in the order they came. One that is trained
    embeds those of a batch, once until the next step of the optimiser where no gradient is wanted.

    Args:
        table: of the texts.
        encoder: with ``size``, called with a list of texts; ``trained`` if its weights are.
        batch_size: texts embedded at a time.
    """

    def __init__(self, table: TextTable, encoder: nn.Module, batch_size: int = 32) -> None:
        super().__init__()
        self.table, self.encoder, self.batch_size = table, encoder, batch_size
        self.size: int = encoder.size  # type: ignore[assignment]
        self.trained = bool(getattr(encoder, "trained", False))
        self._embedded = 0
        self._vectors = torch.zeros(1, self.size)  # row n + 1 is text n
        self._fresh: dict[int, Tensor] = {}

    def forward(self, numbers: Tensor) -> Tensor:
        """``(…)`` int64 -> ``(…, size)``."""
        if not self.trained:
            if self._embedded < len(self.table) or self._vectors.device != numbers.device:
                self._catch_up(numbers.device)
            return self._vectors[numbers + 1]
        distinct, places = numbers.unique(return_inverse=True)
        wanted = distinct.tolist()
        known = [n for n in wanted if n >= 0]
        if torch.is_grad_enabled():
            vectors = list(self._embed(known))
        else:
            missing = [n for n in known if n not in self._fresh]
            self._fresh.update(zip(missing, itertools.chain.from_iterable(self._embed(missing))))
            vectors = [torch.stack([self._fresh[n] for n in known])] if known else []
        if len(known) < len(wanted):  # -1 is the smallest, so it comes first
            vectors.insert(0, torch.zeros(1, self.size, device=numbers.device))
        return torch.cat(vectors)[places]

    def forget(self) -> None:
        """To be called after a step of the optimiser: what was embedded by other weights is embedded anew."""
        self._fresh.clear()

    def vectors(self) -> Tensor:
        """What a run saves, ``(texts, size)``: in a batch of other texts the last bits may differ."""
        return self._vectors[1 : 1 + self._embedded].clone()

    def load_vectors(self, vectors: Tensor) -> None:
        """Puts them back."""
        self._embedded = len(vectors)
        self._vectors = torch.cat([torch.zeros(1, self.size), vectors])

    def _catch_up(self, device: torch.device) -> None:
        """Embeds the texts that came since the last time."""
        new = range(self._embedded, len(self.table))
        self._vectors = self._vectors.to(device)
        if len(self._vectors) <= len(self.table):
            room = torch.zeros(2 * len(self.table) + 1 - len(self._vectors), self.size, device=device)
            self._vectors = torch.cat([self._vectors, room])
        with torch.no_grad():
            at = self._embedded + 1
            for part in self._embed(new):
                self._vectors[at : at + len(part)] = part
                at += len(part)
        self._embedded = len(self.table)

    def _embed(self, numbers: Sequence[int]) -> Iterator[Tensor]:
        for i in range(0, len(numbers), self.batch_size):
            yield self.encoder([self.table.texts[n] for n in numbers[i : i + self.batch_size]])


def make_encoder(name: str, *, trained: bool = False) -> nn.Module:
    """``words``, or a model directory."""
    if name == "words":
        if trained:
            raise ValueError("policy.train_encoder: hashed words have nothing to train; expected a model directory")
        return WordHashes()
    return LanguageModelEncoder.load(name, trained=trained)
