"""Text in, batches of token windows out: sources, cleaning, tokenizers, deterministic batches that resume exactly."""

from .batches import (
    Batch,
    EvaluationWindows,
    Windows,
    encode_documents,
    evaluation_batches,
    split_documents,
    to_device,
)
from .cleaning import CleaningReport, Pipeline, clean
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
from .near_duplicates import NearDuplicates
from .order import EvaluationLoader, FixedLength, Loader
from .packing import PackedRows, Packing, pack
from .shards import TokenShards, write_shards
from .sources import Source, open_source
from .subword import BPETokenizer, SubwordTokenizer, train_unigram, train_wordpiece
from .tokenized import TokenizeConfig, TokenizedCorpus, is_tokenized, load_tokenized, tokenize
from .tokenizers import (
    CharTokenizer,
    IncrementalDecoder,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)

__all__ = [
    "BPETokenizer",
    "Batch",
    "CausalLM",
    "CharTokenizer",
    "Classification",
    "CleaningReport",
    "Corpus",
    "Document",
    "EvaluationLoader",
    "EvaluationWindows",
    "FixedLength",
    "IncrementalDecoder",
    "Loader",
    "MaskedLM",
    "NearDuplicates",
    "PackedCausalLM",
    "PackedRows",
    "Packing",
    "Pipeline",
    "Seq2Seq",
    "Source",
    "SpanCorruption",
    "SubwordTokenizer",
    "TokenDeletion",
    "TokenShards",
    "TokenizeConfig",
    "TokenizedCorpus",
    "Tokenizer",
    "Windows",
    "clean",
    "encode_documents",
    "evaluation_batches",
    "is_tokenized",
    "load_corpus",
    "load_tokenized",
    "load_tokenizer",
    "open_source",
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
