"""Collators: shapes and names; what is drawn has the published distribution and depends on the sample's key alone."""

import numpy as np
import pytest
import torch

from fastformer.data import (
    CausalLM,
    Classification,
    MaskedLM,
    PackedCausalLM,
    Seq2Seq,
    SpanCorruption,
    TokenDeletion,
    span_corruption_lengths,
)
from fastformer.data.collators import noise_mask
from fastformer.data.draws import sample_keys, uniforms, words

VOCABULARY = 1000
MASK, PAD, CLS, SEP = 4, 0, 2, 3


def keys(count, seed=0, epoch=0):
    return sample_keys(seed, np.full(count, epoch), np.arange(count))


def surprise(statistic, freedom):
    """How many standard deviations a chi-square is above what chance gives (Wilson & Hilferty 1931)."""
    variance = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - variance)) / variance**0.5


def by_chance(observed, probabilities):
    """Whether counts agree with probabilities, within 4 standard deviations."""
    expected = np.asarray(probabilities) * np.sum(observed)
    assert expected.min() > 5, "the test needs more draws"
    return surprise(((np.asarray(observed) - expected) ** 2 / expected).sum(), len(expected) - 1) < 4


def alike(a, b):
    """Whether two samples of small integers may have one distribution; what is rare counts as one value."""
    size = max(a.max(), b.max()) + 1
    table = np.stack([np.bincount(x.ravel(), minlength=size) for x in (a, b)]).astype(float)
    rare = table.sum(0) < 20
    table = np.concatenate([table[:, ~rare], table[:, rare].sum(1, keepdims=True)], 1)
    table = table[:, table.sum(0) > 0]
    expected = table.sum(0) * table.sum(1, keepdims=True) / table.sum()
    freedom = table.shape[1] - 1
    return freedom == 0 or surprise(((table - expected) ** 2 / expected).sum(), freedom) < 4


# ---- draws ----------------------------------------------------------------------------------------------------------


def test_draws_are_functions_of_seed_epoch_and_sample():
    a = words(keys(50), 20)
    assert np.array_equal(a, words(keys(50), 20)) and np.array_equal(a[:, :7], words(keys(50), 7))
    assert np.array_equal(a[17:18], words(sample_keys(0, np.array([0]), np.array([17])), 20))
    for other in (keys(50, seed=1), keys(50, epoch=1)):
        assert not np.isin(words(other, 20), a).any()
    assert len(np.unique(a)) == a.size and not np.isin(words(keys(50), 20, stream=1), a).any()


def test_draws_are_uniform_and_independent():
    u = uniforms(keys(400), 500)
    assert by_chance(np.histogram(u, 64, (0, 1))[0], np.full(64, 1 / 64))
    pairs = np.histogram2d(u[:, :-1].ravel(), u[:, 1:].ravel(), 12)[0].ravel()  # along a sample
    assert by_chance(pairs, np.full(144, 1 / 144))
    pairs = np.histogram2d(u[:-1].ravel(), u[1:].ravel(), 12)[0].ravel()  # between samples
    assert by_chance(pairs, np.full(144, 1 / 144))
    bits = (words(keys(400), 50)[..., None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert abs(bits.mean((0, 1)) - 0.5).max() < 0.02  # 20,000 draws: 5.6 standard deviations


# ---- padding --------------------------------------------------------------------------------------------------------


def test_causal_rows_are_padded_and_padding_is_not_scored():
    batch = CausalLM(pad_token_id=9)([[1, 2, 3], torch.tensor([4]), np.array([5, 6], dtype=np.uint16)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9], [5, 6, 9]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100], [5, 6, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert all(t.dtype == torch.int64 for t in batch.values())
    assert "attention_mask" not in CausalLM()([[1, 2], [3, 4]])
    assert CausalLM(multiple_of=8)([[1, 2, 3]])["input_ids"].shape == (1, 8)
    answers = CausalLM()([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}])
    assert answers["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]
    with pytest.raises(ValueError, match="labels: up to 1 beside 2"):
        CausalLM()([{"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ValueError, match="samples: a batch needs at least one"):
        CausalLM()([])
    with pytest.raises(ValueError, match="samples: hold no tokens"):
        PackedCausalLM()([[], []])


def test_pairs_and_labels():
    pairs = [{"input_ids": [1, 2, 3], "labels": [7]}, {"input_ids": [4], "labels": [8, 9]}]
    batch = Seq2Seq(pad_token_id=5)(pairs)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 5]] and batch["labels"].tolist() == [[7, -100], [8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    texts = [
        {"input_ids": [1, 2], "token_type_ids": [0, 1], "labels": 3},
        {"input_ids": [4], "token_type_ids": [1], "labels": 0},
    ]
    batch = Classification()(texts)
    assert batch["labels"].tolist() == [3, 0] and batch["labels"].dtype == torch.int64
    assert batch["token_type_ids"].tolist() == [[0, 1], [1, 0]]
    tokens = Classification(per_token=True)(
        [{"input_ids": [1, 2], "labels": [0, -100]}, {"input_ids": [1], "labels": [5]}]
    )
    assert tokens["labels"].tolist() == [[0, -100], [5, -100]]
    scores = Classification()([{"input_ids": [1], "labels": 0.5}, {"input_ids": [2], "labels": 1.5}])
    assert scores["labels"].dtype == torch.float32
    assert "labels" not in Classification()([{"input_ids": [1]}])


# ---- masking --------------------------------------------------------------------------------------------------------


def rows(count=200, length=120):
    generator = np.random.default_rng(5)
    return [np.concatenate([[CLS], generator.integers(5, VOCABULARY, length - 2), [SEP]]) for _ in range(count)]


def masked_lm(**options):
    return MaskedLM(MASK, VOCABULARY, pad_token_id=PAD, special_ids=(CLS, SEP), **options)


def test_fifteen_percent_are_scored_and_80_10_10_becomes_of_them():
    originals = torch.from_numpy(np.stack(rows()))
    batch = masked_lm()(rows(), keys(200))
    chosen = batch["labels"] != -100
    count = int(chosen.sum())
    eligible = 200 * 118
    assert abs(count / eligible - 0.15) < 5 * (0.15 * 0.85 / eligible) ** 0.5
    assert torch.equal(batch["labels"][chosen], originals[chosen])
    assert torch.equal(batch["input_ids"][~chosen], originals[~chosen])
    assert not chosen[:, [0, -1]].any()
    inputs = batch["input_ids"][chosen]
    masked, kept = (inputs == MASK).sum().item(), (inputs == originals[chosen]).sum().item()
    assert by_chance([masked, kept, count - masked - kept], [0.8, 0.1 + 1e-4, 0.1 - 1e-4])
    # Where in the row does not matter, nor how long it is.
    where = np.histogram(np.nonzero(chosen.numpy())[1] - 1, 8, (0, 118))[0]
    assert by_chance(where, np.full(8, 1 / 8))
    random = inputs[(inputs != MASK) & (inputs != originals[chosen])].numpy()
    assert by_chance(np.histogram(random, 10, (0, VOCABULARY))[0], np.full(10, 0.1))


def test_masks_are_new_in_each_epoch_and_do_not_depend_on_the_batch():
    collator, samples = masked_lm(), rows(6)
    samples[2] = samples[2][:50]
    first = collator(samples, keys(6))
    assert torch.equal(collator(samples, keys(6))["input_ids"], first["input_ids"])
    assert not torch.equal(collator(samples, keys(6, epoch=1))["labels"], first["labels"])
    alone = collator(samples[2:3], keys(6)[2:3])  # narrower, too
    assert torch.equal(alone["input_ids"][0], first["input_ids"][2, :50])
    assert torch.equal(alone["labels"][0], first["labels"][2, :50])
    assert (first["labels"][2, 50:] == -100).all() and first["attention_mask"].sum(1).tolist()[2] == 50
    assert not torch.equal(collator(samples)["labels"], collator(samples)["labels"])  # without keys


def test_whole_words_are_chosen_together():
    starts = np.ones(VOCABULARY, dtype=bool)
    starts[VOCABULARY // 2 :] = False  # the upper half continues a word
    samples = rows()
    batch = masked_lm(word_starts=starts)(samples, keys(200))
    chosen = (batch["labels"] != -100).numpy()
    words_seen = words_chosen = 0
    for row, choice in zip(samples, chosen):
        begins = starts[row]
        begins[0] = True
        word = begins.cumsum() - 1
        share = np.bincount(word, choice) / np.bincount(word)
        special = np.isin(row, (CLS, SEP))
        plain = ~np.isin(np.arange(word[-1] + 1), word[special])
        assert np.isin(share[plain], (0, 1)).all()
        words_seen, words_chosen = words_seen + plain.sum(), words_chosen + share[plain].sum()
        assert not choice[special].any()
    assert abs(words_chosen / words_seen - 0.15) < 5 * (0.15 * 0.85 / words_seen) ** 0.5
    # Each token of a word meets its own fate: some words are masked in part.
    inputs = batch["input_ids"].numpy()
    mixed = chosen[:, 1:] & chosen[:, :-1] & ((inputs[:, 1:] == MASK) != (inputs[:, :-1] == MASK))
    assert mixed.any()


def test_bad_settings():
    with pytest.raises(ValueError, match=r"probability: got 1\.5"):
        masked_lm(probability=1.5)
    with pytest.raises(ValueError, match=r"random: 0\.3 and masked 0\.8 are more than 1"):
        masked_lm(random=0.3)
    with pytest.raises(ValueError, match="sentinel_ids: this tokenizer has none"):
        SpanCorruption([])
    with pytest.raises(ValueError, match=r"mean_span: got 0\.5"):
        SpanCorruption([1], mean_span=0.5)
    with pytest.raises(ValueError, match="sentinel_ids: 2 for 5 spans in a sample of 100"):
        SpanCorruption([1, 2])([list(range(100))])
    with pytest.raises(ValueError, match="keys: 3 for 1 samples"):
        masked_lm()([[5]], keys(3))


# ---- span corruption ------------------------------------------------------------------------------------------------


def published_noise_mask(length, density, mean_span, generator):
    """Raffel et al.'s algorithm by its definition: shuffle where segments begin, alternate the two divisions."""
    noise = min(max(int(np.round(length * density)), 1), length - 1)
    spans = max(int(np.round(noise / mean_span)), 1)

    def segments(items):
        begins = np.arange(items - 1) < spans - 1
        generator.shuffle(begins)
        segment = np.cumsum(np.concatenate([[0], begins]))
        return np.bincount(segment, minlength=spans)

    mask = []
    for quiet, noisy in zip(segments(length - noise), segments(noise)):
        mask += [False] * quiet + [True] * noisy
    return np.array(mask)


def runs(mask):
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return edges[1::2] - edges[::2]


@pytest.mark.parametrize("length, density, mean_span", [(64, 0.15, 3.0), (40, 0.5, 2.0), (11, 0.3, 1.0)])
def test_spans_are_distributed_as_published(length, density, mean_span):
    draws, generator = 2000, np.random.default_rng(9)
    ours = noise_mask(length, density, mean_span, keys(draws))
    published = np.stack([published_noise_mask(length, density, mean_span, generator) for _ in range(draws)])
    assert set(ours.sum(1)) == set(published.sum(1)) and len(set(ours.sum(1))) == 1
    counts = [{len(runs(m)) for m in masks} for masks in (ours, published)]
    assert counts[0] == counts[1] and len(counts[0]) == 1

    spans = [np.stack([runs(m) for m in masks]) for masks in (ours, published)]
    gaps = [np.stack([runs(~m) for m in masks]) for masks in (ours, published)]
    for nth in (0, spans[0].shape[1] // 2, -1):
        assert alike(spans[0][:, nth], spans[1][:, nth]) and alike(gaps[0][:, nth], gaps[1][:, nth])
    assert alike(np.nonzero(ours)[1], np.nonzero(published)[1])  # where the noise is


def test_short_samples_have_a_mask():
    assert noise_mask(1, 0.15, 3.0, keys(2)).tolist() == [[False]] * 2 and noise_mask(0, 0.15, 3.0, keys(1)).size == 0
    assert noise_mask(2, 0.15, 3.0, keys(1)).tolist() == [[False, True]]


def test_sentinels_stand_for_the_spans_and_the_target_restores_the_text():
    sentinels = list(range(999, 899, -1))
    samples = [np.arange(10, 10 + n) for n in (100, 40, 7)]
    batch = SpanCorruption(sentinels)(samples, keys(3))
    for i, sample in enumerate(samples):
        inputs = batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist()
        target = batch["labels"][i][batch["labels"][i] != -100].tolist()
        assert inputs.pop() == target.pop() == 1  # the end
        spans, restored = {}, []
        for token in target:
            if token in sentinels:
                spans[last := token] = []
            else:
                spans[last].append(token)
        assert list(spans) == sentinels[: len(spans)] and all(spans.values())
        for token in inputs:
            restored += spans.pop(token) if token in sentinels else [token]
        assert restored == sample.tolist() and not spans
    again = SpanCorruption(sentinels)([*samples, samples[1]], keys(4))  # beside another of the same length
    assert torch.equal(batch["labels"], again["labels"][:3]) and not torch.equal(again["labels"][1], again["labels"][3])
    assert not torch.equal(batch["labels"], SpanCorruption(sentinels)(samples, keys(3, epoch=1))["labels"])


@pytest.mark.parametrize("input_length, tokens, targets", [(512, 568, 114), (128, 141, 29)])
def test_lengths_that_fill_the_input(input_length, tokens, targets):
    # 568 and 114 are what the T5 code reports for its inputs of 512.
    assert span_corruption_lengths(input_length) == (tokens, targets)
    batch = SpanCorruption(list(range(900, 1000)))([np.arange(tokens)], keys(1))
    assert batch["input_ids"].shape == (1, input_length) and batch["labels"].shape == (1, targets)


def test_deletion_leaves_the_rest_in_order():
    samples = [[*range(10, 300), 1], [10], [11, 12]]
    collator = TokenDeletion(0.3, special_ids=(1,))
    batch = collator(samples, keys(3))
    inputs = batch["input_ids"][0].tolist()
    assert batch["labels"][0].tolist() == samples[0] and batch["labels"][1].tolist()[:2] == [10, -100]
    assert inputs == [*sorted(set(inputs) - {1}), 1]
    assert abs((290 - len(inputs) + 1) / 290 - 0.3) < 5 * (0.21 / 290) ** 0.5
    everything = TokenDeletion(1.0)(samples, keys(3))
    assert everything["input_ids"].shape == (3, 1)  # one token stays, or there would be nothing to read
