"""Text to text with a T5 trained from nothing: the tokenizer, the model, training, and the answers scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastformer.data import train_tokenizer
from fastformer.evaluation import Evaluation, Metric, evaluate, generate_texts
from fastformer.models import T5Config, T5ForConditionalGeneration
from fastformer.training import Result
from fastformer.training.finetune import FinetuneConfig

from .common import Recipe, fresh, tune
from .datasets import Example, Parts, evenly


@dataclass(frozen=True)
class Shape:
    """Of the T5."""

    layers: int = 3
    """Blocks of the encoder, and as many of the decoder."""
    width: int = 256
    """Of the residual stream."""
    heads: int = 4
    """Attention heads; divides width."""
    feed_forward: int = 1024
    """Width inside the feed-forward network, of which there are two halves (GEGLU)."""
    dropout: float = 0.1
    """Everywhere that T5 has it."""


@dataclass(frozen=True)
class Seq2SeqRecipe(Recipe):
    """What the recipes of text to text can be told."""

    vocab_size: int = 8192
    """Tokens of the tokenizer that is trained on both sides of the training pairs."""
    max_answer: int = 128
    """Tokens that are written at most."""
    num_beams: int = 1
    """Of the answers that are scored at the end; 1 is greedy."""
    measured: int = 256
    """Validation examples that are answered while training, greedily."""
    model: Shape = field(default_factory=Shape)
    finetune: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(task="seq2seq"))
    """Training on the pairs."""


def build(recipe: Seq2SeqRecipe, tokenizer: Any) -> T5ForConditionalGeneration:
    """A T5 for the tokenizer, with GEGLU as in T5 1.1 and tied embeddings as in the first T5."""
    shape = recipe.model
    config = T5Config(
        vocab_size=tokenizer.vocab_size,
        d_model=shape.width,
        d_kv=shape.width // shape.heads,
        d_ff=shape.feed_forward,
        num_layers=shape.layers,
        num_heads=shape.heads,
        dropout_rate=shape.dropout,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def fresh_t5(recipe: Seq2SeqRecipe, parts: Parts) -> Path:
    """A directory with a new T5 and a unigram tokenizer, as T5's, for sources and targets alike."""
    texts = (example[side] for example in parts.train for side in ("source", "target"))
    return fresh(
        recipe,
        lambda: train_tokenizer("unigram", texts, recipe.vocab_size, sentinels=0),
        lambda tokenizer: build(recipe, tokenizer),
    )


def train_on_pairs(
    recipe: Seq2SeqRecipe,
    start: Path,
    tokenizer: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    metric: Callable[[], Metric],
) -> tuple[Any, Result]:
    """Fine-tunes on ``train``; what ``metric()`` scores on some of ``validation`` is logged beside its loss."""
    measured = evenly(validation, recipe.measured)

    def measure(model: Any) -> dict[str, float]:
        return answer(model, measured, tokenizer, recipe, metric()).scores()

    # The loss is that of one answer, where there are several.
    one = [{**e, "target": e["target"] if isinstance(e["target"], str) else e["target"][0]} for e in validation]
    return tune(recipe, recipe.finetune, start, train, one, measure)


def answer(
    model: Any, examples: Sequence[Example], tokenizer: Any, recipe: Seq2SeqRecipe, metrics: Any, **options: Any
) -> Evaluation:
    """The model's answers, scored; ``options`` are of ``evaluate``, or ``num_beams``."""
    predict = partial(
        generate_texts,
        tokenizer=tokenizer,
        max_length=recipe.finetune.data.max_length or None,
        max_new_tokens=recipe.max_answer,
        num_beams=options.pop("num_beams", 1),
        batch_size=64,
    )
    # Those of similar length together: less padding, and a batch that ends sooner.
    return evaluate(model, by_length(examples), metrics, predict=predict, **options)


def by_length(examples: Sequence[Example]) -> list[Example]:
    """The order in which every system is asked."""
    return sorted(examples, key=lambda e: len(e["source"]))


def records_file(recipe: Recipe) -> Path:
    """Where the test's answers go, a line of JSON each."""
    return Path(recipe.out, "records.jsonl")
