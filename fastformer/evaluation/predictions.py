"""What a model says to each example: labels by the largest logit, text by ``generate``.

Each function is a generator of :class:`Record`, one batch in memory at a time. Of the logits only the largest one's
index, its probability and the loss leave the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..data import to_device
from ..data.collators import IGNORED, Classification, pad_rows
from ..data.tokenizers import check_tokenizer, encode
from ..generation.decoding import evaluating, generate
from ..generation.text import to_text
from ..models.losses import in_float32


@dataclass
class Record:
    """One example.

    Attributes:
        prediction, reference: what the metrics' ``add`` takes.
        shown: more of what goes into the file of records, and what slices are made of; JSON.
        loss: of the reference, where it is known: which of two wrong answers is the worse one.
    """

    prediction: Any
    reference: Any
    shown: dict[str, Any] = field(default_factory=dict)
    loss: float | None = None


def classify(model: Any, batches: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    """The likeliest class of each text, or of each token that has a label.

    Args:
        model: with ``logits`` (B, C) or (B, S, C).
        batches: the model's arguments; ``labels`` (B,) or (B, S) int64, -100 = not scored, and under ``"_examples"`` a
            list of mappings to show beside them.

    Raises:
        ValueError: a batch without labels, labels of another shape, or one number instead of classes.
    """
    device = next(model.parameters()).device
    for batch in batches:
        if "labels" not in batch:
            raise ValueError(f"batch: has {', '.join(batch)}; it needs labels to be compared with")
        inputs = to_device({k: v for k, v in batch.items() if k != "labels" and not k.startswith("_")}, device)
        labels: Tensor = batch["labels"]
        with torch.no_grad(), evaluating(model):
            logits = in_float32(model(**inputs).logits)
            if logits.shape[:-1] != labels.shape or labels.is_floating_point():
                raise ValueError(
                    f"labels: shape {tuple(labels.shape)} is not {tuple(logits.shape[:-1])} of class numbers"
                )
            if logits.shape[-1] < 2:
                raise ValueError(
                    "model: has one output per text, a regression; classification needs two classes or more"
                )
            flat = logits.flatten(0, -2)
            losses = functional.cross_entropy(flat, labels.to(device).flatten(), reduction="none").view(labels.shape)
            chosen = logits.argmax(dim=-1)
            confidence = (logits.gather(-1, chosen[..., None])[..., 0] - logits.logsumexp(dim=-1)).exp()
            losses, chosen, confidence = losses.cpu(), chosen.cpu(), confidence.cpu()
        shown = batch.get("_examples") or [{} for _ in labels]
        for i, example in enumerate(shown):
            if labels.dim() == 1:
                more = {"confidence": round(float(confidence[i]), 4)}
                yield Record(int(chosen[i]), int(labels[i]), {**example, **more}, float(losses[i]))
            else:
                kept = labels[i] != IGNORED
                loss = float(losses[i][kept].mean()) if kept.any() else None
                yield Record(chosen[i][kept].tolist(), labels[i][kept].tolist(), dict(example), loss)


def classify_texts(
    model: Any,
    examples: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    names: Sequence[str],
    *,
    text: str = "text",
    label: str = "label",
    max_length: int | None = None,
    batch_size: int = 32,
) -> Iterator[Record]:
    """:func:`classify` for texts, cut to ``max_length`` tokens.

    Args:
        examples: mappings with a text and a label, which is one of ``names`` or its number.
        names: of the model's classes, in their order.
        text, label: keys of the two.
        max_length: tokens, special ones included; None takes the model's positions.

    Raises:
        ValueError: another number of names than the model has classes, a tokenizer of another model, or an example
            without text or with a label that does not exist; the message says which.
    """
    check_tokenizer(model, tokenizer)
    classes = getattr(model.config, "num_labels", None)
    if classes is not None and classes != len(names):
        raise ValueError(f"names: {len(names)} ({', '.join(names)}), but the model has {classes} classes")
    limit = max_length or getattr(model.config, "max_position_embeddings", None)
    return classify(model, _labelled(model, examples, tokenizer, names, text, label, limit, batch_size))


def generate_texts(
    model: Any,
    examples: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    source: str = "source",
    target: str = "target",
    prompt: str = "{}",
    max_length: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    **options: Any,
) -> Iterator[Record]:
    """What ``generate`` writes for each source, without spaces at its ends; greedily unless ``options`` ask otherwise.

    Args:
        model: an encoder-decoder model, or a causal one, which continues the prompt.
        examples: mappings with a source, and a target: a text or several.
        prompt: the text that the model reads, ``{}`` in the place of the source.
        max_length: tokens of the prompt that are read (a causal model's last ones); None takes all.
        options: more of :func:`fastformer.generation.generate`, such as ``num_beams`` or ``stop_strings``.

    Raises:
        ValueError: a tokenizer of another model, or an example without source or target; the message says which.
    """
    check_tokenizer(model, tokenizer)
    if "{}" not in prompt:
        raise ValueError(f"prompt: {prompt!r} has no {{}}, the place of the source")
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, **options}
    return _generated(model, examples, tokenizer, source, target, prompt, max_length, batch_size, options)


def _labelled(model, examples, tokenizer, names, text, label, limit, batch_size) -> Iterator[dict[str, Any]]:
    numbers = {name: index for index, name in enumerate(names)}
    collate = Classification(pad_token_id=_pad_token(model, tokenizer))
    for first, batch in _batches(examples, batch_size):
        samples = []
        for index, example in enumerate(batch, first):
            given, wanted = _get(example, text, index), _get(example, label, index)
            number = (
                wanted if isinstance(wanted, int) and not isinstance(wanted, bool) else numbers.get(str(wanted), -1)
            )
            if not 0 <= number < len(names):
                raise ValueError(f"example {index}: {label} {wanted!r} is not one of {', '.join(names)}")
            ids = encode(tokenizer, given, add_special_tokens=True)
            if limit is not None and len(ids) > limit:
                ids = [*ids[: limit - 1], ids[-1]]  # the last one closes the text
            samples.append({"input_ids": ids, "labels": number})
        yield {**collate(samples), "_examples": [dict(example) for example in batch]}


def _generated(model, examples, tokenizer, source, target, prompt, limit, batch_size, options) -> Iterator[Record]:
    device = next(model.parameters()).device
    answers = bool(getattr(model.config, "is_encoder_decoder", False))
    pad = _pad_token(model, tokenizer)
    end = getattr(tokenizer, "eos_token_id", None)
    end = getattr(model.config, "eos_token_id", None) if end is None else end
    for first, batch in _batches(examples, batch_size):
        sources = [_get(example, source, index) for index, example in enumerate(batch, first)]
        targets = [_get(example, target, index) for index, example in enumerate(batch, first)]
        rows = [encode(tokenizer, prompt.replace("{}", text), add_special_tokens=answers) for text in sources]
        if limit is not None:
            rows = [row[:limit] if answers else row[-limit:] for row in rows]
        for index, row in enumerate(rows, first):
            if not row:
                raise ValueError(f"example {index}: {source} has no tokens")
        if answers:
            ids, real = pad_rows(rows, pad), pad_rows([[1] * len(row) for row in rows], 0)
        else:  # a decoder continues at the right
            ids = pad_rows([row[::-1] for row in rows], pad)[:, ::-1].copy()
            real = pad_rows([[1] * len(row) for row in rows], 0)[:, ::-1].copy()
        written = generate(
            model,
            torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(real).to(device),
            tokenizer=tokenizer,
            **options,
        )
        texts = to_text(
            written,
            tokenizer,
            skip_prompt=1 if answers else ids.shape[1],
            stop_strings=options.get("stop_strings") or (),
            eos_token_id=end,
            pad_token_id=getattr(model.config, "pad_token_id", None),
        )
        for example, text, wanted in zip(batch, texts, targets):
            yield Record(text.strip(), wanted, {key: value for key, value in example.items() if key != target})


def _batches(examples: Iterable[Mapping[str, Any]], size: int) -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
    if size < 1:
        raise ValueError(f"batch_size: got {size}, expected at least 1")
    stream, first = iter(examples), 0
    while batch := list(itertools.islice(stream, size)):
        yield first, batch
        first += len(batch)


def _get(example: Mapping[str, Any], key: str, index: int) -> Any:
    if key not in example:
        raise ValueError(f"example {index}: has no {key!r}, only {', '.join(map(repr, example))}")
    return example[key]


def _pad_token(model: Any, tokenizer: Any) -> int:
    """A decoder that classifies looks for its own; elsewhere any token will do, as its positions are masked."""
    for owner in (model.config, tokenizer):
        token = getattr(owner, "pad_token_id", None)
        if token is not None and token >= 0:  # old Llamas have -1 for none
            return int(token)
    return 0
