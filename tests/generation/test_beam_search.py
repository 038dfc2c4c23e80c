"""Beam search: the hypotheses, scores and rows of transformers, for every setting that changes them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastformer.generation import KVCache
from tests.generation.pairs import END, PAD, models, prompts, some_end_tokens

BATCHES = {"one prompt": (9,), "equal lengths": (6, 6), "left padding": (9, 5, 2)}
PAIRS = [models(seed) for seed in range(3)]


def assert_same(pair, lengths, use_cache=True, **arguments):
    ours, theirs = pair
    ids, mask = prompts(lengths)
    arguments = {"attention_mask": mask, "return_dict_in_generate": True, "output_scores": True, **arguments}
    found = ours.generate(ids, use_cache=use_cache, **arguments)
    wanted = theirs.generate(ids, do_sample=False, **arguments)
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(found.beam_indices, wanted.beam_indices.long())
    torch.testing.assert_close(found.sequences_scores, wanted.sequences_scores, rtol=1e-4, atol=1e-4)
    assert len(found.scores) == len(wanted.scores)
    torch.testing.assert_close(found.scores[-1], wanted.scores[-1], rtol=1e-3, atol=1e-3)
    return found


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("num_beams", [2, 4])
def test_hypotheses_are_those_of_transformers(num_beams, lengths):
    for pair in PAIRS:
        arguments = {"max_new_tokens": 20, "num_beams": num_beams, "pad_token_id": PAD}
        found = assert_same(pair, lengths, num_return_sequences=num_beams, **arguments)
        assert found.sequences.shape == (len(lengths) * num_beams, max(lengths) + 20)
        assert (found.sequences_scores.view(-1, num_beams).diff(dim=1) <= 0).all(), "best first"
        again = pair[0].generate(
            *prompts(lengths)[:1], attention_mask=prompts(lengths)[1], num_return_sequences=num_beams, **arguments
        )
        assert torch.equal(again, found.sequences), "the fused decoder, in inference mode"


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.5, 0.0, 1.0, 2.0])
def test_early_stopping_and_length_penalty(length_penalty, early_stopping):
    """With many end tokens, when to stop and what to keep is decided at every step."""
    for pair, count in zip(PAIRS, (8, 25, 40)):
        arguments = {"length_penalty": length_penalty, "early_stopping": early_stopping, "num_return_sequences": 2}
        arguments |= {"max_new_tokens": 24, "num_beams": 3, "pad_token_id": PAD, "eos_token_id": some_end_tokens(count)}
        assert_same(pair, BATCHES["left padding"], **arguments)


def test_the_length_penalty_chooses_between_long_and_short():
    ours, _ = PAIRS[1]
    ids, _ = prompts((9,))
    arguments = {"max_new_tokens": 30, "num_beams": 4, "eos_token_id": some_end_tokens(40), "early_stopping": "never"}
    short, long = (ours.generate(ids, length_penalty=penalty, **arguments).shape[1] for penalty in (-2.0, 8.0))
    assert short < long


@pytest.mark.parametrize("pad", [PAD, 0, END], ids=["pad", "pad 0", "pad is the end token"])
def test_a_text_that_ends_early_is_filled(pad):
    for pair in PAIRS:
        arguments = {"max_new_tokens": 15, "num_beams": 2, "num_return_sequences": 2, "pad_token_id": pad}
        assert_same(pair, BATCHES["left padding"], eos_token_id=[END, *range(10, 40)], **arguments)


def test_every_hypothesis_ends_at_its_first_token():
    """All but two tokens end the text: the search has to stop, and to find something to return."""
    for pair in PAIRS:
        ends = [t for t in range(97) if t not in (11, 12)]
        assert_same(pair, (9, 4), max_new_tokens=5, num_beams=3, num_return_sequences=3, eos_token_id=ends)


def test_a_forced_length():
    assert_same(PAIRS[0], (9, 4), max_new_tokens=1, num_beams=3)
    assert_same(PAIRS[0], (9,), max_new_tokens=12, min_new_tokens=12, num_beams=3, eos_token_id=some_end_tokens())
    ids, _ = prompts((9,))
    assert torch.equal(PAIRS[0][0].generate(ids, max_new_tokens=0, num_beams=2), ids)


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")  # theirs
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_options_together(data):
    def draw(*values):
        return data.draw(st.sampled_from(values))

    beams = draw(2, 3, 5)
    assert_same(
        *(draw(*PAIRS), draw(*BATCHES.values())),
        num_beams=beams,
        num_return_sequences=draw(1, 2),
        max_new_tokens=draw(1, 3, 16),
        min_new_tokens=draw(None, 4),
        length_penalty=draw(-1.0, 0.6, 1.0),
        early_stopping=draw(True, False, "never"),
        repetition_penalty=draw(0.8, 1.0, 1.3),
        no_repeat_ngram_size=draw(0, 2, 3),
        eos_token_id=draw(END, [END, 20, 33], some_end_tokens()),
        pad_token_id=PAD,
        use_cache=draw(True, False),
    )


def test_a_prompt_gives_the_same_hypotheses_alone_and_in_a_batch():
    ours, _ = PAIRS[0]
    lengths = (9, 5, 2)
    ids, mask = prompts(lengths)
    arguments = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 20, "eos_token_id": []}
    together = ours.generate(ids, attention_mask=mask, **arguments)
    for row, length in enumerate(lengths):
        alone = ours.generate(ids[row : row + 1, -length:], **arguments)
        assert torch.equal(together[3 * row : 3 * row + 3, -20:], alone[:, -20:])


def test_beams_over_the_layers_and_over_the_fused_decoder_agree():
    """More sequences than the fused decoder takes, and a hook that rules it out."""
    ours, theirs = models()
    ids, mask = prompts((9, 5, 2))
    arguments = {"attention_mask": mask, "num_beams": 5, "max_new_tokens": 12, "pad_token_id": PAD}
    assert torch.equal(ours.generate(ids, **arguments), theirs.generate(ids, do_sample=False, **arguments))
    arguments["num_beams"] = 2
    wanted = ours.generate(ids, **arguments)
    calls = []
    ours.transformer.h[1].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(ours.generate(ids, **arguments), wanted)
    assert len(calls) == 12, "one call for the prompts, then one a token"


def test_sampled_beams():
    ours, _ = PAIRS[0]
    ids, mask = prompts((9, 5))
    arguments = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 3, "do_sample": True, "top_k": 20}
    arguments |= {"max_new_tokens": 12, "eos_token_id": [], "temperature": 1.3}
    first = ours.generate(ids, seed=1, **arguments)
    assert first.shape == (6, 21) and torch.equal(ours.generate(ids, seed=1, **arguments), first)
    assert not torch.equal(ours.generate(ids, seed=2, **arguments), first)
    alone = ours.generate(ids[1:, -5:], seed=1, **{**arguments, "attention_mask": None})
    assert torch.equal(alone[:, -12:], first[3:, -12:])
    assert len({tuple(row.tolist()) for row in first}) == 6, "drawn without replacement"


def test_surplus_steps_on_a_device_checked_rarely_change_nothing(monkeypatch):
    from fastformer.generation import decoding

    ours, _ = PAIRS[1]
    ids, mask = prompts((9, 5))
    arguments = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 40, "eos_token_id": some_end_tokens()}
    arguments |= {"num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    for early_stopping in (True, False):
        with monkeypatch.context() as patch:
            wanted = ours.generate(ids, early_stopping=early_stopping, **arguments)
            assert wanted.sequences.shape[1] < 40
            patch.setattr(decoding, "STEPS_BETWEEN_CHECKS", {})
            found = ours.generate(ids, early_stopping=early_stopping, **arguments)
            assert torch.equal(found.sequences, wanted.sequences) and len(found.scores) == len(wanted.scores)


def test_reordering_in_place_moves_only_what_differs():
    cache = KVCache(2, 8)
    keys = torch.randn(4, 2, 6, 3)
    for layer in range(2):
        cache.update(keys, 2 * keys, layer)
    address = cache.keys[0].data_ptr()
    order = torch.tensor([0, 0, 3, 2])
    cache.reorder(order, 4)
    assert cache.keys[0].data_ptr() == address
    for layer in range(2):
        assert torch.equal(cache.keys[layer][:, :, :4], keys[:, :, :4])
        assert torch.equal(cache.keys[layer][:, :, 4:6], keys[order, :, 4:6])
        assert torch.equal(cache.values[layer][:, :, 4:6], 2 * keys[order, :, 4:6])
    cache.repeat(2)
    assert cache.keys[1].shape == (8, 2, 8, 3) and torch.equal(cache.keys[1][3, :, :4], keys[1, :, :4])
    cache.reorder(torch.tensor([6]))  # fewer than before
    assert cache.keys[0].shape[0] == 1 and torch.equal(cache.keys[0][0, :, 4:6], keys[2, :, 4:6])
