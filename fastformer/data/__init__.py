"""Text in, batches of token windows out: corpora, tokenizers, and deterministic batches that resume exactly."""

from .batches import (
    Batch,
    Windows,
    encode_documents,
    evaluation_batches,
    split_documents,
    to_device,
)
from .corpora import Corpus, Document, load_corpus, python_reference, read_text, shakespeare
from .subword import BPETokenizer, SubwordTokenizer, train_unigram, train_wordpiece
from .tokenizers import CharTokenizer, IncrementalDecoder, Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "BPETokenizer",
    "Batch",
    "CharTokenizer",
    "Corpus",
    "Document",
    "IncrementalDecoder",
    "SubwordTokenizer",
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
    "train_unigram",
    "train_wordpiece",
]
