"""Labels of texts: a BERT fine-tuned, and TF-IDF with logistic regression beside it on the same split."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastformer.data import Classification as ClassificationBatches
from fastformer.evaluation import Classification, Evaluation, Record, classify_texts, evaluate
from fastformer.extras import require
from fastformer.models import BertForSequenceClassification
from fastformer.training import Result, check_classes, objectives

from .common import Phase, Recipe, train
from .datasets import Example, Parts, movie_reviews, split, wordnet_glosses

TASKS = {"sentiment": movie_reviews, "topics": wordnet_glosses}
PENALTIES = (1.0, 4.0, 16.0)


@dataclass(frozen=True)
class ClassifierRecipe(Recipe):
    """What the recipes with labels can be told."""

    max_length: int = 64
    """Tokens of a text that are read."""
    finetune: Phase = field(default_factory=Phase)
    """Training on the labels."""


def load_task(task: str, recipe: Recipe) -> tuple[Parts, list[str]]:
    """The parts of a data set of :data:`TASKS`, and its classes in alphabetical order."""
    parts = split(TASKS[task](), lambda e: e["text"], lambda e: [e["text"]], test=0.2)
    names = sorted({example["label"] for example in parts.train})
    print(f"{task}: {parts}")
    return parts.reduced(recipe.examples, recipe.held_out), names


def with_new_head(folder: str | Path, **changes: Any) -> BertForSequenceClassification:
    """The BERT in ``folder`` for classification; its head begins at random values."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*this head starts at random values")  # to be trained is what it is here for
        return BertForSequenceClassification.from_pretrained(folder, **changes)


def encode_texts(
    examples: Sequence[Example], tokenizer: Any, max_length: int, names: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """``input_ids`` between [CLS] and [SEP], cut to ``max_length``; with ``names``, ``labels``."""
    rows = tokenizer.encode_batch([e["text"] for e in examples], add_special_tokens=True)
    rows = [[*ids[: max_length - 1], ids[-1]] if len(ids) > max_length else ids for ids in rows]
    if not names:
        return [{"input_ids": ids} for ids in rows]
    number = {name: i for i, name in enumerate(names)}
    return [{"input_ids": ids, "labels": number[e["label"]]} for ids, e in zip(rows, examples)]


def finetune(
    model: Any, parts: Parts, names: Sequence[str], tokenizer: Any, recipe: ClassifierRecipe, title: str, phase: Phase
) -> tuple[Any, Result]:
    """Trains on the labels, measuring accuracy on the validation part."""
    training = encode_texts(parts.train, tokenizer, recipe.max_length, names)
    check_classes((sample["labels"] for sample in training), len(names))

    def measure(model: Any) -> dict[str, float]:
        return {"accuracy": label(model, parts.validation, names, tokenizer, recipe).scores()["accuracy"]}

    return train(
        model,
        training,
        ClassificationBatches(tokenizer.pad_token_id),
        phase,
        objective=objectives.sequence_classification,
        held_out=encode_texts(parts.validation, tokenizer, recipe.max_length, names),
        metrics=measure,
        tokenizer=tokenizer,
        title=title,
    )


def label(
    model: Any,
    examples: Sequence[Example],
    names: Sequence[str],
    tokenizer: Any,
    recipe: ClassifierRecipe,
    records: Path | None = None,
) -> Evaluation:
    """The model's labels, scored."""
    predict = partial(classify_texts, tokenizer=tokenizer, names=names, max_length=recipe.max_length, batch_size=64)
    return evaluate(model, _by_length(examples), Classification(names), predict=predict, records=records)


def tf_idf(parts: Parts, names: Sequence[str]) -> Evaluation:
    """Words and pairs of words, weighted by TF-IDF, and logistic regression (scikit-learn).

    The strength of its regularisation is the best of :data:`PENALTIES` on the validation part.
    """
    text = require("sklearn.feature_extraction.text", "the baseline", "eval")
    linear = require("sklearn.linear_model", "the baseline", "eval")
    vectorizer = text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, strip_accents="unicode")
    train = vectorizer.fit_transform([e["text"] for e in parts.train])
    validation = vectorizer.transform([e["text"] for e in parts.validation])
    wanted, held_out = ([e["label"] for e in part] for part in (parts.train, parts.validation))
    models = [linear.LogisticRegression(C=c, max_iter=2000).fit(train, wanted) for c in PENALTIES]
    best = max(models, key=lambda model: model.score(validation, held_out))

    def predict(_model: None, examples: Iterable[Example]) -> Iterator[Record]:
        examples = list(examples)
        for example, answer in zip(examples, best.predict(vectorizer.transform([e["text"] for e in examples]))):
            yield Record(names.index(answer), names.index(example["label"]), {"text": example["text"]})

    return evaluate(None, _by_length(parts.test), Classification(names), predict=predict)


def _by_length(examples: Sequence[Example]) -> list[Example]:
    """Less padding; and the same order for every system, so that they can be compared example by example."""
    return sorted(examples, key=lambda e: len(e["text"]))
