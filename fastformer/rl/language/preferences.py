"""Prompts, completions and preferences as rows of tokens.

A row is the prompt, the completion and the end of text, padded at the end, with a mask of the completion. A prompt is a
text or a conversation (a list of {"role", "content"}), which the tokenizer's chat template makes a text. Prompt and
completion are encoded apart, as they are when the model is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...data import Batch
from ...data.chat import render
from ...data.collators import IGNORED, pad_rows
from ...data.examples import check_columns


def prompt_text(prompt: Any, tokenizer: Any, template: str = "{}", system: str = "", chat: bool = False) -> str:
    """What the model reads.

    Args:
        prompt: a text or a conversation.
        template: a text is put in the place of its {}.
        system: the first message of a conversation that has none of that role.
        chat: a text is the user's message in a conversation.
    """
    if isinstance(prompt, str):
        prompt = template.replace("{}", prompt)
        if not chat:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    messages = list(prompt)
    if system and messages and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return render(messages, tokenizer, add_generation_prompt=True)


def end_token(tokenizer: Any, end: str = "") -> int:
    """The token that ends a completion: the tokenizer's end of text, or that of the text ``end``.

    Raises:
        ValueError: there is none, or ``end`` is not one token.
    """
    if end:
        ids = tokenizer.encode(end)
        if len(ids) != 1:
            raise ValueError(f"rollout.end: {end!r} is {len(ids)} tokens; a completion ends with one")
        return ids[0]
    token = getattr(tokenizer, "eos_token_id", None)
    if token is None:
        raise ValueError(
            "rollout.end: the tokenizer has no end of text; say which text ends a completion, such as '\\n'"
        )
    return token


def joined_ids(tokenizer: Any, prompt: str, completion: str, end: int | None = None) -> tuple[list[int], list[int]]:
    """(ids of prompt, completion and end, the mask of the latter two). Without ``end`` it is the tokenizer's own."""
    asked, answered = tokenizer.encode(prompt), tokenizer.encode(completion)
    end = getattr(tokenizer, "eos_token_id", None) if end is None else end
    answered = answered if end is None else [*answered, end]
    return asked + answered, [0] * len(asked) + [1] * len(answered)


def rows_of(rows: Sequence[Sequence[int]], multiple_of: int = 1) -> tuple[Tensor, Tensor]:
    """(ids ``(B, S)`` padded at the end, lengths ``(B,)``)."""
    return torch.from_numpy(pad_rows(rows, 0, multiple_of)), torch.tensor([len(row) for row in rows])


def encode_pairs(
    examples: Sequence[Mapping[str, Any]], tokenizer: Any, end: int, max_length: int, name: str = "data", **form: Any
) -> list[dict[str, Any]]:
    """Preferences as samples.

    Args:
        examples: with ``prompt``, ``chosen`` and ``rejected``.
        end: the token that ends a completion.
        max_length: tokens of a row at most; a longer one is an error.
        form: of :func:`prompt_text`.

    Raises:
        ValueError: a column that is missing, a text without tokens, a pair that is one text, or a row too long.
    """
    check_columns(examples, {c: c for c in ("prompt", "chosen", "rejected")}, name)
    samples = []
    for index, example in enumerate(examples):
        prompt = prompt_text(example["prompt"], tokenizer, **form)
        if example["chosen"] == example["rejected"]:
            raise ValueError(f"{name} example {index}: chosen and rejected are the same text")
        sample: dict[str, Any] = {}
        for side in ("chosen", "rejected"):
            ids, mask = joined_ids(tokenizer, prompt, example[side], end)
            _check_row(ids, mask, max_length, f"{name} example {index} ({side})")
            sample |= {f"{side}_ids": ids, f"{side}_mask": mask}
        samples.append(sample)
    return samples


def encode_answers(
    examples: Sequence[Mapping[str, Any]], tokenizer: Any, end: int, max_length: int, name: str = "data", **form: Any
) -> list[dict[str, Any]]:
    """Examples with ``prompt`` and ``answer``: ``input_ids``, and ``labels``, -100 at the prompt."""
    check_columns(examples, {"prompt": "prompt", "answer": "answer"}, name)
    samples = []
    for index, example in enumerate(examples):
        prompt = prompt_text(example["prompt"], tokenizer, **form)
        ids, mask = joined_ids(tokenizer, prompt, str(example["answer"]), end)
        _check_row(ids, mask, max_length, f"{name} example {index}")
        samples.append({"input_ids": ids, "labels": [t if m else IGNORED for t, m in zip(ids, mask)]})
    return samples


def _check_row(ids: list[int], mask: list[int], max_length: int, name: str) -> None:
    if mask[0]:
        raise ValueError(f"{name}: the prompt has no tokens")
    if len(ids) > max_length:
        raise ValueError(f"{name}: {len(ids)} tokens, and data.max_length is {max_length}")


@dataclass(frozen=True)
class Pairs:
    """Collator of :func:`encode_pairs`: the B chosen rows, then the B rejected ones."""

    def __call__(self, samples: Sequence[Mapping[str, Any]], keys: Any = None) -> Batch:
        """``input_ids``, ``completion_mask``, ``attention_mask`` (2B, S), ``lengths`` (2B,), and where the samples have
        it ``reference`` (2B,), the reference's log-probabilities of the completions."""
        sides = ("chosen", "rejected")
        ids, lengths = rows_of([sample[f"{side}_ids"] for side in sides for sample in samples])
        mask, _ = rows_of([sample[f"{side}_mask"] for side in sides for sample in samples])
        real = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        batch = {"input_ids": ids, "completion_mask": mask, "attention_mask": real, "lengths": lengths}
        if "reference_chosen" in samples[0]:
            batch["reference"] = torch.tensor([s[f"reference_{side}"] for side in sides for s in samples])
        return batch
