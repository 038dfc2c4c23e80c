"""A package's long description to its one-line synopsis with a T5 from nothing; ROUGE by rouge-score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fastformer.data import load_tokenizer
from fastformer.evaluation import ROUGE, Record, evaluate

from ..common import conclude, main
from ..datasets import Example, long_paragraphs, package_descriptions, split
from ..seq2seq import Seq2SeqRecipe, answer, by_length, fresh_t5, records_file, train_on_pairs


@dataclass(frozen=True)
class Summarise(Seq2SeqRecipe):
    """Write the one-line synopsis of a Debian package from its description."""


def run(recipe: Summarise) -> dict[str, Any]:
    """The whole recipe; returns what it wrote to results.json."""
    # Packages built from one source share paragraphs: none of a held-out description is in a training one.
    parts = split(package_descriptions(), lambda e: e["source"].split("\n")[0], long_paragraphs)
    print(parts)
    parts = parts.reduced(recipe.examples, recipe.held_out)
    start = fresh_t5(recipe, parts)
    tokenizer = load_tokenizer(start)
    model, result = train_on_pairs(recipe, start, tokenizer, parts.train, parts.validation, ROUGE)
    found = answer(
        model, parts.test, tokenizer, recipe, ROUGE(), num_beams=recipe.num_beams, records=records_file(recipe)
    )
    return conclude(
        found,
        recipe,
        title="Package descriptions to synopses",
        baselines={"first sentence": evaluate(None, by_length(parts.test), ROUGE(), predict=first_sentences)},
        more={"steps": result.steps, "seconds": result.seconds},
    )


def first_sentences(_model: Any, examples: Iterable[Example]) -> Iterator[Record]:
    """The summary that is hard to beat in news: the first sentence, here at most 80 characters of it."""
    for example in examples:
        sentence = example["source"].split("\n")[0].split(". ")[0]
        yield Record(sentence if len(sentence) <= 80 else sentence[:80].rsplit(" ", 1)[0], example["target"])


if __name__ == "__main__":
    main(run, Summarise, __file__)
