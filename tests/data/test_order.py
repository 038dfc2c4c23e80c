"""Order: each sample once an epoch, the same for a seed at any number of processes, exact on resuming; less padding."""

import itertools

import numpy as np
import pytest
import torch

from fastformer.data import CausalLM, EvaluationLoader, FixedLength, Loader, MaskedLM, write_shards
from fastformer.data.order import Order, _ends
from fastformer.data.tokenizers import CharTokenizer

SAMPLES = [np.full(n, i) for i, n in enumerate(np.random.default_rng(0).integers(1, 60, 103))]
LENGTHS = np.array([len(s) for s in SAMPLES], dtype=np.uint16)  # as narrow as a dataset may have them
WAYS = {
    "plain": {"batch_size": 8},
    "pools": {"batch_size": 8, "pool": 32, "lengths": LENGTHS},
    "tokens": {"max_tokens": 300, "lengths": LENGTHS},
    "in order": {"batch_size": 8, "shuffle": False},
}


def loader(way, **options):
    return Loader(SAMPLES, MaskedLM(1, 200, probability=0.5), **{**WAYS[way], "seed": 3, **options})


def same(a, b):
    assert a.keys() == b.keys() and a["_ids"] == b["_ids"]
    assert all(torch.equal(a[name], b[name]) for name in a if name != "_ids")


@pytest.mark.parametrize("way", WAYS)
def test_every_sample_once_before_any_twice(way):
    batches = loader(way)
    seen = list(itertools.chain.from_iterable(next(iter(batches))["_ids"] for _ in range(60)))
    counts = np.bincount(seen, minlength=103)
    if way == "pools":  # a pool over the end of an epoch holds samples of both
        assert np.ptp(counts) <= 2
    elif way == "tokens":  # a pool is an epoch, whose batches are shuffled
        assert np.ptp(counts) <= 1
    else:
        for epoch in range(len(seen) // 103):
            assert sorted(seen[epoch * 103 : (epoch + 1) * 103]) == list(range(103))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prefetch", [False, True])
def test_resumes_at_the_next_batch(way, prefetch):
    whole = loader(way)
    expected = [whole.next_batch() for _ in range(45)]
    first = loader(way, prefetch=prefetch)
    for batch in expected[:19]:
        same(first.next_batch(), batch)
    state = first.state_dict()
    second = loader(way, seed=99, prefetch=prefetch)
    second.next_batch()
    second.load_state_dict(state)
    assert second.state_dict() == state
    for batch in expected[19:]:
        same(second.next_batch(), batch)


def test_the_state_is_the_position_whatever_was_read_ahead():
    """A thread is a batch ahead of what was handed out; what was not handed out must not be skipped."""
    ahead, behind = loader("plain", prefetch=True), loader("plain")
    for _ in range(5):
        ahead.next_batch(), behind.next_batch()
        assert ahead.state_dict() == behind.state_dict()


@pytest.mark.parametrize("way", ["plain", "pools", "tokens"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(way, world_size):
    options = {"max_tokens": 600} if way == "tokens" else {}
    whole = loader(way, **options)
    ranks = [loader(way, rank=r, world_size=world_size, **options) for r in range(world_size)]
    for _ in range(40):
        expected, parts = whole.next_batch(), [r.next_batch() for r in ranks]
        for r, part in enumerate(parts):
            assert part["_ids"] == expected["_ids"][r::world_size] and part["_ids"]
            width = part["input_ids"].shape[1]  # a rank pads to its own longest
            assert torch.equal(part["input_ids"], expected["input_ids"][r::world_size, :width])
            assert torch.equal(part["labels"], expected["labels"][r::world_size, :width])
        assert all(r.state_dict() == whole.state_dict() for r in ranks)


def test_the_seed_decides_and_epochs_differ():
    a, b, c = loader("plain"), loader("plain"), loader("plain", seed=4)
    ids = [[x.next_batch()["_ids"] for _ in range(30)] for x in (a, b, c)]
    assert ids[0] == ids[1] != ids[2]
    flat = list(itertools.chain.from_iterable(ids[0]))
    assert flat[:103] != flat[103:206] and flat[:103] != list(range(103))


def padding_share(batches, count):
    real = total = 0
    for _ in range(count):
        batch = batches.next_batch()
        real += sum(LENGTHS[i] for i in batch["_ids"])
        total += batch["input_ids"].numel()
    return 1 - real / total


def test_similar_lengths_save_padding():
    plain, pools = (padding_share(Loader(SAMPLES, CausalLM(), **WAYS[w]), 26) for w in ("plain", "pools"))
    tokens = padding_share(Loader(SAMPLES, CausalLM(), **WAYS["tokens"]), 40)
    assert plain > 0.35 and pools < 0.2 and tokens < 0.1, (plain, pools, tokens)


def test_a_batch_stays_below_the_tokens_it_may_have():
    batches = Loader(SAMPLES, CausalLM(), max_tokens=300, lengths=LENGTHS)
    sizes = [batches.next_batch()["input_ids"] for _ in range(60)]
    assert max(ids.numel() for ids in sizes) <= 300
    assert sum(ids.numel() for ids in sizes) > 0.7 * 300 * 60
    assert len({len(ids) for ids in sizes}) > 3
    widths = [ids.shape[1] for ids in sizes[:12]]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)  # shuffled between


@pytest.mark.parametrize(
    "lengths, ends",
    [
        ([50] * 6 + [1] * 100, [6, 106]),  # many short ones at the end: no room for them in the batch before
        ([50] * 6 + [40] * 7 + [39], [6, 10, 14]),  # one left over: the last two share
        ([300, 300], [1, 2]),
        ([10], [1]),
    ],
)
def test_where_batches_end(lengths, ends):
    assert _ends(np.array(lengths), 300) == ends
    for begin, end in zip([0, *ends], ends):
        assert lengths[begin] * (end - begin) <= 300


def test_windows_of_a_stream(tmp_path):
    shards = write_shards(["abcdefghij" * 9], CharTokenizer("abcdefghij"), tmp_path / "s")
    for tokens in (shards, torch.arange(90) % 10, np.arange(90) % 10):
        dataset = FixedLength(tokens, 20)
        assert len(dataset) == 4 and dataset.lengths.tolist() == [20] * 4
        assert [int(t) for t in dataset[3]] == list(range(10)) * 2
        with pytest.raises(IndexError, match="window 4 of 4"):
            dataset[4]
        assert Loader(dataset, CausalLM(), 2).next_batch()["input_ids"].shape == (2, 20)
    with pytest.raises(ValueError, match="length: got 91, expected 1 to the 90"):
        FixedLength(shards, 91)


def test_evaluation_sees_each_sample_once_and_repeats():
    batches = EvaluationLoader(SAMPLES, MaskedLM(1, 200), 10)
    first, second = list(batches), list(batches)
    assert len(first) == len(batches) == 11 and [len(b["input_ids"]) for b in first] == [10] * 10 + [3]
    for a, b in zip(first, second):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_ranks_share_the_evaluation_as_often_and_draw_the_same():
    """103 samples in batches of 12: the last has seven for two ranks, and in batches of 6 one, which both have."""
    for size, last in ((12, (4, 3)), (6, (1, 0))):
        whole = list(EvaluationLoader(SAMPLES, MaskedLM(1, 200), size))
        ranks = [list(EvaluationLoader(SAMPLES, MaskedLM(1, 200), size, rank=r, world_size=2)) for r in (0, 1)]
        for batch, *parts in zip(whole, *ranks, strict=True):
            for rank, part in enumerate(parts):
                if "_dropped" not in part:
                    width = part["labels"].shape[1]
                    assert torch.equal(part["labels"], batch["labels"][rank::2, :width])
        counts = [0 if "_dropped" in rank[-1] else len(rank[-1]["labels"]) for rank in ranks]
        assert tuple(counts) == last and not any("_dropped" in batch for rank in ranks for batch in rank[:-1])
    with pytest.raises(ValueError, match="9 rows cannot be shared equally by world_size = 2 processes"):
        EvaluationLoader(SAMPLES, MaskedLM(1, 200), 9, world_size=2)


def test_errors_of_the_dataset_come_through_the_thread():
    class Broken(list):
        def __getitem__(self, index):
            raise RuntimeError(f"sample {index} cannot be read")

    with pytest.raises(RuntimeError, match=r"sample \d cannot be read"):
        Loader(Broken([1, 2, 3]), CausalLM(), 1, prefetch=True).next_batch()


@pytest.mark.parametrize(
    "message, options",
    [
        ("give one of them", {}),
        ("give one of them", {"batch_size": 2, "max_tokens": 100}),
        ("batch_size: got 0", {"batch_size": 0}),
        ("pool: got 12, expected a multiple of batch_size 8", {"batch_size": 8, "pool": 12, "lengths": LENGTHS}),
        ("pool: got 0, expected a multiple", {"batch_size": 8, "pool": 0, "lengths": LENGTHS}),
        ("pool: got -1, expected at least 1", {"max_tokens": 100, "pool": -1, "lengths": LENGTHS}),
        ("lengths: needed, one for each of 103", {"max_tokens": 100}),
        ("lengths: needed, one for each of 103", {"batch_size": 2, "pool": 4, "lengths": LENGTHS[:5]}),
        ("max_tokens: 20 does not hold the longest sample, of 59", {"max_tokens": 20, "lengths": LENGTHS}),
        ("expected at least 236", {"max_tokens": 200, "lengths": LENGTHS, "world_size": 2}),
        ("pool: 3 samples for 4 processes", {"max_tokens": 600, "pool": 3, "lengths": LENGTHS, "world_size": 4}),
        ("batch_size: 8 rows cannot be shared equally by world_size = 3", {"batch_size": 8, "world_size": 3}),
    ],
)
def test_bad_arguments(message, options):
    with pytest.raises(ValueError, match=message):
        Loader(SAMPLES, CausalLM(), **options)


def test_no_samples_and_another_run():
    with pytest.raises(ValueError, match="has no samples"):
        Order(0, 4)
    with pytest.raises(ValueError, match="batch_size = 8, this one has 4"):
        Loader(SAMPLES, CausalLM(), 4).load_state_dict(loader("plain").state_dict())
    with pytest.raises(ValueError, match="samples = 103, this one has 50"):
        Loader(SAMPLES[:50], CausalLM(), 8).load_state_dict(loader("plain").state_dict())
