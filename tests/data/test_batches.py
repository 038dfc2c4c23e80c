"""Batches: targets one step ahead, every token once an epoch, the same for a seed, resumable to the window; splits."""

import numpy as np
import pytest
import torch

from fastformer.data import (
    BPETokenizer,
    CharTokenizer,
    Corpus,
    Document,
    Windows,
    batches,
    encode_documents,
    evaluation_batches,
    split_documents,
    to_device,
)

TOKENS = torch.arange(1000, dtype=torch.int32)


def test_targets_follow_inputs():
    batch = Windows(TOKENS, block_size=16, batch_size=4).next_batch()
    assert batch["input_ids"].shape == batch["shift_labels"].shape == (4, 16)
    assert batch["input_ids"].dtype == batch["shift_labels"].dtype == torch.int64
    assert torch.equal(batch["shift_labels"], batch["input_ids"] + 1)


@pytest.mark.parametrize(
    "count, block",
    [
        (1000, 16),  # a remainder for the offset to move in
        (17, 16),  # a single window
        (33, 16),  # two windows, of which an offset leaves one
        (1001, 10),  # a whole number of windows
    ],
)
def test_an_epoch_sees_each_token_once(count, block):
    windows = Windows(TOKENS[:count] if count <= 1000 else torch.arange(count), block, 1, seed=3)
    for _ in range(3):
        seen = torch.cat([windows.next_batch()["shift_labels"].flatten() for _ in range(windows.windows_per_epoch)])
        assert len(seen.unique()) == len(seen)
        assert count - len(seen) <= 2 * block


def test_epochs_differ_in_order_and_offset():
    windows = Windows(TOKENS, 16, 1, seed=0)
    epochs = [
        [int(windows.next_batch()["input_ids"][0, 0]) for _ in range(windows.windows_per_epoch)] for _ in range(4)
    ]
    assert len({tuple(e) for e in epochs}) == 4
    assert len({min(e) for e in epochs}) > 1
    assert sorted(epochs[0]) != epochs[0]


def test_the_seed_decides():
    a, b, c = (Windows(TOKENS, 8, 3, seed=s) for s in (5, 5, 6))
    firsts = [[w.next_batch()["input_ids"] for _ in range(60)] for w in (a, b, c)]
    assert all(torch.equal(x, y) for x, y in zip(firsts[0], firsts[1]))
    assert not all(torch.equal(x, y) for x, y in zip(firsts[0], firsts[2]))


def test_resumes_at_the_next_window():
    whole = Windows(TOKENS, 8, 7, seed=1)
    expected = [whole.next_batch() for _ in range(50)]  # 350 windows, 124 an epoch: the state is inside the second
    first = Windows(TOKENS, 8, 7, seed=1)
    for _ in range(23):
        first.next_batch()
    second = Windows(TOKENS, 8, 7, seed=99)
    second.load_state_dict(first.state_dict())
    for batch in expected[23:]:
        assert torch.equal(second.next_batch()["input_ids"], batch["input_ids"])
    with pytest.raises(ValueError, match="block_size = 8, this one has 4"):
        Windows(TOKENS, 4, 7).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="tokens = 1000, this one has 500"):
        Windows(TOKENS[:500], 8, 7).load_state_dict(first.state_dict())


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batch_of_one_process(world_size):
    whole = Windows(TOKENS, 8, 6, seed=1)
    ranks = [Windows(TOKENS, 8, 6, seed=1, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(25):  # over the end of an epoch
        expected, parts = whole.next_batch(), [r.next_batch() for r in ranks]
        for r, part in enumerate(parts):
            assert torch.equal(part["input_ids"], expected["input_ids"][r::world_size])
            assert part["_ids"] == expected["_ids"][r::world_size]
    assert ranks[1].state_dict() == whole.state_dict()  # so a run resumes at another world size
    with pytest.raises(ValueError, match="batch_size: 6 rows cannot be shared equally by world_size = 4"):
        Windows(TOKENS, 8, 6, rank=0, world_size=4)
    with pytest.raises(ValueError, match="rank: got 2 of world_size = 2"):
        Windows(TOKENS, 8, 6, rank=2, world_size=2)


def test_a_batch_on_another_device():
    starts = torch.tensor([0, 2], dtype=torch.int32)
    batch = {
        "input_ids": torch.ones(1, 2),
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": 2,
        "_ids": [5],
    }
    moved = to_device(batch, "meta")
    assert moved["input_ids"].device.type == "meta" and moved["_ids"] == [5] and moved["max_length_q"] == 2
    assert moved["cu_seq_lens_q"] is moved["cu_seq_lens_k"]  # so that nobody has to compare them


def test_evaluation_windows_are_fixed_and_spread():
    found = list(evaluation_batches(TOKENS, 10, 4))
    assert [len(b["input_ids"]) for b in found] == [4] * 24 + [3]
    starts = torch.cat([b["input_ids"][:, 0] for b in found])
    assert torch.equal(starts, torch.arange(99) * 10)
    few = torch.cat([b["input_ids"][:, 0] for b in evaluation_batches(TOKENS, 10, 4, max_windows=5)])
    assert few.tolist() == [0, 190, 390, 590, 790]


def test_too_little_text_and_bad_sizes():
    with pytest.raises(ValueError, match=r"\(16,\), expected one dimension of at least block_size \+ 1 = 17"):
        Windows(TOKENS[:16], 16, 1)
    with pytest.raises(ValueError, match="batch_size: got 4 and 0"):
        Windows(TOKENS, 4, 0)


def documents(count, length=100):
    return Corpus("test", tuple(Document(str(i), chr(97 + i) * length) for i in range(count)))


def test_many_documents_are_held_out_whole_by_their_text():
    corpus = documents(20)
    train, held_out = split_documents(corpus, 0.1)
    assert len(train) == 18 and len(held_out) == 2
    assert not {d.name for d in train} & {d.name for d in held_out}
    turned = Corpus("test", tuple(Document("again", d.text) for d in corpus.documents[::-1]))
    assert {d.text for d in split_documents(turned, 0.1)[1]} == {d.text for d in held_out}
    assert any(split_documents(corpus, 0.1, seed=seed)[1] != held_out for seed in range(1, 5))


def test_long_documents_are_held_out_as_often_as_short_ones():
    """Of 59 documents of log-normal lengths: the share of the text, and so of the documents, over 60 seeds."""
    sizes = np.random.default_rng(0).lognormal(6, 1.5, 59).astype(int) + 1
    corpus = Corpus("test", tuple(Document(str(i), f"{i:04d}" + "x" * size) for i, size in enumerate(sizes)))
    parts = [split_documents(corpus, 0.1, seed=seed)[1] for seed in range(60)]
    assert np.mean([len(part) for part in parts]) / 59 == pytest.approx(0.1, abs=0.035)
    shares = np.array([sum(len(d.text) for d in part) / len(corpus) for part in parts])
    assert shares.mean() == pytest.approx(0.1, abs=0.03) and shares.max() < 0.3


def test_both_parts_have_a_document():
    giant = Corpus("test", (Document("giant", "g" * 10_000), *documents(9).documents))
    same = Corpus("test", documents(1).documents * 10)
    for seed in range(20):
        train, held_out = split_documents(giant, 0.1, seed=seed)
        assert train[0].name == "giant" and held_out
        train, held_out = split_documents(documents(10), 0.99, seed=seed)
        assert len(train) == 1 and len(held_out) == 9
        assert len(split_documents(documents(10), 0.001, seed=seed)[1]) == 1
    with pytest.raises(ValueError, match="10 of the same text"):
        split_documents(same)


def test_a_stream_is_read_no_further_than_it_must(monkeypatch):
    monkeypatch.setattr(batches, "MANY", 500)
    stream = (Document(str(i), f"{i} text") for i in range(2000))
    held = batches.Holdout(stream, 0.2)
    assert next(stream).name == "500"
    assert sum(document in held for document in stream) == pytest.approx(300, abs=60)


def test_few_documents_lose_their_ends():
    train, held_out = split_documents(documents(2), 0.1)
    assert [len(d.text) for d in train] == [90, 90] and [len(d.text) for d in held_out] == [10, 10]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_a_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match="validation_fraction"):
        split_documents(documents(2), fraction)


def test_documents_end_with_the_end_of_text_token():
    corpus = documents(2, 3)
    assert encode_documents(CharTokenizer("ab"), corpus.documents).tolist() == [0, 0, 0, 1, 1, 1]
    bpe = BPETokenizer.train([corpus.text], 257)
    ids = encode_documents(bpe, corpus.documents)
    assert ids.dtype == torch.int32 and (ids == bpe.eos_token_id).nonzero().flatten().tolist() == [3, 7]


def test_a_window_can_be_found_by_its_number():
    tokens = torch.arange(100)
    windows = Windows(tokens, 8, 4, seed=3)
    for _ in range(5):  # into the second epoch
        batch = windows.next_batch()
        for number, row in zip(batch["_ids"], batch["input_ids"], strict=True):
            assert windows.describe(number) == f"{number} (from token {int(row[0])})"
