"""What a model is worth: perplexity, labels and written text scored, with intervals, significance and a report.

Metrics keep a few numbers per example and no logits; the packages that compute scores load on first use.
"""

from .bootstrap import Comparison, Interval, compare, confidence_intervals
from .classification import Classification
from .evaluate import Evaluation, by_label, by_length, evaluate, read_records
from .metric import Metric
from .perplexity import Perplexity, perplexity, score_batches, score_examples, score_texts, token_losses
from .predictions import Record, classify, classify_texts, generate_texts
from .report import write_report
from .text import BLEU, ROUGE, ChrF, ErrorRate, Mean, exact_match

__all__ = [
    "BLEU",
    "ROUGE",
    "ChrF",
    "Classification",
    "Comparison",
    "ErrorRate",
    "Evaluation",
    "Interval",
    "Mean",
    "Metric",
    "Perplexity",
    "Record",
    "by_label",
    "by_length",
    "classify",
    "classify_texts",
    "compare",
    "confidence_intervals",
    "evaluate",
    "exact_match",
    "generate_texts",
    "perplexity",
    "read_records",
    "score_batches",
    "score_examples",
    "score_texts",
    "token_losses",
    "write_report",
]
