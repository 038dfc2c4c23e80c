"""What ends a text: its end tokens, a string it has come to contain, or a criterion of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .text import decode

# (tokens so far (B, S), scores of the steps so far or None) -> bool (B); those of transformers fit.
Criterion = Callable[[Tensor, Any], Any]


class StopStrings:
    """Whether the last token of a text completed one of ``strings``.

    Only the end of a text is decoded. A string that was there before the last token does not count, so a prompt may
    contain one.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self.strings = list(strings)
        self.tokenizer = tokenizer
        # A token is a byte or more, special ones aside; the rest is context: decoders treat a first token apart.
        self.window = max(len(s.encode()) for s in self.strings) + 8

    def completed(self, tokens: Sequence[int]) -> bool:
        """tokens: one text, to its last token."""
        tail = list(tokens[-self.window :])
        before, after = (decode(self.tokenizer, ids, skip_special_tokens=False) for ids in (tail[:-1], tail))
        kept = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
        return any(after.find(s, max(0, kept - len(s) + 1)) >= 0 for s in self.strings)


class Stopping:
    """Every reason for a text to end, but its length.

    Args:
        end_tokens: may be empty.
        stop_strings: None or strings; they need the tokenizer.
        criteria: the caller's own.
        device: where the tokens are.
    """

    def __init__(
        self,
        end_tokens: Sequence[int],
        stop_strings: Sequence[str] | None,
        tokenizer: Any,
        criteria: Sequence[Criterion] | None,
        device: torch.device,
    ) -> None:
        self.end_tokens = list(end_tokens)
        self.ends = torch.tensor(self.end_tokens, dtype=torch.int64, device=device)
        self.strings = StopStrings(stop_strings, tokenizer) if stop_strings else None
        self.criteria = list(criteria or ())
        self.looks_back = self.strings is not None or bool(self.criteria)

    def __bool__(self) -> bool:
        return bool(self.end_tokens) or self.looks_back

    def is_end(self, token: Tensor) -> Tensor:
        """Which of the tokens, of any shape, are end tokens."""
        return token == self.ends if len(self.end_tokens) == 1 else torch.isin(token, self.ends)

    def __call__(self, tokens: Tensor, scores: Any = None) -> Tensor:
        """Which of the texts ``(B, S)`` end with their last token, bool ``(B)``."""
        ended = self.is_end(tokens[:, -1])
        if self.strings is not None:
            window = self.strings.window
            found = [self.strings.completed(row) for row in tokens[:, -window:].tolist()]
            ended = ended | torch.tensor(found, device=tokens.device)
        for criterion in self.criteria:
            ended = ended | torch.as_tensor(criterion(tokens, scores), device=tokens.device)
        return ended

    def length(self, new: Tensor) -> int:
        """Columns of new tokens ``(B, N)`` up to and including the end token of the text that ended last."""
        if not self.end_tokens or new.shape[1] == 0:
            return new.shape[1]
        is_end = torch.isin(new, self.ends)
        first = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, new.shape[1])
        return int(first.max())


def check_stop_strings(stop_strings: str | Sequence[str] | None, tokenizer: Any) -> list[str]:
    """``stop_strings`` as a list.

    Raises:
        ValueError: an empty string, or no tokenizer to find them with.
    """
    if stop_strings is None:
        return []
    strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    if not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop_strings: expected texts of at least one character, got {strings!r}")
    if strings and tokenizer is None:
        raise ValueError("stop_strings: needs tokenizer=, to know which text the tokens are")
    return strings
