"""A small BERT from nothing: masked words on unlabelled text, then the sentiment of film reviews.

The text is what the other recipes read (definitions of WordNet, descriptions of Debian packages, sentences of reviews,
tweets and editorials), without the reviews that are held out. The same network is also fine-tuned from random weights,
so that one sees what the masked words were good for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastformer.data import MaskedLM, load_tokenizer, train_tokenizer
from fastformer.models import BertConfig, BertForMaskedLM
from fastformer.training import objectives

from ..classifiers import ClassifierRecipe, label, load_task, tf_idf, tune_classifier
from ..common import Phase, conclude, fresh, main, pretrain
from ..datasets import Example, Parts, evenly, package_descriptions, unlabelled_reviews, wordnet_glosses


@dataclass(frozen=True)
class Shape:
    """Of the BERT."""

    layers: int = 4
    """Blocks."""
    width: int = 256
    """Of the residual stream."""
    heads: int = 4
    """Attention heads; divides width."""
    feed_forward: int = 1024
    """Width inside the feed-forward network."""
    dropout: float = 0.1
    """Of hidden states."""


@dataclass(frozen=True)
class BertFromScratch(ClassifierRecipe):
    """Train a BERT from nothing on masked words, then on sentiment."""

    max_length: int = 64
    """Tokens of a text that are read."""
    vocab_size: int = 8192
    """Tokens of the WordPiece tokenizer that is trained."""
    whole_words: bool = True
    """Mask whole words, not pieces of them."""
    model: Shape = field(default_factory=Shape)
    pretrain: Phase = field(default_factory=Phase)
    """Masked words."""


def run(recipe: BertFromScratch) -> dict[str, Any]:
    """The whole recipe; returns what it wrote to results.json."""
    parts, names = load_task("sentiment", recipe)
    texts = unlabelled(parts, recipe.examples)
    print(f"{len(texts):,} unlabelled texts, {sum(len(e['text']) for e in texts) / 1e6:.1f} M characters")
    words = (e["text"] for e in texts)
    start = fresh(
        recipe,
        lambda: train_tokenizer("wordpiece", words, recipe.vocab_size),
        lambda tokenizer: build(recipe, tokenizer),
    )
    tokenizer = load_tokenizer(start)
    trained, pretraining = pretrain(
        recipe,
        recipe.pretrain,
        start,
        encode_texts(texts, tokenizer, recipe.max_length),
        encode_texts(parts.validation, tokenizer, recipe.max_length),
        MaskedLM.for_tokenizer(tokenizer, whole_words=recipe.whole_words),
        objectives.masked_lm,
        "Masked words",
    )
    found = {}
    for folder, begin in (("random", start), ("finetune", trained)):
        model, result = tune_classifier(recipe, begin, parts, names, tokenizer, folder)
        found[folder] = label(model, parts.test, names, tokenizer, recipe, Path(recipe.out, f"{folder}.jsonl"))
    return conclude(
        found["finetune"],
        recipe,
        title="BERT from nothing: masked words, then sentiment",
        baselines={
            "the same without masked words": found["random"],
            "TF-IDF, logistic regression": tf_idf(parts, names),
        },
        more={"masked_lm_loss": pretraining.validation_loss, "seconds": pretraining.seconds + result.seconds},
    )


def build(recipe: BertFromScratch, tokenizer: Any) -> BertForMaskedLM:
    """A BERT for the tokenizer."""
    shape = recipe.model
    return BertForMaskedLM(
        BertConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.feed_forward,
            hidden_dropout_prob=shape.dropout,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=recipe.max_length,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode_texts(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """``input_ids`` between [CLS] and [SEP], cut to ``max_length``."""
    rows = tokenizer.encode_batch([e["text"] for e in examples], add_special_tokens=True)
    return [{"input_ids": [*ids[: max_length - 1], ids[-1]] if len(ids) > max_length else ids} for ids in rows]


def unlabelled(parts: Parts, most: int = 0) -> list[Example]:
    """Texts of about a sentence or a paragraph, each once, without the held-out reviews."""
    held_out = {e["text"] for e in (*parts.validation, *parts.test)}

    def texts() -> Iterable[str]:
        for example in (*parts.train, *unlabelled_reviews(), *wordnet_glosses()):
            yield example["text"]
        for example in package_descriptions():
            yield from example["source"].split("\n")

    kept = [text for text in dict.fromkeys(texts()) if text not in held_out]
    return [{"text": text} for text in evenly(kept, most)]


if __name__ == "__main__":
    main(run, BertFromScratch, __file__)
