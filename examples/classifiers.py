"""Labels of texts: a BERT fine-tuned, and TF-IDF with logistic regression beside it on the same split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastformer.evaluation import Classification, Evaluation, Record, classify_texts, evaluate
from fastformer.extras import require
from fastformer.training import Result
from fastformer.training.finetune import FinetuneConfig

from .common import Recipe, tune
from .datasets import Example, Parts, movie_reviews, split, wordnet_glosses

TASKS = {"sentiment": movie_reviews, "topics": wordnet_glosses}
PENALTIES = (1.0, 4.0, 16.0)


@dataclass(frozen=True)
class ClassifierRecipe(Recipe):
    """What the recipes with labels can be told."""

    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Training on the labels."""


def load_task(task: str, recipe: Recipe) -> tuple[Parts, list[str]]:
    """The parts of a data set of :data:`TASKS`, and its classes in alphabetical order."""
    parts = split(TASKS[task](), lambda e: e["text"], lambda e: [e["text"]], test=0.2)
    names = sorted({example["label"] for example in parts.train})
    print(f"{task}: {parts}")
    return parts.reduced(recipe.examples, recipe.held_out), names


def tune_classifier(
    recipe: ClassifierRecipe, start: Path, parts: Parts, names: Sequence[str], tokenizer: Any, folder: str = "finetune"
) -> tuple[Any, Result]:
    """Fine-tunes the model in ``start`` on the labels, measuring accuracy on the validation part."""

    def measure(model: Any) -> dict[str, float]:
        return {"accuracy": label(model, parts.validation, names, tokenizer, recipe).scores()["accuracy"]}

    return tune(recipe, recipe.finetune, start, parts.train, parts.validation, measure, folder)


def label(
    model: Any,
    examples: Sequence[Example],
    names: Sequence[str],
    tokenizer: Any,
    recipe: ClassifierRecipe,
    records: Path | None = None,
) -> Evaluation:
    """The model's labels, scored."""
    limit = recipe.finetune.data.max_length or None
    predict = partial(classify_texts, tokenizer=tokenizer, names=names, max_length=limit, batch_size=64)
    return evaluate(model, _by_length(examples), Classification(names), predict=predict, records=records)


def tf_idf(parts: Parts, names: Sequence[str]) -> Evaluation:
    """Words and pairs of words, weighted by TF-IDF, and logistic regression, one class against the rest (scikit-learn).

    The strength of its regularisation is the best of :data:`PENALTIES` on the validation part.
    """
    text = require("sklearn.feature_extraction.text", "the baseline", "eval")
    linear = require("sklearn.linear_model", "the baseline", "eval")
    multiclass = require("sklearn.multiclass", "the baseline", "eval")
    vectorizer = text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, strip_accents="unicode")
    train = vectorizer.fit_transform([e["text"] for e in parts.train])
    validation = vectorizer.transform([e["text"] for e in parts.validation])
    wanted, held_out = ([e["label"] for e in part] for part in (parts.train, parts.validation))
    # liblinear: minutes become seconds where there are many classes and words.
    regressions = (linear.LogisticRegression(C=c, solver="liblinear") for c in PENALTIES)
    models = [multiclass.OneVsRestClassifier(regression).fit(train, wanted) for regression in regressions]
    best = max(models, key=lambda model: model.score(validation, held_out))

    def predict(_model: None, examples: Iterable[Example]) -> Iterator[Record]:
        examples = list(examples)
        for example, answer in zip(examples, best.predict(vectorizer.transform([e["text"] for e in examples]))):
            yield Record(names.index(answer), names.index(example["label"]), {"text": example["text"]})

    return evaluate(None, _by_length(parts.test), Classification(names), predict=predict)


def _by_length(examples: Sequence[Example]) -> list[Example]:
    """Less padding; and the same order for every system, so that they can be compared example by example."""
    return sorted(examples, key=lambda e: len(e["text"]))
