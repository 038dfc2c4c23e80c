"""Token shards: what was written is read, from the files themselves; wrong files and wrong tokenizers are named."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from fastformer.data import (
    BPETokenizer,
    CharTokenizer,
    Document,
    TokenShards,
    Windows,
    encode_documents,
    evaluation_batches,
    load_tokenizer,
    train_wordpiece,
    write_shards,
)

TEXTS = [f"Document {i}: " + "to be or not to be " * (i % 5) for i in range(40)]
DOCUMENTS = tuple(Document(str(i), text) for i, text in enumerate(TEXTS))


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(TEXTS, 300)


@pytest.fixture
def shards(bpe, tmp_path):
    return write_shards(iter(DOCUMENTS), bpe, tmp_path / "shards", shard_tokens=100)


def test_documents_and_the_stream(shards, bpe):
    stream = encode_documents(bpe, DOCUMENTS).numpy()
    assert len(shards) == 40 and shards.numel() == len(stream) and shards.dtype == np.uint16
    assert len(list(shards.directory.glob("tokens-*.bin"))) > 3, "the test needs several files"
    for i, text in enumerate(TEXTS):
        assert shards[i].tolist() == [*bpe.encode(text), bpe.eos_token_id]
        assert shards.lengths[i] == len(shards[i])
    assert shards[-1].tolist() == shards[39].tolist() and len(list(shards)) == 40
    assert shards.read(0, len(stream)).tolist() == stream.tolist()
    for start, stop in ((0, 0), (95, 130), (len(stream) - 3, len(stream)), (3, 290)):  # within, and over, files
        assert shards.read(start, stop).tolist() == stream[start:stop].tolist()
    with pytest.raises(IndexError, match="document 40 of 40"):
        shards[40]
    with pytest.raises(IndexError, match="tokens 0 to"):
        shards.read(0, len(stream) + 1)


def test_nothing_is_copied_before_a_batch(shards):
    view = shards[3]
    assert isinstance(view.base, np.memmap) or isinstance(view, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    # The files are read when they are looked at: what changes there shows.
    file = shards.directory / "tokens-00000.bin"
    with open(file, "r+b") as f:
        f.write(np.array([7], dtype="<u2").tobytes())
    assert shards[0][0] == 7


def test_windows_are_those_of_the_tokens_in_memory(shards, bpe):
    tokens = encode_documents(bpe, DOCUMENTS)
    a, b = Windows(tokens, 16, 4, seed=3), Windows(shards, 16, 4, seed=3)
    for _ in range(3 * a.windows_per_epoch // 4):
        x, y = a.next_batch(), b.next_batch()
        assert torch.equal(x["input_ids"], y["input_ids"]) and torch.equal(x["shift_labels"], y["shift_labels"])
    for x, y in zip(evaluation_batches(tokens, 16, 4), evaluation_batches(shards, 16, 4)):
        assert torch.equal(x["input_ids"], y["input_ids"])
    with pytest.raises(ValueError, match="at least block_size"):
        Windows(shards, 10_000, 1)


def test_large_vocabularies_take_four_bytes(tmp_path):
    # A vocabulary just beyond two bytes: its last character must come back.
    characters = [chr(0x20000 + i) for i in range(65537)]
    tokenizer = CharTokenizer(characters)
    shards = write_shards([characters[65536] + characters[0]], tokenizer, tmp_path / "large")
    assert shards.dtype == np.uint32 and shards[0].tolist() == [65536, 0]
    assert shards.eos_token_id is None


def test_special_tokens_around_each_document(tmp_path):
    tokenizer = train_wordpiece(TEXTS, 80)
    shards = write_shards(["to be", "", "not"], tokenizer, tmp_path / "s", add_special_tokens=True)
    assert len(shards) == 2  # the empty one is left out
    for document, text in zip(shards, ("to be", "not")):
        assert document.tolist() == [2, *tokenizer.encode(text), 3]


def test_the_tokenizer_comes_along_and_is_checked(shards, bpe, tmp_path):
    assert shards.tokenizer().encode("to be") == bpe.encode("to be")
    TokenShards(shards.directory, load_tokenizer(shards.directory))
    other = BPETokenizer.train(TEXTS, 280)
    with pytest.raises(ValueError, match=r"tokenizer: is not the one that made .*shards"):
        TokenShards(shards.directory, other)


def test_files_that_are_not_what_the_index_says(shards, tmp_path):
    directory = shards.directory
    file = directory / "tokens-00001.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-6])
    with pytest.raises(ValueError, match=rf"tokens-00001.bin is truncated: {len(whole) - 6} bytes, .* {len(whole)}"):
        TokenShards(directory)
    file.write_bytes(whole + b"\0\0")
    with pytest.raises(ValueError, match=r"tokens-00001.bin is longer"):
        TokenShards(directory)
    file.unlink()
    with pytest.raises(ValueError, match=r"tokens-00001.bin is missing"):
        TokenShards(directory)
    file.write_bytes(whole)
    np.save(directory / "documents.npy", np.zeros(3, dtype=np.int64))
    with pytest.raises(ValueError, match=r"documents.npy: the index says 40 documents, the file lists 2"):
        TokenShards(directory)
    index = directory / "index.json"
    index.write_text(index.read_text()[:50])
    with pytest.raises(ValueError, match=r"index.json is not an index of token shards"):
        TokenShards(directory)
    index.write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match=r"format 99, expected 1"):
        TokenShards(directory)
    with pytest.raises(FileNotFoundError, match="no token shards"):
        TokenShards(tmp_path)


def test_written_whole_or_not_at_all(bpe, tmp_path):
    def breaks():
        yield from TEXTS
        raise RuntimeError("the source broke")

    for texts, error in ((breaks(), RuntimeError), (["", ""], ValueError), ([], ValueError)):
        with pytest.raises(error):
            write_shards(texts, bpe, tmp_path / "new", shard_tokens=50)
        assert list(tmp_path.iterdir()) == []
    write_shards(TEXTS, bpe, tmp_path / "new")
    with pytest.raises(FileExistsError, match="new exists already"):
        write_shards(TEXTS, bpe, tmp_path / "new")


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files stands in for the disk, in a process of its own."""
    script = f"""
        import resource, signal, sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from fastformer.data import CharTokenizer, write_shards
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        write_shards(["ab" * 100_000], CharTokenizer("ab"), {str(tmp_path / "full")!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 1 and "OSError" in done.stderr and "File too large" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []
