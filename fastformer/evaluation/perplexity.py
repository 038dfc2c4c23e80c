"""Perplexity of texts, token by token, without a table of logits.

    loss = -1/N sum_i log p(t_i | t_<i),   perplexity = e^loss,   bits per byte = N loss / (ln 2 * bytes)

A text longer than the context is read through a window that moves by ``stride``, as in transformers' page on the
perplexity of fixed-length models: every token is scored once, with at least ``context - stride`` tokens before it. For
a text that fits this is one forward pass. The loss comes from ``linear_cross_entropy``, so this library's models never
make a table of logits; sums are float64, and four numbers are kept per text.

Tokenizers cut texts into different numbers of tokens. Perplexity per word and bits per byte can be compared between
models that have different ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import functional, nn
from ..data import to_device
from ..data.collators import IGNORED, pad_rows
from ..data.tokenizers import check_tokenizer, encode
from ..generation.decoding import evaluating
from ..generation.text import decode
from ..models.losses import in_float32
from ..models.pretrained import PreTrainedModel
from ..nn.submodules import is_plain
from .inputs import check_causal, context_of
from .metric import Metric, ratio
from .predictions import Record


class Perplexity(Metric):
    """Perplexity, loss, word perplexity and bits per byte of a corpus of texts."""

    name = "perplexity"
    lower_is_better = True
    columns = 4  # nats, tokens, words, bytes

    def add(self, prediction: tuple[float, int], reference: str | tuple[int, int] | None = None) -> float:
        """Counts a text and returns its loss per token.

        Args:
            prediction: (sum of -log p in nats, tokens that were scored).
            reference: the text, or its number of words and of bytes; None where only tokens are known.
        """
        nats, tokens = prediction
        if isinstance(reference, str):
            reference = (len(reference.split()), len(reference.encode("utf-8")))
        words, size = reference or (0, 0)
        self._append([nats, tokens, words, size])
        return nats / tokens if tokens else float("nan")

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        nats, tokens, words, size = np.moveaxis(np.asarray(sums, np.float64), -1, 0)
        with np.errstate(over="ignore"):
            return {
                "perplexity": np.exp(ratio(nats, tokens)),
                "loss": ratio(nats, tokens),
                "word perplexity": np.exp(ratio(nats, words)),
                "bits per byte": ratio(nats, size) / math.log(2),
            }

    def identity(self, reference: Any) -> Any:
        """The number of words: the bytes that are scored depend on the tokenizer."""
        return len(reference.split()) if isinstance(reference, str) else reference and reference[0]

    def check(self) -> None:
        """Raises ValueError without a token that was scored."""
        super().check()
        if not self.rows()[:, 1].sum():
            raise ValueError(f"perplexity: none of the {len(self)} texts has two tokens, so nothing was predicted")


def perplexity(
    model: Any,
    texts: str | Tensor | Iterable[str | Tensor],
    tokenizer: Any = None,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    prefix_token_id: int | None = None,
) -> Perplexity:
    """How well ``model`` predicts ``texts``; ``.compute()`` of the result has the scores.

    >>> perplexity(model, open("held-out.txt").read(), tokenizer).compute()["perplexity"]

    Args:
        model: a causal language model of this library or of ``transformers``.
        texts: a text, or many, each scored by itself; or their tokens, (N,) int64.
        tokenizer: needed for text.
        context: tokens the model reads at a time; None takes all its positions.
        stride: tokens the window moves by, at most ``context``; None takes half. A smaller one gives more context, and
            takes ``context / stride`` times as long.
        batch_size: windows at a time.
        prefix_token_id: read before each text, so that its first token is scored as well; such as the token
            that separates documents. Without one the first token is given, and its bytes are not counted.

    Returns:
        The metric, for :func:`fastformer.evaluation.confidence_intervals` too, where there are several texts.

    Raises:
        TypeError: texts of another type.
        ValueError: no texts, a tokenizer of another model, or an argument out of range, before the model runs.
    """
    metric = Perplexity()
    options = {"context": context, "stride": stride, "batch_size": batch_size, "prefix_token_id": prefix_token_id}
    for nats, tokens, size in score_texts(model, texts, tokenizer, **options):
        metric.add((nats, tokens), size)
    metric.check()
    return metric


def score_texts(
    model: Any,
    texts: str | Tensor | Iterable[str | Tensor],
    tokenizer: Any = None,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    prefix_token_id: int | None = None,
) -> Iterator[tuple[float, int, tuple[int, int]]]:
    """(nats, scored tokens, (words, bytes)) of each text in turn; arguments and errors as in :func:`perplexity`."""
    check_causal(model)
    if tokenizer is not None:
        check_tokenizer(model, tokenizer)
    context = context_of(model, context)
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride: got {stride}, expected 1 to the context of {context} tokens")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    single = isinstance(texts, (str, Tensor))
    return _scored(model, [texts] if single else texts, tokenizer, context, stride, batch_size, prefix_token_id)


def score_examples(
    model: Any, examples: Iterable[Mapping[str, Any]], tokenizer: Any, *, text: str = "text", **options: Any
) -> Iterator[Record]:
    """The texts of ``examples`` as records for :func:`fastformer.evaluation.evaluate`, with a :class:`Perplexity`.

    Args:
        text: key of the text.
        options: of :func:`perplexity`.
    """
    waiting: deque[Mapping[str, Any]] = deque()

    def texts() -> Iterator[str]:
        for index, example in enumerate(examples):
            if text not in example:
                raise ValueError(f"example {index}: has no {text!r}, only {', '.join(map(repr, example))}")
            waiting.append(example)
            yield example[text]

    for nats, tokens, size in score_texts(model, texts(), tokenizer, **options):
        yield Record((nats, tokens), size, dict(waiting.popleft()), nats / tokens if tokens else None)


def score_batches(model: Any, batches: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    """What batches have labels for, as records for :func:`fastformer.evaluation.evaluate` with a :class:`Perplexity`:
    the answers of an encoder-decoder model, the masked words of an encoder, the text of a causal model.

    Args:
        batches: the model's arguments; ``labels`` (B, S), -100 = not scored, in line with input_ids for a causal model;
            or ``shift_labels`` (B, S), what comes after each position.
    """
    device = next(model.parameters()).device
    causal = (
        not getattr(model.config, "is_encoder_decoder", False) and getattr(model.config, "model_type", "") != "bert"
    )
    for batch in batches:
        inputs = to_device({k: v for k, v in batch.items() if not k.startswith("_")}, device)
        targets = inputs.pop("shift_labels", None)
        if targets is None:
            if "labels" not in inputs:
                raise ValueError(f"batch: has {', '.join(batch)}; it needs labels or shift_labels to score")
            # An encoder-decoder model makes its decoder's inputs from the labels.
            targets = inputs.pop("labels") if causal else inputs["labels"]
            targets = torch.nn.functional.pad(targets[:, 1:], (0, 1), value=IGNORED) if causal else targets
        with torch.no_grad(), evaluating(model):
            if causal:
                losses = token_losses(model, inputs.pop("input_ids"), targets, **inputs)
            else:
                losses = _of_logits(model(**inputs).logits, targets)
        nats, counts = losses.double().sum(dim=1).tolist(), (targets != IGNORED).sum(dim=1).tolist()
        for total, count in zip(nats, counts):
            yield Record((total, count), None, loss=total / count if count else None)


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first) of the windows over ``length`` inputs: [begin, end) is read, [first, end) is scored."""
    done = 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        yield begin, end, done
        done = end
        if end == length:
            return


def token_losses(model: Any, input_ids: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    """-log p of each target after the tokens before it: both ``(B, S)`` int64 -> ``(B, S)`` float32 (float64 for a
    float64 model), 0 where the target is -100. Padding goes to the right, where no earlier position sees it; ``inputs``
    are more of the model's arguments."""
    hidden = hidden_states(model, input_ids, **inputs)
    if hidden is not None:
        head = model.get_output_embeddings()
        half = hidden.dtype in (torch.float16, torch.bfloat16)
        # Autocast to the dtype that they have: the losses come in float32.
        with torch.autocast(hidden.device.type, hidden.dtype if half else torch.bfloat16, enabled=half):
            return functional.linear_cross_entropy(
                hidden, head.weight, targets, linear_bias=head.bias, reduction="none"
            )
    return _of_logits(model(input_ids, use_cache=False, **inputs).logits, targets)


def _of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    losses = functional.cross_entropy(in_float32(logits).flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def hidden_states(model: Any, input_ids: Tensor, **inputs: Any) -> Tensor | None:
    """What the head of one of this library's models is given, ``(B, S, E)``; None for another model, or a head that is
    more than a linear layer."""
    if isinstance(model, PreTrainedModel) and is_plain(model.get_output_embeddings(), torch.nn.Linear, nn.Linear):
        return getattr(model, model.base_model_prefix)(input_ids, use_cache=False, **inputs).last_hidden_state
    return None


def _scored(
    model, texts, tokenizer, context, stride, batch_size, prefix
) -> Iterator[tuple[float, int, tuple[int, int]]]:
    """Fills batches with windows of one text after another; yields each text when its last window has run."""
    waiting: list[list[Any]] = []  # of each text not yet yielded: nats, tokens, (words, bytes), windows to come
    batch: list[tuple[list[Any], list[int], list[int]]] = []
    for text in texts:
        ids, size = _tokens(text, tokenizer, prefix, model)
        # No window is to come yet, so that a text of one token is not waited for.
        state = [0.0, 0, size, 0]
        waiting.append(state)
        pieces = list(windows(len(ids) - 1, context, stride))
        state[3] = len(pieces)
        for begin, end, first in pieces:
            scored = [IGNORED] * (first - begin) + ids[first + 1 : end + 1]
            batch.append((state, ids[begin:end], scored))
            state[1] += end - first
            if len(batch) == batch_size:
                _run(model, batch)
                batch.clear()
        while waiting and not waiting[0][3]:
            yield tuple(waiting.pop(0)[:3])
    if batch:
        _run(model, batch)
    yield from (tuple(state[:3]) for state in waiting)


def _run(model: Any, batch: list[tuple[list[Any], list[int], list[int]]]) -> None:
    device = next(model.parameters()).device
    inputs, targets = (
        torch.from_numpy(pad_rows([window[part] for window in batch], fill)).to(device)
        for part, fill in ((1, 0), (2, IGNORED))
    )
    with torch.no_grad(), evaluating(model):
        sums = token_losses(model, inputs, targets).double().sum(dim=1).tolist()
    for (state, _, _), nats in zip(batch, sums):
        state[0] += nats
        state[3] -= 1


def _tokens(text: Any, tokenizer: Any, prefix: int | None, model: Any) -> tuple[list[int], tuple[int, int]]:
    """Ids with the prefix before them, and the words and bytes that are scored."""
    words = size = 0
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("tokenizer: is needed for texts")
        ids = encode(tokenizer, text)
        words, size = len(text.split()), len(text.encode("utf-8"))
        if prefix is None and ids:  # the first token is given, not predicted
            size -= len(decode(tokenizer, ids[:1]).encode("utf-8"))
    elif isinstance(text, Tensor) and text.dim() == 1 and not text.is_floating_point():
        ids = text.tolist()
    else:
        raise TypeError(f"texts: expected text or (N,) int64 tokens, got {getattr(text, 'shape', type(text).__name__)}")
    wrong = [index for index in ids if not 0 <= index < model.config.vocab_size]
    if wrong:
        raise ValueError(f"texts: token {wrong[0]} is not in [0, {model.config.vocab_size}), the model's vocabulary")
    return ([] if prefix is None else [prefix]) + ids, (words, size)
