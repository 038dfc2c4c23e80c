"""BLEU, chrF, ROUGE and error rates: the numbers of the packages, from sums of sentence statistics."""

import random

import numpy as np
import pytest

jiwer = pytest.importorskip("jiwer", reason="jiwer is not installed (pip install 'fastformer[eval]')")
sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (pip install 'fastformer[eval]')")
pytest.importorskip("rouge_score", reason="rouge-score is not installed (pip install 'fastformer[eval]')")
from rouge_score.rouge_scorer import RougeScorer

from fastformer.evaluation.text import BLEU, ROUGE, ChrF, ErrorRate, Mean, exact_match

WORDS = "the a cat dog sat on under mat , quickly house and saw . Berlin ‘quoted’ don't 3.5".split()


def corpus(examples=40, references=1, seed=0):
    """Outputs and references that share most of their words."""
    draw = random.Random(seed)
    outputs, targets = [], []
    for _ in range(examples):
        target = draw.choices(WORDS, k=draw.randint(1, 14))
        outputs.append(" ".join(word for word in target if draw.random() < 0.8) or "the")
        targets.append([" ".join(target), *(" ".join(draw.choices(WORDS, k=8)) for _ in range(references - 1))])
    return outputs, targets


def scored(metric, outputs, targets):
    for output, target in zip(outputs, targets):
        metric.add(output, target if len(target) > 1 else target[0])
    return metric


@pytest.mark.parametrize("references", [1, 3])
@pytest.mark.parametrize(
    "kind, theirs, options",
    [
        (BLEU, sacrebleu.BLEU, {}),
        (BLEU, sacrebleu.BLEU, {"tokenize": "char", "lowercase": True}),
        (ChrF, sacrebleu.CHRF, {}),
        (ChrF, sacrebleu.CHRF, {"word_order": 2}),  # chrF++
    ],
)
def test_corpus_score_and_signature_are_sacrebleu_s(kind, theirs, options, references):
    outputs, targets = corpus(references=references)
    metric, theirs = scored(kind(**options), outputs, targets), theirs(**options)
    wanted = theirs.corpus_score(outputs, [list(column) for column in zip(*targets)])
    assert metric.compute() == {metric.name: pytest.approx(wanted.score, abs=1e-9)}
    assert metric.signature == str(theirs.get_signature()) and f"nrefs:{references}" in metric.signature


def test_sentence_score_of_a_short_sentence_is_not_zero():
    """Without the effective order, a sentence of two words would have BLEU 0 for its missing 4-grams."""
    assert BLEU().add("two words", "two words") == pytest.approx(100)
    assert BLEU().add("a b", "c d") == pytest.approx(0, abs=1e-9)


def test_rouge_is_the_mean_of_rouge_score():
    outputs, targets = corpus()
    found = scored(ROUGE(), outputs, targets).compute()
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    each = [scorer.score(target[0], output) for output, target in zip(outputs, targets)]
    for name, kind in (("ROUGE-1", "rouge1"), ("ROUGE-2", "rouge2"), ("ROUGE-L", "rougeL")):
        assert found[name] == pytest.approx(np.mean([scores[kind].fmeasure for scores in each]), abs=1e-12)
    assert 0 < found["ROUGE-2"] < found["ROUGE-1"] < 1


def test_rouge_lsum_takes_lines_as_sentences():
    """Sentences in another order: the summary's form finds both, that of the whole text only one."""
    metric = ROUGE()
    metric.add("the dog sat\na cat ran", "a cat ran\nthe dog sat")
    found = metric.compute()
    assert found["ROUGE-Lsum"] == 1 and found["ROUGE-L"] == pytest.approx(0.5)


def test_rouge_of_several_references_is_the_best():
    metric = ROUGE()
    assert metric.add("a b c", ["x y z", "a b c"]) == 1
    assert "stemmer:no" in metric.signature


def test_word_error_rate_is_jiwer_s_over_the_corpus():
    outputs, targets = corpus()
    found = scored(ErrorRate(), outputs, targets).compute()
    references = [target[0] for target in targets]
    assert found["WER"] == pytest.approx(jiwer.wer(references, outputs), abs=1e-12)
    wrong = sum(output != reference for output, reference in zip(outputs, references)) / len(outputs)
    assert found["examples with an error"] == pytest.approx(wrong)
    characters = scored(ErrorRate("CER"), outputs, targets).compute()["CER"]
    assert characters == pytest.approx(jiwer.cer(references, outputs), abs=1e-12)


def test_phonemes():
    """'tomato' with one vowel wrong, one phoneme left out and one too many: 3 edits on 6."""
    metric = ErrorRate("PER")
    assert metric.add("T AH M AA T T", "T AH M EY T OW") == pytest.approx(2 / 6)
    assert metric.add("K AE T S", ["D AO G", "K AE T"]) == pytest.approx(1 / 3)  # the nearer pronunciation
    assert metric.compute() == {"PER": pytest.approx(3 / 9), "examples with an error": 1}


def test_an_empty_output_or_reference_counts():
    metric = ErrorRate()
    assert metric.add("", "three words here") == 1
    assert metric.add("two more", "") == 2
    assert metric.compute()["WER"] == pytest.approx(5 / 3)


def test_exact_match():
    metric = exact_match()
    assert [metric.add("a  b ", "a b"), metric.add("A b", "a b"), metric.add("c", ["a", "c"])] == [1, 0, 1]
    assert metric.compute() == {"exact match": pytest.approx(2 / 3)}
    assert exact_match(lowercase=True).add("A b", "a B") == 1


def test_a_missing_package_is_named(monkeypatch):
    from fastformer import extras

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    for build, package in ((BLEU, "sacrebleu"), (ROUGE, "rouge_score"), (ErrorRate, "jiwer")):
        with pytest.raises(extras.MissingPackageError, match=rf"{package}.*pip install 'fastformer\[eval\]'"):
            build()


def test_bad_input():
    with pytest.raises(ValueError, match="BLEU: no examples"):
        BLEU().compute()
    with pytest.raises(TypeError, match="prediction: expected text, got list"):
        BLEU().add(["a"], "a")
    with pytest.raises(TypeError, match="reference: expected text, got int"):
        ROUGE().add("a", [3])
    with pytest.raises(ValueError, match="reference: is an empty list"):
        ErrorRate().add("a", [])
    metric = ChrF()
    metric.add("a", ["a", "b"])
    with pytest.raises(ValueError, match="reference: 1 texts, the examples before have 2"):
        metric.add("a", "a")
    with pytest.raises(ValueError, match="function: length is nan"):
        Mean("length", lambda prediction, reference: float("nan")).add("a", "b")
