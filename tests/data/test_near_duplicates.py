"""Near-duplicates: estimates beside exact Jaccard, what is found at each similarity, which document is named."""

import random

import numpy as np
import pytest

pytest.importorskip("rensa", reason="the package rensa is not installed")

from fastformer.data.near_duplicates import PIECE, NearDuplicates, choose_bands, shingle_hashes


def words(count, seed):
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghij", k=5)) for _ in range(count)]


def shingles(text, size=5):
    units = text.lower().split()
    return {tuple(units[i : i + size]) for i in range(max(1, len(units) - size + 1))}


def jaccard(a, b):
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def pair(similarity, seed, count=1000):
    """Two texts that share so long a beginning that their shingles overlap by about ``similarity``."""
    common = int(count * 2 * similarity / (1 + similarity))
    start = words(common, seed)
    return tuple(" ".join(start + words(count - common, (seed, side).__hash__())) for side in (1, 2))


def test_hashes_tell_exactly_the_shingles_apart():
    # Jaccard from the hashes is Jaccard from the words themselves.
    for similarity in (0.0, 0.3, 0.8, 1.0):
        a, b = pair(similarity, 5)
        hashes, bounds = shingle_hashes([a, b])
        first, second = (set(hashes[bounds[i] : bounds[i + 1]].tolist()) for i in (0, 1))
        assert len(first & second) / len(first | second) == jaccard(a, b)


@pytest.mark.parametrize("similarity", [0.5, 0.65, 0.8, 0.9, 0.97])
def test_estimates_are_within_their_standard_deviation(similarity):
    errors = []
    for seed in range(40):
        a, b = pair(similarity, seed)
        finder = NearDuplicates(threshold=0.2)
        _, repeat = finder.add([a, b])
        errors.append(repeat.similarity - jaccard(a, b))
    deviation = (similarity * (1 - similarity) / 128) ** 0.5
    assert abs(np.mean(errors)) < 3 * deviation / 40**0.5, "biased"
    assert np.sqrt(np.mean(np.square(errors))) < 1.4 * deviation


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("similarity, found", [(0.5, 0), (0.65, 0), (0.9, 1), (0.95, 1), (1.0, 1)])
def test_recall_and_precision_beside_the_threshold(similarity, found, verify):
    pairs = [pair(similarity, seed) for seed in range(30)]
    finder = NearDuplicates(threshold=0.8, verify=verify)
    assert finder.add([a for a, _ in pairs]) == [None] * 30
    repeats = finder.add([b for _, b in pairs])
    right = [repeat is not None and repeat.of == number for number, repeat in enumerate(repeats)]
    assert sum(right) == 30 * found
    assert sum(repeat is not None for repeat in repeats) == 30 * found
    if verify and found:
        assert [repeat.similarity for repeat in repeats] == [jaccard(a, b) for a, b in pairs]


def test_verification_decides_pairs_next_to_the_threshold_exactly():
    pairs = [pair((0.78, 0.79, 0.81, 0.82)[seed % 4], seed) for seed in range(80)]
    finder = NearDuplicates(threshold=0.8, verify=True)
    finder.add([a for a, _ in pairs])
    exact = [jaccard(a, b) >= 0.8 for a, b in pairs]
    answers = [repeat is not None for repeat in finder.add([b for _, b in pairs])]
    assert sum(x != y for x, y in zip(exact, answers)) <= 1  # a pair in a hundred at the threshold is never compared


def test_batches_do_not_matter():
    texts = [text for seed in range(30) for text in pair(0.9, seed % 20, count=60)]
    at_once = NearDuplicates().add(texts)
    finder = NearDuplicates()
    one_by_one = [repeat for text in texts for repeat in finder.add([text])]
    assert at_once == one_by_one
    assert len(finder) == sum(repeat is None for repeat in at_once) < len(texts)


def test_a_repeat_names_the_most_similar_document_that_was_kept():
    base = words(400, 1)
    a = " ".join(base)
    b = base[:340] + words(60, 2)  # 0.74 of a: kept
    c = " ".join(b[:385] + words(15, 3))  # 0.93 of b
    b = " ".join(b)
    repeats = NearDuplicates(threshold=0.85).add([a, b, "nothing like it at all whatever", a.upper(), c])
    assert repeats[:3] == [None, None, None] and repeats[3] == (0, 1.0)
    assert repeats[4].of == 1
    assert NearDuplicates(threshold=0.98).add([c, a, b, a]) == [None, None, None, (1, 1.0)]


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("To be, or not to be", "to  be or\nNOT to be!", True),  # case, spaces and punctuation are no words
        ("“Größe” zählt — immer, wieder, hier", '"größe" ZÄHLT immer wieder hier', True),  # beyond ASCII too
        ("one two", "one two", True),  # fewer words than a shingle has
        ("one two", "two one", False),
        ("one two", "one two three", False),
        ("abc", "ab c", False),
        ("", "", False),  # nothing repeats nothing
        ("?!", "?!", False),
    ],
)
def test_what_a_word_is(one, other, same):
    (_, repeat) = NearDuplicates().add([one, other])
    assert (repeat is not None) == same


def test_characters_for_languages_without_spaces():
    text = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 3
    changed = text[:-4] + "知らない"
    assert NearDuplicates(unit="word").add([text, changed])[1] is None
    assert NearDuplicates(unit="character").add([text, changed])[1].of == 0


def test_documents_longer_than_a_piece():
    # Shingles are lost only across the borders of the pieces.
    text = " ".join(words(PIECE // 4, 9))
    hashes, bounds = shingle_hashes(["short one", text, "another short one of six words"])
    lost = len(shingles(text)) - len(set(hashes[bounds[1] : bounds[2]].tolist()))
    assert bounds[1] == 1 and bounds[3] - bounds[2] == 2 and abs(lost) <= 4 * (len(text) // PIECE)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_are_as_long_as_the_threshold_allows(threshold):
    bands, rows = choose_bands(threshold, 128)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.99
    longer = rows + 1
    assert longer > 128 or 1 - (1 - threshold**longer) ** (128 // longer) < 0.99


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"threshold": 0.0}, "threshold: got 0.0"),
        ({"threshold": 80}, "threshold: got 80"),
        ({"shingle_size": 0}, "shingle_size: got 0"),
        ({"unit": "line"}, "unit: got 'line', expected one of word, character"),
        ({"num_hashes": 4}, "num_hashes: got 4"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        NearDuplicates(**settings)
