"""Tokens to clean text: at the end, or as they are made.

Clean is without special tokens and padding, without the prompt if asked, and cut at the end token or stop string.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from ..data.tokenizers import IncrementalDecoder, SubwordTokenizer, Tokenizer


def decode(tokenizer: Any, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
    """Text of token ids by a tokenizer of this package, of ``tokenizers`` or of ``transformers``."""
    ids = [int(i) for i in ids]
    if isinstance(tokenizer, SubwordTokenizer):
        return tokenizer.decode(ids, skip_special_tokens)
    if hasattr(tokenizer, "save_pretrained"):
        # The clean-up would join what the model wrote apart.
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    if hasattr(tokenizer, "get_added_tokens_decoder"):
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    return tokenizer.decode(ids)


def to_text(
    sequences: Tensor | Sequence[Sequence[int]] | Sequence[int],
    tokenizer: Any,
    *,
    skip_prompt: Tensor | int = 0,
    stop_strings: str | Sequence[str] = (),
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> list[str]:
    """The texts of what ``generate`` returned.

    Args:
        sequences: ``(B, S)`` token ids, or one text's ``(S)``; lists may differ in length.
        tokenizer: of ``transformers``, ``tokenizers``, or :mod:`fastformer.data`.
        skip_prompt: the prompts given to ``generate``, or their length: so many columns are left out. In an
            encoder-decoder model there is no prompt in the result.
        stop_strings: a text ends before the first of them; in the continuation alone, if the prompt is left out.
        eos_token_id: a text ends at the first of them after the prompt; default the tokenizer's own.
        pad_token_id: left out; default the tokenizer's own. Special tokens of the tokenizer are left out as well.

    Returns:
        One string per row.
    """
    rows = sequences.tolist() if isinstance(sequences, Tensor) else list(sequences)
    if rows and not isinstance(rows[0], Sequence):
        rows = [rows]
    start = skip_prompt.shape[-1] if isinstance(skip_prompt, Tensor) else int(skip_prompt)
    if start < 0:
        raise ValueError(f"skip_prompt: {start} is negative")
    if eos_token_id is None:
        eos_token_id = getattr(tokenizer, "eos_token_id", None)
    ends = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    if pad_token_id is None:
        pad_token_id = getattr(tokenizer, "pad_token_id", None)
    strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
    texts = []
    for row in rows:
        new = row[start:]
        if start:  # otherwise the prompt may begin with an end token
            new = new[: next((i for i, token in enumerate(new) if token in ends), len(new))]
        prompt, new = ([t for t in ids if t != pad_token_id and t not in ends and t >= 0] for ids in (row[:start], new))
        before, text = decode(tokenizer, prompt), decode(tokenizer, prompt + new)
        text = text[len(before) :] if text.startswith(before) else decode(tokenizer, new)
        texts.append(text[: min((at for at in map(text.find, strings) if at >= 0), default=len(text))])
    return texts


class TextStreamer:
    """A streamer for ``generate`` that hands on clean text as it is made, whole characters only.

    Args:
        tokenizer: of ``transformers``, ``tokenizers``, or :mod:`fastformer.data`.
        emit: called with each new piece of text; default prints it.
        skip_prompt: leave the prompt out.
        stop_strings: nothing from the first of them on is handed on; ``stopped`` is then True.

    Raises:
        ValueError: more than one text at a time.
    """

    def __init__(
        self,
        tokenizer: Any,
        emit: Callable[[str], Any] | None = None,
        *,
        skip_prompt: bool = True,
        stop_strings: str | Sequence[str] = (),
    ) -> None:
        self._decoder = IncrementalDecoder(_Decoding(tokenizer))
        self._emit = emit or _print
        self._skip_prompt = skip_prompt
        self._strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        self._start()

    def _start(self) -> None:
        self._is_prompt, self.stopped, self._held = True, False, ""

    def put(self, value: Tensor) -> None:
        """The prompt ``(1, S)`` first, then each token ``(1)``."""
        if value.numel() != value.shape[-1]:
            raise ValueError(f"streamer: follows one text, not {value.shape[0]}")
        is_prompt, self._is_prompt = self._is_prompt, False
        ids = value.reshape(-1).tolist()
        piece = self._decoder.push(ids)  # of a skipped prompt as well: whether a space follows depends on it
        if not is_prompt:
            self._pass(piece)
        elif not self._skip_prompt:
            self._show(piece)

    def end(self) -> None:
        """Hands on what was held back, and is ready for another text."""
        self._pass(self._decoder.flush())
        if not self.stopped:
            self._show(self._held)
        self._start()

    def _pass(self, piece: str) -> None:
        """Hands on all but what may be the beginning of a stop string."""
        if self.stopped:
            return
        text = self._held + piece
        found = [at for at in map(text.find, self._strings) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            self._show(text[: min(found)])
            return
        keep = max((_overlap(text, s) for s in self._strings), default=0)
        self._held = text[len(text) - keep :]
        self._show(text[: len(text) - keep])

    def _show(self, piece: str) -> None:
        if piece:
            self._emit(piece)


class _Decoding:
    """Any tokenizer's ``decode``, without special tokens."""

    def __init__(self, tokenizer: Tokenizer | Any) -> None:
        self._tokenizer = tokenizer

    def decode(self, ids: Iterable[int]) -> str:
        return decode(self._tokenizer, ids)


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of ``text`` that ``string`` begins with."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)


def _print(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
