"""Text to text with a T5 trained from nothing: pairs to tokens, the model, training, and the answers scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastformer.data import Seq2Seq, train_tokenizer
from fastformer.evaluation import Evaluation, Metric, evaluate, generate_texts
from fastformer.models import T5Config, T5ForConditionalGeneration
from fastformer.training import Result, objectives

from .common import Phase, Recipe, seeded, tokenizer_of, train
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
    max_source: int = 128
    """Tokens of a source that are read."""
    max_target: int = 128
    """Tokens of a target; a training pair with a longer one is left out, and so many are written at most."""
    num_beams: int = 1
    """Of the answers that are scored at the end; 1 is greedy."""
    measured: int = 256
    """Validation examples that are answered while training, greedily."""
    model: Shape = field(default_factory=Shape)
    finetune: Phase = field(default_factory=Phase)
    """Training on the pairs."""


def train_on_both_sides(parts: Parts, recipe: Seq2SeqRecipe) -> Any:
    """A unigram tokenizer, as T5's, for sources and targets alike."""
    texts = (example[side] for example in parts.train for side in ("source", "target"))
    return tokenizer_of(recipe, lambda: train_tokenizer("unigram", texts, recipe.vocab_size, sentinels=0))


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
    return seeded(recipe, lambda: T5ForConditionalGeneration(config))


def encode_pairs(examples: Sequence[Example], tokenizer: Any, max_source: int, max_target: int) -> list[dict[str, Any]]:
    """``input_ids`` and ``labels``, each ending with </s> unless the source was cut; pairs with a target that is too
    long, or with a side that is empty, are left out."""
    sources = tokenizer.encode_batch([e["source"] for e in examples], add_special_tokens=True)
    targets = tokenizer.encode_batch([e["target"] for e in examples], add_special_tokens=True)
    return [
        {"input_ids": source[:max_source], "labels": target}
        for source, target in zip(sources, targets)
        if len(source) > 1 and 1 < len(target) <= max_target
    ]


def answer(
    model: Any, examples: Sequence[Example], tokenizer: Any, recipe: Seq2SeqRecipe, metrics: Any, **options: Any
) -> Evaluation:
    """The model's answers, scored; ``options`` are of ``evaluate``, or ``num_beams``."""
    how = {"max_length": recipe.max_source, "max_new_tokens": recipe.max_target, "batch_size": 64}
    how["num_beams"] = options.pop("num_beams", 1)
    predict = partial(generate_texts, tokenizer=tokenizer, **how)
    # Those of similar length together: less padding, and a batch that ends sooner.
    return evaluate(model, sorted(examples, key=lambda e: len(e["source"])), metrics, predict=predict, **options)


def finetune(
    model: Any,
    parts: Parts,
    tokenizer: Any,
    recipe: Seq2SeqRecipe,
    metric: Callable[[], Metric],
    pairs: Sequence[Example] | None = None,
    title: str = "pairs",
) -> tuple[Any, Result]:
    """Trains on ``pairs`` (default: the training part), measuring ``metric()`` on some of the validation part.

    Each measurement is logged under the metric's first score.
    """
    measured = evenly(parts.validation, recipe.measured)

    def measure(model: Any) -> dict[str, float]:
        return answer(model, measured, tokenizer, recipe, metric()).scores()

    limits = recipe.max_source, recipe.max_target
    one = [{**e, "target": e["target"] if isinstance(e["target"], str) else e["target"][0]} for e in parts.validation]
    return train(
        model,
        encode_pairs(pairs if pairs is not None else parts.train, tokenizer, *limits),
        Seq2Seq(tokenizer.pad_token_id),
        recipe.phase("finetune"),
        objective=objectives.seq2seq,
        held_out=encode_pairs(one, tokenizer, *limits),
        metrics=measure,
        tokenizer=tokenizer,
        title=title,
    )


def records_file(recipe: Recipe) -> Path:
    """Where the test's answers go, a line of JSON each."""
    return Path(recipe.out, "records.jsonl")
