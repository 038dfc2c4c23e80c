"""A small BERT from nothing: masked words on unlabelled text, then the sentiment of film reviews.

The text is what the other recipes read (definitions of WordNet, descriptions of Debian packages, sentences of reviews,
tweets and editorials), without the reviews that are held out. The same network is also fine-tuned from random weights,
so that one sees what the masked words were good for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastformer.data import MaskedLM, train_tokenizer
from fastformer.models import BertConfig, BertForMaskedLM, BertForSequenceClassification
from fastformer.training import objectives

from ..classifiers import ClassifierRecipe, encode_texts, finetune, label, load_task, tf_idf, with_new_head
from ..common import Phase, conclude, seeded, start, tokenizer_of, train
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
    tokenizer = tokenizer_of(recipe, lambda: train_tokenizer("wordpiece", words, recipe.vocab_size))
    shape = recipe.model
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.feed_forward,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=recipe.max_length,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(names)),
    )
    _, pretraining = train(
        seeded(recipe, lambda: BertForMaskedLM(config)),
        encode_texts(texts, tokenizer, recipe.max_length),
        MaskedLM.for_tokenizer(tokenizer, whole_words=recipe.whole_words),
        recipe.phase("pretrain"),
        objective=objectives.masked_lm,
        held_out=encode_texts(parts.validation, tokenizer, recipe.max_length),
        tokenizer=tokenizer,
        title="Masked words",
    )
    trained = Path(recipe.out, "pretrain", "checkpoint")
    models = {
        "random": lambda: BertForSequenceClassification(config),
        "finetune": lambda: with_new_head(trained),
    }
    found = {}
    for name, make in models.items():
        phase = recipe.phase("finetune", name)
        model, result = finetune(seeded(recipe, make), parts, names, tokenizer, recipe, f"Sentiment ({name})", phase)
        found[name] = label(model, parts.test, names, tokenizer, recipe, Path(recipe.out, f"{name}.jsonl"))
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
    start(run, BertFromScratch, __file__)
