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
from .collators import (
    CausalLM,
    Classification,
    MaskedLM,
    PackedCausalLM,
    Seq2Seq,
    SpanCorruption,
    TokenDeletion,
    span_corruption_lengths,
)
from .corpora import Corpus, Document, load_corpus, python_reference, read_text, shakespeare
from .order import EvaluationLoader, FixedLength, Loader
from .packing import PackedRows, Packing, pack
from .shards import TokenShards, write_shards
from .subword import BPETokenizer, SubwordTokenizer, train_unigram, train_wordpiece
from .tokenized import TokenizeConfig, TokenizedCorpus, is_tokenized, load_tokenized, tokenize
from .tokenizers import CharTokenizer, IncrementalDecoder, Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "BPETokenizer",
    "Batch",
    "CausalLM",
    "CharTokenizer",
    "Classification",
    "Corpus",
    "Document",
    "EvaluationLoader",
    "EvaluationWindows",
    "FixedLength",
    "IncrementalDecoder",
    "Loader",
    "MaskedLM",
    "PackedCausalLM",
    "PackedRows",
    "Packing",
    "Seq2Seq",
    "SpanCorruption",
    "SubwordTokenizer",
    "TokenDeletion",
    "TokenShards",
    "TokenizeConfig",
    "TokenizedCorpus",
    "Tokenizer",
    "Windows",
    "encode_documents",
    "evaluation_batches",
    "is_tokenized",
    "load_corpus",
    "load_tokenized",
    "load_tokenizer",
    "pack",
    "python_reference",
    "read_text",
    "shakespeare",
    "span_corruption_lengths",
    "split_documents",
    "to_device",
    "tokenize",
    "train_tokenizer",
    "train_unigram",
    "train_wordpiece",
    "write_shards",
]
