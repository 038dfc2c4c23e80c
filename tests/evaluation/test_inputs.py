"""Tokenizers of three packages, and the checks before a model runs."""

from types import SimpleNamespace

import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed (pip install 'fastformer[train]')")

from fastformer.data import BPETokenizer, CharTokenizer
from fastformer.data.tokenizers import check_tokenizer, encode
from fastformer.evaluation.inputs import context_of

TEXTS = ["the cat sat on the mat, and the dog"] * 3


def model(**config):
    return SimpleNamespace(config=SimpleNamespace(**config))


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(TEXTS, 270)


def test_the_same_ids_from_every_package(tokenizer):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    inner = tokenizer._tokenizer
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    wanted = encode(tokenizer, TEXTS[0])
    assert encode(inner, TEXTS[0]) == encode(theirs, TEXTS[0]) == wanted
    for one in (tokenizer, inner, theirs):
        check_tokenizer(model(vocab_size=270), one)
        check_tokenizer(model(vocab_size=384), one)  # rounded up
        with pytest.raises(ValueError, match="tokenizer: has 270 tokens, but the model's table has 269"):
            check_tokenizer(model(vocab_size=269), one)
        with pytest.raises(ValueError, match="but the model's table has 50257"):
            check_tokenizer(model(vocab_size=50257), one)


def test_special_tokens_only_where_asked_for():
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[CLS]": 0, "a": 1, "[SEP]": 2}, unk_token="a"))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    assert encode(inner, "a") == [1] and encode(inner, "a", add_special_tokens=True) == [0, 1, 2]
    assert encode(CharTokenizer("ab"), "ba", add_special_tokens=True) == [1, 0]  # it has none


def test_context():
    assert context_of(model(max_position_embeddings=32), None) == 32
    assert context_of(model(), 2048) == 2048  # relative positions have no limit
    with pytest.raises(ValueError, match="context: the model's configuration has no max_position_embeddings"):
        context_of(model(), None)
    with pytest.raises(ValueError, match="context: got 0, expected 1 to the model's 32 positions"):
        context_of(model(max_position_embeddings=32), 0)
