"""Tokenizers: round trips, files, and unknown characters; text that comes token by token is the text decoded whole."""

import json
import os
import subprocess
import sys

import pytest

from fastformer.data import (
    BPETokenizer,
    CharTokenizer,
    IncrementalDecoder,
    SubwordTokenizer,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
    train_unigram,
    train_wordpiece,
)
from fastformer.data.tokenizers import fingerprint

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
    assert isinstance(again, SubwordTokenizer)
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
    with pytest.raises(ValueError, match="'words', expected one of char, bpe, wordpiece, unigram"):
        train_tokenizer("words", [TEXT])
    with pytest.raises(ValueError, match="at least 257"):
        BPETokenizer.train([TEXT], vocab_size=100)


def test_nothing_saved_is_an_error_that_names_the_files(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"characters.json, tokenizer.json, vocab.txt, vocab.json with merges.txt"
    ):
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


def test_vocabulary_size_is_the_sum_of_its_parts():
    with pytest.raises(ValueError, match="got 300, expected at least 360"):
        train_unigram([TEXT], 300)
    with pytest.raises(ValueError, match="got 5, expected at least 6"):
        train_wordpiece([TEXT], 5)
    with pytest.raises(ValueError, match=r"at least 258 .*<pad>"):
        BPETokenizer.train([TEXT], 257, ["<pad>"])
    with pytest.raises(ValueError, match="no text to learn from"):
        BPETokenizer.train(["", ""], 300)
    assert BPETokenizer.train([TEXT], 300, ["<pad>"]).pad_token_id == 1


@pytest.fixture(scope="module")
def wordpiece():
    return train_wordpiece([TEXT], 120)


@pytest.fixture(scope="module")
def unigram():
    return train_unigram([TEXT], 400, sentinels=10)


def test_wordpiece_is_berts_scheme(wordpiece):
    assert [wordpiece._tokenizer.id_to_token(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (wordpiece.pad_token_id, wordpiece.unk_token_id, wordpiece.mask_token_id) == (0, 1, 4)
    assert wordpiece.eos_token_id is None
    plain = wordpiece.encode("To BE: question")
    assert wordpiece.decode(plain) == "to be : question"
    assert wordpiece.encode("To BE: question", add_special_tokens=True) == [2, *plain, 3]
    assert wordpiece.encode("@") == [1]


def test_unigram_is_t5s_scheme(unigram):
    assert (unigram.pad_token_id, unigram.eos_token_id, unigram.unk_token_id) == (0, 1, 2)
    size = unigram.vocab_size
    assert unigram.sentinel_ids == list(range(size - 1, size - 11, -1))
    text = "not to be:  that\nnever seen: ∮ŝ"
    plain = unigram.encode(text)
    assert unigram.decode(plain) == "not to be: that never seen: ∮ŝ"  # by its bytes
    assert unigram.encode(text, add_special_tokens=True) == [*plain, 1]
    assert 2 not in plain
    assert 2 in train_unigram([TEXT], 150, sentinels=10, byte_fallback=False).encode(text)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_transformers_reads_what_is_saved(kind, request, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = request.getfixturevalue(kind)
    tokenizer.save(tmp_path)
    theirs, again = transformers.AutoTokenizer.from_pretrained(str(tmp_path)), load_tokenizer(tmp_path)
    for special in (False, True):
        expected = tokenizer.encode(TEXT, add_special_tokens=special)
        assert theirs(TEXT, add_special_tokens=special)["input_ids"] == expected
        assert again.encode(TEXT, add_special_tokens=special) == expected
    for role in ("eos", "pad", "unk", "cls", "sep", "mask"):
        mine = getattr(tokenizer, f"{role}_token_id")
        assert mine == getattr(theirs, f"{role}_token_id") == getattr(again, f"{role}_token_id")
    assert fingerprint(again) == fingerprint(tokenizer)


def test_word_starts(wordpiece, unigram, bpe):
    for tokenizer, text, words in (
        (wordpiece, "thatis question:", ["thatis", "question", ":"]),
        (unigram, "thatis question", ["thatis", "question"]),
        (bpe, "thatis question:", ["thatis", " question", ":"]),
    ):
        ids = tokenizer.encode(text)
        assert len(ids) > len(words), "the test needs a word of several tokens"
        starts = tokenizer.word_starts()
        found = []
        for i, index in enumerate(ids):
            found.append([index]) if i == 0 or starts[index] else found[-1].append(index)
        assert [tokenizer.decode(word).replace("##", "") for word in found] == words


def test_vocabulary_files_of_bert_and_gpt2(wordpiece, bpe, tmp_path):
    pieces = sorted(wordpiece._tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    (tmp_path / "vocab.txt").write_text("\n".join(piece for piece, _ in pieces) + "\n", encoding="utf-8")
    again = load_tokenizer(tmp_path)
    assert again.encode(TEXT, add_special_tokens=True) == wordpiece.encode(TEXT, add_special_tokens=True)
    assert again.mask_token_id == wordpiece.mask_token_id
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(tmp_path).encode("TO") != load_tokenizer(tmp_path).encode("to")

    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    model = json.loads(bpe.serialized())["model"]
    (gpt2 / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (gpt2 / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    again = load_tokenizer(gpt2)
    assert again.encode(TEXT) == bpe.encode(TEXT) and again.eos_token_id == bpe.eos_token_id
    (gpt2 / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(ValueError, match=r"vocab.json and merges.txt do not belong together"):
        load_tokenizer(gpt2)
    (gpt2 / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
        load_tokenizer(gpt2)


def test_a_file_that_truncates_and_pads_does_not_do_so_here(bpe, tmp_path):
    """Checkpoints of sentence encoders are saved like that."""
    bpe.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    again = load_tokenizer(tmp_path)
    assert again.encode(TEXT) == bpe.encode(TEXT) and again.encode_batch(["to", TEXT])[0] == bpe.encode("to")
    assert fingerprint(again) == fingerprint(bpe)


def test_a_fingerprint_tells_tokenizers_apart(bpe, wordpiece):
    others = [CharTokenizer("ab"), CharTokenizer("ba"), CharTokenizer("ab", unknown="a")]
    prints = [fingerprint(t) for t in (bpe, wordpiece, *others)]
    assert len(set(prints)) == 5
    assert fingerprint(CharTokenizer("ab")) == prints[2]


TRAINS = """
from fastformer.data import python_reference, train_tokenizer
from fastformer.data.tokenizers import fingerprint
texts = [document.text for document in python_reference().documents[:12]]
print(*(fingerprint(train_tokenizer(kind, texts, 900)) for kind in ("bpe", "wordpiece", "unigram")))
"""


def test_the_same_text_gives_the_same_tokenizer_in_every_process():
    """Hash maps of the package are ordered otherwise in each one, and its WordPiece and unigram follow that order."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in "12"
    ]
    first, second = (process.communicate(timeout=120)[0].split() for process in running)
    assert len(first) == 3 and first == second
