"""Letters to phonemes with a T5 from nothing: span corruption on the dictionary's lines, then the pairs.

CMUdict without stress, split by word as CMU Sphinx's g2p-seq2seq does. A word is an error unless the answer is one of
its pronunciations. Beside it, on the same words: the GRU that the package g2p-en ships (gru.py), and the published
word error rates of g2p-seq2seq's README for this dictionary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastformer.data import SpanCorruption, SubwordTokenizer, load_tokenizer
from fastformer.data.subword import T5_TOKENS
from fastformer.evaluation import ErrorRate, evaluate
from fastformer.extras import require
from fastformer.training import objectives
from fastformer.training.logs import read_metrics
from fastformer.training.plots import plot_curve

from ..common import Phase, conclude, fresh, main, pretrain
from ..datasets import Example, Parts, pronunciations, split_pronunciations
from ..seq2seq import Seq2SeqRecipe, answer, build, by_length, records_file, train_on_pairs
from .gru import pronounce

ERRORS = "examples with an error"
PUBLISHED = {"WFST (Phonetisaurus), published": 0.3389, "Transformer, 2 x 256, published": 0.31}
SENTINELS = 16


@dataclass(frozen=True)
class GraphemeToPhoneme(Seq2SeqRecipe):
    """Say words: letters to phonemes, learned from CMUdict."""

    pretraining: bool = True
    """First learn to fill gaps in the lines of the dictionary: a word and its pronunciation."""
    pretrain: Phase = field(default_factory=Phase)
    """That first part."""


def run(recipe: GraphemeToPhoneme) -> dict[str, Any]:
    """The whole recipe; returns what it wrote to results.json."""
    everything = split_pronunciations(pronunciations())
    print(everything)
    parts = Parts(*(spelled(part) for part in (everything.train, everything.validation, everything.test)))
    parts = parts.reduced(recipe.examples, recipe.held_out)
    pairs = [{**e, "target": target} for e in parts.train for target in e["target"]]
    start = fresh(recipe, lambda: symbols(everything.train), lambda tokenizer: build(recipe, tokenizer))
    tokenizer = load_tokenizer(start)
    if recipe.pretraining:
        start, _ = pretrain(
            recipe,
            recipe.pretrain,
            start,
            unlabelled(pairs, tokenizer),
            unlabelled([{**e, "target": e["target"][0]} for e in parts.validation], tokenizer),
            SpanCorruption(tokenizer.sentinel_ids, density=0.3, mean_span=2.0),
            objectives.seq2seq,
            "Span corruption",
        )
    model, result = train_on_pairs(recipe, start, tokenizer, pairs, parts.validation, lambda: ErrorRate("PER"))
    curve = compute_curve(recipe, model, pairs)
    options = {"num_beams": recipe.num_beams, "records": records_file(recipe)}
    found = answer(model, parts.test, tokenizer, recipe, ErrorRate("PER"), **options)
    gru = evaluate(None, by_length(parts.test), ErrorRate("PER"), predict=pronounce)
    published = {name: {ERRORS: error} for name, error in PUBLISHED.items()}
    return conclude(
        found,
        recipe,
        title="Letters to phonemes, CMUdict",
        baselines={"GRU of g2p-en": gru, **published},
        more={"steps": result.steps, "seconds": result.seconds, "curve": curve},
    )


def spelled(examples: Sequence[Example]) -> list[Example]:
    """``source`` with spaces between the letters, ``target`` all pronunciations, any of which is right; ``word``."""
    return [{"source": " ".join(e["source"]), "target": e["targets"], "word": e["source"]} for e in examples]


def symbols(examples: Sequence[Example]) -> SubwordTokenizer:
    """A token for each letter (lower case) and each phoneme (upper case), and T5's special tokens."""
    tokenizers = require("tokenizers", "the tokenizer of letters and phonemes", "train")
    letters = {letter for e in examples for letter in e["source"]}
    phonemes = {phoneme for e in examples for target in e["targets"] for phoneme in target.split()}
    names = [*T5_TOKENS.values(), *sorted(letters), *sorted(phonemes)]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, T5_TOKENS["unk"])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*T5_TOKENS.values(), *(f"<extra_id_{i}>" for i in reversed(range(SENTINELS)))])
    end = T5_TOKENS["eos"]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, names.index(end))]
    )
    return SubwordTokenizer(tokenizer, T5_TOKENS)


def unlabelled(pairs: Sequence[Example], tokenizer: Any) -> list[dict[str, Any]]:
    """A line for each pair: words and pronunciations apart would teach the decoder to do without the encoder."""
    lines = sorted({f"{e['source']} {e['target']}" for e in pairs})
    return [{"input_ids": ids} for ids in tokenizer.encode_batch(lines)]


def compute_curve(recipe: GraphemeToPhoneme, model: Any, pairs: Sequence[Example]) -> list[dict[str, float]]:
    """Word error on the measured validation words against the arithmetic of fine-tuning so far: a plot and a file.

    A token costs six operations a weight (forward and backward) in the stack that reads or writes it; the attention's
    own products are left out, as these sequences are short.
    """
    reader, writer = (sum(p.numel() for p in stack.block.parameters()) for stack in (model.encoder, model.decoder))
    head = model.config.vocab_size * model.config.d_model
    read, written = (sum(len(e[side].split()) + 1 for e in pairs) / len(pairs) for side in ("source", "target"))
    example = 6 * (read * reader + written * (writer + head))
    each = example * recipe.finetune.data.batch_size * recipe.finetune.optimizer.accumulate
    records = [r for r in read_metrics(Path(recipe.out, "finetune")) if ERRORS in r]
    points = [{"step": r["step"], "flops": r["step"] * each, "word_error": r[ERRORS]} for r in records]
    plot_curve(
        [(point["flops"] / 1e12, point["word_error"]) for point in points],
        Path(recipe.out, "curve.png"),
        title="Word error on held-out words (greedy)",
        labels=("TFLOP of fine-tuning", "word error"),
        references=PUBLISHED,
    )
    Path(recipe.out, "curve.json").write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
    return points


if __name__ == "__main__":
    main(run, GraphemeToPhoneme, __file__)
