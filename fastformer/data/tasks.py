"""From labelled examples to what a model is called with, for each task a model is fine-tuned for.

    classification            text (and text_pair)       -> label
    token_classification      tokens, words              -> tags, one per word; scored at its first token, a
                                                            decoder's at its last, where it has read the word
    question_answering        question, context          -> answer, a span (Devlin et al. 2018, arXiv:1810.04805, §4.2)
    seq2seq                   source                     -> target, by an encoder-decoder
    instruction               messages, or source        -> the assistant's messages, or target, by a decoder

A context longer than the model's is cut into windows that overlap; one without the answer has [CLS] for its span. Other
texts are cut at ``max_length``, or are an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .batches import Batch
from .chat import encode_answer, encode_conversation
from .collators import IGNORED, CausalLM, Classification, Keys, Seq2Seq
from .examples import Example, check_columns
from .subword import SubwordTokenizer
from .tokenizers import encode

TASKS = ("classification", "token_classification", "question_answering", "seq2seq", "instruction")


@dataclass(frozen=True)
class Columns:
    """Which column is what; a task looks at its own."""

    text: str = "text"
    """classification: the text."""
    text_pair: str = ""
    """classification: a second text; empty: there is none."""
    label: str = "label"
    """classification: a name, or a number from 0."""
    tokens: str = "tokens"
    """token_classification: a list of words."""
    tags: str = "tags"
    """token_classification: a list of names or numbers, one for each word."""
    question: str = "question"
    """question_answering: the question."""
    context: str = "context"
    """question_answering: the text that holds the answer."""
    answer: str = "answer"
    """question_answering: words of the context, "" where it has no answer; or SQuAD's {"text", "answer_start"}."""
    source: str = "source"
    """seq2seq, instruction: what is answered."""
    target: str = "target"
    """seq2seq, instruction: the answer."""
    messages: str = "messages"
    """instruction: a conversation, a list of {"role", "content"}; examples without it have source and target."""


@dataclass(frozen=True)
class Encoder:
    """Turns the examples of one task into samples.

    Attributes:
        task: one of :data:`TASKS`.
        tokenizer: of the model.
        max_length: tokens of a text, special ones included.
        labels: names of the classes in their order; empty for tasks without.
        stride: tokens by which windows of a context overlap.
        prompt: what seq2seq and instruction read, {} in the place of the source.
        cut: False makes a text that is too long an error.
        columns: which column is what.
        causal: for a decoder: no segments, and a line's end between two texts if the tokenizer has nothing for it; tags
            are scored at a word's last token.
    """

    task: str
    tokenizer: Any
    max_length: int
    labels: tuple[str, ...] = ()
    stride: int = 64
    prompt: str = "{}"
    cut: bool = True
    columns: Columns = field(default_factory=Columns)
    causal: bool = False

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task: got {self.task!r}, expected one of {', '.join(TASKS)}")
        if self.max_length < 1:
            raise ValueError(f"max_length: got {self.max_length}, expected at least 1")
        if "{}" not in self.prompt:
            raise ValueError(f"prompt: {self.prompt!r} has no {{}}, the place of the source")
        subword = isinstance(self.tokenizer, SubwordTokenizer)
        if not subword and (self.task in ("token_classification", "question_answering") or self.columns.text_pair):
            raise TypeError(f"tokenizer: {self.task} needs a SubwordTokenizer, got {type(self.tokenizer).__name__}")

    def __call__(self, examples: Sequence[Example], name: str = "data") -> list[dict[str, Any]]:
        """Samples for :func:`collator_of`; of a long context several.

        Raises:
            ValueError: a column that is missing, a label that is none, a text too long; the message names the example.
        """
        columns = self.columns
        needed = {
            "classification": ("text", "label", *(["text_pair"] if columns.text_pair else [])),
            "token_classification": ("tokens", "tags"),
            "question_answering": ("question", "context", "answer"),
            "seq2seq": ("source", "target"),
        }.get(self.task) or (("messages",) if columns.messages in examples[0] else ("source", "target"))
        check_columns(examples, {column: getattr(columns, column) for column in needed}, name)
        encode_one: Callable[[Example], list[dict[str, Any]]] = getattr(self, f"_{self.task}")
        samples = []
        for index, example in enumerate(examples):
            try:
                made = encode_one(example)
                longest = max((len(row) for sample in made for row in _rows(sample)), default=0)
                if longest > self.max_length:
                    raise ValueError(f"{longest} tokens, and there is room for {self.max_length} (data.max_length)")
                samples += made
            except ValueError as error:
                raise ValueError(f"{name} example {index}: {error}") from error
        if not samples:
            raise ValueError(f"{name}: cut to {self.max_length} tokens, no example has an answer left to learn")
        return samples

    def _classification(self, example: Example) -> list[dict[str, Any]]:
        text, label = example[self.columns.text], self._label(example[self.columns.label])
        if not isinstance(self.tokenizer, SubwordTokenizer):
            ids = encode(self.tokenizer, text)
            return [{"input_ids": ids[: self.max_length] if self.cut else ids, "labels": label}]
        pair = example[self.columns.text_pair] if self.columns.text_pair else None
        if pair is not None and self.causal and not self.tokenizer.separates_texts:
            pair = f"\n{pair}"
        encoding = self.tokenizer.encoding(text, pair, max_length=self.max_length if self.cut else None)
        sample = {"input_ids": encoding.ids, "labels": label}
        return [sample if pair is None or self.causal else {**sample, "token_type_ids": encoding.type_ids}]

    def _token_classification(self, example: Example) -> list[dict[str, Any]]:
        words, tags = example[self.columns.tokens], example[self.columns.tags]
        if isinstance(words, str) or isinstance(tags, str):
            raise ValueError(f"expected lists of words and of tags, got {words!r} and {tags!r}")
        if len(words) != len(tags):
            raise ValueError(f"{len(words)} words and {len(tags)} tags; expected as many")
        numbers = [self._label(tag) for tag in tags]
        limit = self.max_length if self.cut else None
        encoding = self.tokenizer.encoding(list(words), max_length=limit, pretokenized=True)
        owners = encoding.word_ids
        beside = [*owners[1:], None] if self.causal else [None, *owners[:-1]]
        labels = [IGNORED if word is None or word == other else numbers[word] for word, other in zip(owners, beside)]
        return [{"input_ids": encoding.ids, "labels": labels}]

    def _question_answering(self, example: Example) -> list[dict[str, Any]]:
        context = example[self.columns.context]
        answer, begin = self._answer(example, context)
        samples = []
        stride = min(self.stride, self.max_length // 4)
        for window in self.tokenizer.windows(example[self.columns.question], context, self.max_length, stride):
            offsets = [
                (i, *offset)
                for i, (offset, part) in enumerate(zip(window.offsets, window.sequence_ids))
                if part == 1  # the context
            ]
            end = begin + len(answer)
            inside = [i for i, first, last in offsets if first < end and last > begin]
            whole = bool(inside) and offsets[0][1] <= begin and end <= offsets[-1][2]
            start, stop = (inside[0], inside[-1]) if whole else (0, 0)
            sample = {"input_ids": window.ids, "token_type_ids": window.type_ids}
            samples.append({**sample, "start_positions": start, "end_positions": stop})
        return samples

    def _seq2seq(self, example: Example) -> list[dict[str, Any]]:
        source = self.prompt.replace("{}", example[self.columns.source])
        rows = [encode(self.tokenizer, t, add_special_tokens=True) for t in (source, example[self.columns.target])]
        end = getattr(self.tokenizer, "eos_token_id", None)
        rows = [row if end is None or row[-1:] == [end] else [*row, end] for row in rows]
        if self.cut:  # the last token closes the text
            rows = [row if len(row) <= self.max_length else [*row[: self.max_length - 1], row[-1]] for row in rows]
        return [{"input_ids": rows[0], "labels": rows[1]}]

    def _instruction(self, example: Example) -> list[dict[str, Any]]:
        if self.columns.messages in example:
            sample = encode_conversation(example[self.columns.messages], self.tokenizer)
        else:
            prompt = self.prompt.replace("{}", example[self.columns.source])
            sample = encode_answer(prompt, example[self.columns.target], self.tokenizer)
        if self.cut:
            sample = {name: row[: self.max_length] for name, row in sample.items()}
        scored = any(label != IGNORED for label in sample["labels"][1:])
        return [sample] if scored else []

    def _label(self, label: Any) -> int:
        if str(label) in self.labels:
            return self.labels.index(str(label))
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(self.labels):
            return label
        raise ValueError(f"label {label!r} is not one of {', '.join(self.labels)}")

    def _answer(self, example: Example, context: str) -> tuple[str, int]:
        """The answer and the character where it begins; ("", -1) where there is none."""
        answer = example[self.columns.answer]
        begin = example.get("answer_start")
        if isinstance(answer, Mapping):  # SQuAD's
            if not answer["text"]:
                return "", -1
            answer, begin = answer["text"][0], answer["answer_start"][0]
        if not answer:
            return "", -1
        begin = context.find(answer) if begin is None else int(begin)
        if begin < 0 or context[begin : begin + len(answer)] != answer:
            raise ValueError(f"the context has no {answer!r}" + (f" at {begin}" if begin >= 0 else ""))
        return answer, begin


@dataclass(frozen=True)
class QuestionAnswering:
    """Mappings with ``input_ids``, ``token_type_ids``, ``start_positions`` and ``end_positions``."""

    pad_token_id: int = 0

    def __call__(self, samples: Sequence[Mapping[str, Any]], keys: Keys = None) -> Batch:
        """``input_ids``, ``token_type_ids`` (B, S), both positions (B,), ``attention_mask`` where there is padding."""
        batch = Classification(self.pad_token_id)(samples, keys)
        for name in ("start_positions", "end_positions"):
            batch[name] = torch.tensor([sample[name] for sample in samples])
        return batch


def collator_of(task: str, pad_token_id: int = 0) -> Any:
    """The collator for the samples of ``task``."""
    return {
        "classification": Classification(pad_token_id),
        "token_classification": Classification(pad_token_id, per_token=True),
        "question_answering": QuestionAnswering(pad_token_id),
        "seq2seq": Seq2Seq(pad_token_id),
        "instruction": CausalLM(pad_token_id),
    }[task]


def labels_in(examples: Sequence[Example], task: str, columns: Columns) -> tuple[str, ...]:
    """Names of the classes: sorted, numbers by their value; the numbers 0 … n - 1 where labels are integers.

    Raises:
        ValueError: fewer than two classes, negative numbers, or labels that are no names.
    """
    if task not in ("classification", "token_classification"):
        return ()
    per_token = task == "token_classification"
    column = columns.tags if per_token else columns.label
    check_columns(examples, {"tags" if per_token else "label": column})
    found = {tag for example in examples for tag in (example[column] if per_token else [example[column]])}
    if any(isinstance(label, float | bool) for label in found):
        raise ValueError(f"{column}: expected names or whole numbers, got {next(iter(found))!r}")
    if len(found) < 2:
        only = f"every example has {found.pop()!r}" if found else "there are none"
        raise ValueError(f"{column}: {only}; a classifier needs two classes or more to learn from")
    if all(isinstance(label, int) for label in found):
        if min(found) < 0:
            raise ValueError(f"{column}: got {min(found)}, expected numbers from 0")
        return tuple(map(str, range(max(found) + 1)))
    names = {str(label) for label in found}
    return tuple(sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name)))


def lengths_of(samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """``(samples,)`` tokens of each, by which a loader makes batches with little padding."""
    return np.array([max(map(len, _rows(sample))) for sample in samples])


def _rows(sample: Mapping[str, Any]) -> list[Any]:
    return [sample[name] for name in ("input_ids", "labels") if isinstance(sample.get(name), list)]
