"""Text in, batches of token windows out: sources, cleaning, tokenizers, deterministic batches that resume exactly."""

from .batches import (
    Batch,
    Windows,
    encode_documents,
    evaluation_batches,
    split_documents,
)
from .cleaning import CleaningReport, Pipeline, clean
from .corpora import Corpus, Document, load_corpus, python_reference, read_text, shakespeare
from .near_duplicates import NearDuplicates
from .sources import Source, open_source
from .tokenizers import (
    BPETokenizer,
    CharTokenizer,
    IncrementalDecoder,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)

__all__ = [
    "BPETokenizer",
    "Batch",
    "CharTokenizer",
    "CleaningReport",
    "Corpus",
    "Document",
    "IncrementalDecoder",
    "NearDuplicates",
    "Pipeline",
    "Source",
    "Tokenizer",
    "Windows",
    "clean",
    "encode_documents",
    "evaluation_batches",
    "load_corpus",
    "load_tokenizer",
    "open_source",
    "python_reference",
    "read_text",
    "shakespeare",
    "split_documents",
    "train_tokenizer",
]
