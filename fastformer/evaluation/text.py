"""Scores of written text beside a reference: BLEU, chrF, ROUGE, exact match, word and phoneme error rate.

BLEU (Papineni et al. 2002) and chrF (Popović 2015) are sacrebleu's, ROUGE (Lin 2004) is rouge-score's, error rates
(edits / words of the reference) count jiwer's edits. Each is split where those packages split it, into statistics of a
sentence and a score of their sum, so a corpus score is exactly theirs, and its signature says which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..extras import require
from .metric import Metric, ratio


class _SacreBLEU(Metric):
    """What BLEU and chrF share."""

    def __init__(self, scorer: Any) -> None:
        super().__init__()
        self._scorer = scorer
        self.references: int | None = None  # per example

    def add(self, prediction: str, reference: str | Sequence[str]) -> float:
        """One output and its reference, or several references; returns the sentence's own score, 0 to 100."""
        references = _texts(reference)
        _text("prediction", prediction)
        if self.references not in (None, len(references)):
            raise ValueError(f"reference: {len(references)} texts, the examples before have {self.references}")
        self.references = len(references)
        (statistics,) = self._scorer._extract_corpus_statistics([prediction], [[text] for text in references])
        self._append(statistics)
        return self._sentence_score(statistics)

    def _sentence_score(self, statistics: list[int]) -> float:
        return float(self._scorer._compute_score_from_stats(statistics).score)

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        sums = np.asarray(sums, np.float64)
        score = self._scorer._compute_score_from_stats
        flat = [score([round(value) for value in row]).score for row in sums.reshape(-1, self.columns)]
        return {self.name: np.array(flat, np.float64).reshape(sums.shape[:-1])}

    @property
    def signature(self) -> str:
        """sacrebleu's."""
        if self.references is None:
            return ""
        self._scorer.num_refs = self.references
        return str(self._scorer.get_signature())


class BLEU(_SacreBLEU):
    """Corpus BLEU, 0 to 100.

    Args:
        tokenize: sacrebleu's tokenizer: ``"13a"`` (the standard), ``"intl"``, ``"char"``, ``"zh"`` …
        lowercase: compare without case.
    """

    name = "BLEU"
    columns = 10  # lengths of output and reference, then for 1- to 4-grams how many agree, and how many there are

    def __init__(self, *, tokenize: str = "13a", lowercase: bool = False) -> None:
        metrics = require("sacrebleu.metrics", "BLEU", "eval")
        # force: the warning that a text looks tokenized already is about the first sentences of a whole corpus.
        super().__init__(metrics.BLEU(tokenize=tokenize, lowercase=lowercase, force=True))
        self._sentences = metrics.BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=True)

    def _sentence_score(self, statistics: list[int]) -> float:
        # A sentence of three words has no 4-gram; sentence BLEU leaves out the orders that it lacks.
        return float(self._sentences._compute_score_from_stats(statistics).score)


class ChrF(_SacreBLEU):
    """Corpus chrF, 0 to 100: F2 of character n-grams up to ``char_order``; with ``word_order=2``, chrF++."""

    name = "chrF"

    def __init__(self, *, char_order: int = 6, word_order: int = 0, beta: int = 2) -> None:
        metrics = require("sacrebleu.metrics", "chrF", "eval")
        self.columns = 3 * (char_order + word_order)
        super().__init__(metrics.CHRF(char_order=char_order, word_order=word_order, beta=beta))


class ROUGE(Metric):
    """ROUGE-1, ROUGE-2 and ROUGE-L F1, 0 to 1, means over the examples; of several references the best counts.

    ROUGE-L is of the whole text; ROUGE-Lsum takes lines as sentences, so it wants them separated by newlines.

    Args:
        stemmer: compare word stems (Porter).
    """

    name = "ROUGE"
    columns = 5
    _KINDS = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL", "ROUGE-Lsum": "rougeLsum"}

    def __init__(self, *, stemmer: bool = False) -> None:
        super().__init__()
        scorer = require("rouge_score.rouge_scorer", "ROUGE", "eval")
        self.stemmer = stemmer
        self._scorer = scorer.RougeScorer(list(self._KINDS.values()), use_stemmer=stemmer)

    def add(self, prediction: str, reference: str | Sequence[str]) -> float:
        """Returns the example's ROUGE-L F1."""
        _text("prediction", prediction)
        each = [self._scorer.score(text, prediction) for text in _texts(reference)]
        best = [max(found[kind].fmeasure for found in each) for kind in self._KINDS.values()]
        self._append([*best, 1.0])
        return best[2]

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        sums = np.asarray(sums, np.float64)
        return {name: ratio(sums[..., index], sums[..., 4]) for index, name in enumerate(self._KINDS)}

    @property
    def signature(self) -> str:
        from importlib.metadata import version

        return f"rouge-score:{version('rouge-score')}|stemmer:{'yes' if self.stemmer else 'no'}|F1, mean of examples"


class Mean(Metric):
    """The mean of a number per example, such as a reward or a length.

    Args:
        name: of the score.
        function: takes prediction and reference, returns a finite number.
        lower_is_better: how to sort.
    """

    columns = 2

    def __init__(self, name: str, function: Any, *, lower_is_better: bool = False) -> None:
        super().__init__()
        self.name = name
        self.function = function
        self.lower_is_better = lower_is_better

    def add(self, prediction: Any, reference: Any) -> float:
        """Returns ``function(prediction, reference)``."""
        value = float(self.function(prediction, reference))
        if not math.isfinite(value):
            raise ValueError(
                f"function: {self.name} is {value} for {prediction!r} and {reference!r}; expected a number"
            )
        self._append([value, 1.0])
        return value

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        sums = np.asarray(sums, np.float64)
        return {self.name: ratio(sums[..., 0], sums[..., 1])}


def exact_match(*, lowercase: bool = False) -> Mean:
    """Share of outputs equal to a reference, spaces at the ends and repeated ones aside."""

    def same(prediction: str, reference: str | Sequence[str]) -> bool:
        given, wanted = _text("prediction", prediction), _texts(reference)
        if lowercase:
            given, wanted = given.lower(), [text.lower() for text in wanted]
        return given.split() in [text.split() for text in wanted]

    return Mean("exact match", same)


class ErrorRate(Metric):
    """Substitutions, deletions and insertions over the words of the references: WER, and PER for phonemes.

    Also the share of examples with any error, which for one word an example is what grapheme-to-phoneme papers call
    word error rate. Several references count by the one with the lowest rate.

    Args:
        name: ``"WER"``, ``"PER"``, or another name for units separated by spaces; ``"CER"`` counts characters.
    """

    lower_is_better = True
    columns = 4  # edits, units of the reference, examples with an error, examples

    def __init__(self, name: str = "WER") -> None:
        super().__init__()
        self.name = name
        self._jiwer = require("jiwer", name, "eval")

    def add(self, prediction: str, reference: str | Sequence[str]) -> float:
        """Returns the example's own rate; for an empty reference the number of insertions."""
        given = _text("prediction", prediction)
        edits, length = min((self._edits(given, text) for text in _texts(reference)), key=lambda e: e[0] / max(e[1], 1))
        self._append([edits, length, float(edits > 0), 1.0])
        return edits / max(length, 1)

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        sums = np.asarray(sums, np.float64)
        return {
            self.name: ratio(sums[..., 0], sums[..., 1]),
            "examples with an error": ratio(sums[..., 2], sums[..., 3]),
        }

    def _edits(self, given: str, wanted: str) -> tuple[int, int]:
        characters = self.name == "CER"
        length = len(wanted) if characters else len(wanted.split())
        if not length:
            return len(given) if characters else len(given.split()), 0
        found = (self._jiwer.process_characters if characters else self._jiwer.process_words)(wanted, given)
        return found.substitutions + found.deletions + found.insertions, length


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected text, got {type(value).__name__}")
    return value


def _texts(reference: Any) -> list[str]:
    """One reference or several, as a list."""
    texts = [reference] if isinstance(reference, str) else list(reference)
    if not texts:
        raise ValueError("reference: is an empty list; every example needs one or more")
    return [_text("reference", text) for text in texts]
