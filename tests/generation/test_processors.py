"""Logits after each processor: exactly those of transformers; and what is drawn from them."""

import pytest
import torch
from transformers.generation import logits_process as theirs

from fastformer.generation import MinLength, NoRepeatNGram, RepetitionPenalty, sample
from fastformer.generation.processors import Warp
from fastformer.generation.sampling import Sampler, SeededNoise, prompt_keys

VOCAB = 40


def some(batch=5, length=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(8, (batch, length), generator=generator),  # few different tokens: many repetitions
        torch.randn(batch, VOCAB, generator=generator) * 3,
    )


@pytest.mark.parametrize("penalty", [0.7, 1.2, 5.0])
def test_repetition_penalty(penalty):
    tokens, scores = some()
    wanted = theirs.RepetitionPenaltyLogitsProcessor(penalty)(tokens, scores)
    assert torch.equal(RepetitionPenalty(penalty)(tokens, scores), wanted)
    # Padding on the left does not count, and tokens that the scores do not have are no error.
    mask = (torch.arange(12) >= torch.tensor([0, 3, 11, 5, 7])[:, None]).long()
    padding = mask.argmax(1)
    tokens[0, 0], tokens[1, 25] = VOCAB, VOCAB + 7
    wanted = theirs.RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=padding)(tokens, scores)
    before = tokens.clone()
    assert torch.equal(RepetitionPenalty(penalty, mask)(tokens, scores), wanted)
    assert torch.equal(tokens, before) and torch.equal(scores, some()[1]), "nothing given is written into"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 31])
def test_no_repeat_ngram(size):
    tokens, scores = some()
    wanted = theirs.NoRepeatNGramLogitsProcessor(size)(tokens, scores)
    assert torch.equal(NoRepeatNGram(size)(tokens, scores), wanted)
    if size <= 3:
        assert torch.isinf(wanted).any()


def test_min_length():
    tokens, scores = some()
    for length in (30, 31):
        wanted = theirs.MinLengthLogitsProcessor(length, [3, 9])(tokens, scores)
        assert torch.equal(MinLength(length, [3, 9])(tokens, scores), wanted)
    assert torch.isinf(wanted[:, [3, 9]]).all() and not torch.isinf(scores).any()


@pytest.mark.parametrize("min_tokens", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_k": 1},
        {"top_k": 400},
        {"top_p": 0.5},
        {"top_p": 0.95, "temperature": 2.0},
        {"top_p": 0.001},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 10, "min_p": 0.1},
        {"top_k": 20, "top_p": 0.7, "min_p": 0.2, "temperature": 1.5},
    ],
    ids=str,
)
def test_warped_logits(options, min_tokens):
    tokens, scores = some(batch=50)
    wanted = scores
    if "temperature" in options:
        wanted = theirs.TemperatureLogitsWarper(options["temperature"])(tokens, wanted)
    for name, warper in (
        ("top_k", theirs.TopKLogitsWarper),
        ("top_p", theirs.TopPLogitsWarper),
        ("min_p", theirs.MinPLogitsWarper),
    ):
        if name in options:
            wanted = warper(options[name], min_tokens_to_keep=min_tokens)(tokens, wanted)
    found = Warp(Sampler(**options, min_tokens=min_tokens))(tokens, scores)
    assert torch.equal(found, wanted)
    assert torch.isfinite(found).sum(1).min() >= min_tokens


def test_min_p_of_a_draw():
    probability = torch.tensor([0.5, 0.3, 0.12, 0.05, 0.03])
    logits = probability.log().expand(20000, 5)
    tokens = sample(logits, min_p=0.2, generator=torch.Generator().manual_seed(0))
    found = torch.bincount(tokens, minlength=5) / len(tokens)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.3, 0.12, 0, 0]) / 0.92, rtol=0, atol=0.012)
    with pytest.raises(ValueError, match=r"^min_p"):
        sample(logits, min_p=1.5)


def test_seeded_numbers_are_exponential_and_independent():
    keys = torch.tensor(prompt_keys(0, [[i] for i in range(50)], 1))
    noise = SeededNoise(keys)
    like = torch.empty(50, 1000)
    drawn = torch.stack([noise(None, like) for _ in range(4)])  # (step, row, token)
    assert (drawn > 0).all() and torch.isfinite(drawn).all()
    for quantile in (0.01, 0.5, 0.99):
        limit = -torch.log1p(torch.tensor(-quantile))
        assert abs(float((drawn < limit).float().mean()) - quantile) < 0.004
    uniform = 1 - torch.exp(-drawn)
    for other in (uniform.roll(1, 0), uniform.roll(1, 1), uniform.roll(1, 2)):  # the next step, row, token
        correlation = torch.corrcoef(torch.stack((uniform.flatten(), other.flatten())))[0, 1]
        assert abs(float(correlation)) < 0.01


def test_seeded_numbers_belong_to_their_token():
    keys = torch.tensor(prompt_keys(3, [[1, 2], [9]], 1))
    like = torch.empty(2, 6)
    whole = SeededNoise(keys)(None, like)
    some_tokens = torch.tensor([[5, 0], [2, 4]])
    assert torch.equal(SeededNoise(keys)(some_tokens, like[:, :2]), whole.gather(1, some_tokens))
    assert torch.equal(SeededNoise(keys[1:])(None, like[1:]), whole[1:])


def test_keys_tell_prompts_seeds_and_continuations_apart():
    keys = prompt_keys(0, [[1, 2], [3], [1, 2]], 2)
    assert len(set(keys)) == 6
    assert prompt_keys(0, [[1, 2]], 4) == [keys[0], keys[1], keys[4], keys[5]]
    assert prompt_keys(0, [[3]], 2) == keys[2:4]
    assert not set(prompt_keys(1, [[1, 2], [3]], 2)) & set(keys)
    assert all(-(1 << 63) <= key < 1 << 63 for key in keys)


def test_seeded_numbers_are_splitmix64():
    """Bit for bit its outputs, in integers that do not wrap by themselves."""

    def splitmix(key, counter):
        x = (key + counter * 0x9E3779B97F4A7C15) % (1 << 64)
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % (1 << 64)
        return x ^ (x >> 31)

    keys = [-(1 << 63), -5, 0, (1 << 63) - 1]
    noise = SeededNoise(torch.tensor(keys))
    for step in range(6):
        found = noise(None, torch.empty(4, 300))
        # The sign bit of their 23 bits counts the other way round.
        bits = [[(splitmix(key, (step << 32) + token) >> 41) ^ (1 << 22) for token in range(300)] for key in keys]
        uniform = (torch.tensor(bits, dtype=torch.float64) + 0.5) / (1 << 23)
        torch.testing.assert_close(found.double(), -uniform.log(), rtol=1e-6, atol=1e-7)
