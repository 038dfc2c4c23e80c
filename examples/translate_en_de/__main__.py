"""English to German with a T5 from nothing, on the paragraphs of LibreOffice's help; BLEU and chrF by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastformer.data import load_tokenizer
from fastformer.evaluation import BLEU, ChrF

from ..common import conclude, main
from ..datasets import help_pages, split
from ..seq2seq import Seq2SeqRecipe, answer, fresh_t5, records_file, train_on_pairs


@dataclass(frozen=True)
class Translate(Seq2SeqRecipe):
    """Translate English to German, learned from a program's help."""


def run(recipe: Translate) -> dict[str, Any]:
    """The whole recipe; returns what it wrote to results.json."""
    # Pages are held out whole. What is left of them is text that no other page has.
    parts = split(help_pages(), lambda e: e["page"], lambda e: [e["source"]])
    print(parts)
    parts = parts.reduced(recipe.examples, recipe.held_out)
    start = fresh_t5(recipe, parts)
    tokenizer = load_tokenizer(start)
    model, result = train_on_pairs(recipe, start, tokenizer, parts.train, parts.validation, ChrF)
    found = answer(
        model, parts.test, tokenizer, recipe, [BLEU(), ChrF()], num_beams=recipe.num_beams, records=records_file(recipe)
    )
    copies = answer_with_source(parts.test)
    return conclude(
        found,
        recipe,
        title="English to German, LibreOffice help",
        baselines={"English left as it is": copies},
        more={"steps": result.steps, "seconds": result.seconds},
    )


def answer_with_source(examples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What not translating scores: names, formulas and numbers are the same in both languages."""
    metrics = BLEU(), ChrF()
    for example in examples:
        for metric in metrics:
            metric.add(example["source"], example["target"])
    return {metric.headline: metric.compute()[metric.headline] for metric in metrics}


if __name__ == "__main__":
    main(run, Translate, __file__)
