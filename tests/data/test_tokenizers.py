"""Tokenizers: round trips, files, and unknown characters; text that comes token by token is the text decoded whole."""

import pytest

from fastformer.data import BPETokenizer, CharTokenizer, IncrementalDecoder, Tokenizer, load_tokenizer, train_tokenizer

TEXT = "HAMLET:\nTo be, or not to be: that is the question: naïve 😀 日本\n" * 8


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train([TEXT], vocab_size=300)


def test_characters_round_trip_in_sorted_order(tmp_path):
    tokenizer = CharTokenizer.from_text("banana\n")
    assert tokenizer.characters == ("\n", "a", "b", "n") and tokenizer.vocab_size == 4
    assert tokenizer.encode("nab") == [3, 1, 2]
    assert tokenizer.decode([3, 1, 2]) == "nab"
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, CharTokenizer) and again.characters == tokenizer.characters


def test_unknown_characters_are_an_error_or_replaced(tmp_path):
    with pytest.raises(ValueError, match=r"character 'z' \(U\+007A\) at position 2 .* 3 characters: '\?ab'"):
        CharTokenizer.from_text("ab?").encode("abz")
    tokenizer = CharTokenizer.from_text("ab?", unknown="?")
    assert tokenizer.decode(tokenizer.encode("azb")) == "a?b"
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).unknown == "?"
    with pytest.raises(ValueError, match="unknown"):
        CharTokenizer("ab", unknown="?")
    with pytest.raises(ValueError, match="characters"):
        CharTokenizer("aba")


def test_byte_pairs_round_trip_any_text(bpe, tmp_path):
    assert bpe.vocab_size == 300
    for text in (TEXT, "never seen: ∮ ŝ\t\x00", " leading and trailing  \n\n", ""):
        assert bpe.decode(bpe.encode(text)) == text
    # Words seen often have become tokens.
    assert len(bpe.encode("question")) < len("question")
    bpe.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, BPETokenizer)
    assert again.encode(TEXT) == bpe.encode(TEXT) and again.eos_token_id == bpe.eos_token_id is not None


def test_transformers_reads_the_saved_byte_pairs(bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    bpe.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert theirs(TEXT)["input_ids"] == bpe.encode(TEXT)
    assert theirs.eos_token_id == bpe.eos_token_id


def test_one_surface(bpe):
    for tokenizer in (bpe, CharTokenizer.from_text(TEXT)):
        assert isinstance(tokenizer, Tokenizer)
        ids = tokenizer.encode(TEXT)
        assert min(ids) >= 0 and max(ids) < tokenizer.vocab_size
    assert isinstance(train_tokenizer("char", ["ab", "bc"]), CharTokenizer)
    assert train_tokenizer("char", ["ab", "bc"]).characters == ("a", "b", "c")
    with pytest.raises(ValueError, match="'wordpiece', expected one of char, bpe"):
        train_tokenizer("wordpiece", [TEXT])
    with pytest.raises(ValueError, match="at least 257"):
        BPETokenizer.train([TEXT], vocab_size=100)


def test_nothing_saved_is_an_error_that_names_the_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"characters.json and tokenizer.json"):
        load_tokenizer(tmp_path)


def test_incremental_text_is_the_whole_text(bpe):
    # Each emoji is four byte-level tokens in a vocabulary that never saw it: none may come out in halves.
    text = TEXT + "🎭🎻 Ω\n" * 20
    ids = bpe.encode(text)
    assert any("\ufffd" in bpe.decode([i]) for i in ids), "the test needs tokens that end inside a character"
    decoder = IncrementalDecoder(bpe)
    pieces = [decoder.push([i]) for i in ids]
    assert "".join(pieces) + decoder.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_incremental_text_flushes_an_unfinished_character(bpe):
    decoder = IncrementalDecoder(bpe)
    half = bpe.encode("🎭")[:2]
    assert decoder.push(half) == "" and decoder.flush() == "\ufffd" and decoder.flush() == ""
