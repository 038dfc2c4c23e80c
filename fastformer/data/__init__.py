"""Text in, batches of token windows out: corpora, tokenizers, and deterministic batches that resume exactly."""

from .batches import (
    Batch,
    EvaluationWindows,
    Windows,
    encode_documents,
    evaluation_batches,
    split_documents,
    to_device,
)
from .corpora import Corpus, Document, load_corpus, python_reference, read_text, shakespeare
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
    "Corpus",
    "Document",
    "EvaluationWindows",
    "IncrementalDecoder",
    "Tokenizer",
    "Windows",
    "encode_documents",
    "evaluation_batches",
    "load_corpus",
    "load_tokenizer",
    "python_reference",
    "read_text",
    "shakespeare",
    "split_documents",
    "to_device",
    "train_tokenizer",
]
