"""Generation with an encoder: what transformers answers, with the encoder run once and its keys and values kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.generation.pairs import END, VOCAB, prompts, some_end_tokens, t5_models

PAIRS = [t5_models(), t5_models(1, feed_forward_proj="gated-gelu", tie_word_embeddings=False)]
BATCHES = {"one input": (9,), "equal lengths": (6, 6), "padding": (9, 5, 2)}


def inputs(lengths=(9, 5, 2), side="right"):
    return prompts(lengths, side, pad=0)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_and_beams_are_those_of_transformers(lengths, side):
    ids, mask = inputs(lengths, side)
    for ours, theirs in PAIRS:
        for beams in (1, 3):
            arguments = {"attention_mask": mask, "max_new_tokens": 14, "num_beams": beams}
            wanted = theirs.generate(ids, do_sample=False, **arguments)
            assert torch.equal(ours.generate(ids, **arguments), wanted)
            assert (wanted[:, 0] == 0).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_options_together(data):
    def draw(*values):
        return data.draw(st.sampled_from(values))

    ours, theirs = draw(*PAIRS)
    ids, mask = inputs(draw(*BATCHES.values()), draw("left", "right"))
    beams = draw(1, 2, 4)
    arguments = {"attention_mask": mask, "num_beams": beams, "max_new_tokens": draw(4, 12)}
    arguments |= {"repetition_penalty": draw(1.0, 1.2), "no_repeat_ngram_size": draw(0, 2)}
    arguments |= {"eos_token_id": draw(END, [END, 20, 33], some_end_tokens()), "min_new_tokens": draw(0, 4)}
    if draw(False, True):  # what the decoder begins from, with and without the start token
        arguments["decoder_input_ids"] = torch.tensor([[draw(0, 7), 9, 8]]).repeat(len(ids), 1)
    if beams > 1:
        arguments |= {"num_return_sequences": draw(1, 2), "early_stopping": draw(True, False, "never")}
        arguments |= {"length_penalty": draw(-1.0, 0.6, 2.0)}
    wanted = theirs.generate(ids, do_sample=False, **arguments)
    assert torch.equal(ours.generate(ids, use_cache=draw(True, False), **arguments), wanted)


def test_a_decoder_deeper_than_the_encoder():
    ours, theirs = t5_models(num_decoder_layers=4)
    ids, mask = inputs()
    for beams in (1, 3):
        arguments = {"attention_mask": mask, "max_new_tokens": 12, "num_beams": beams}
        # With a cache, theirs has no place for the layers that the encoder does not have.
        wanted = theirs.generate(ids, do_sample=False, use_cache=False, **arguments)
        assert torch.equal(ours.generate(ids, **arguments), wanted)


def test_the_encoder_runs_once_on_each_input_and_its_keys_are_computed_once():
    ours, _ = t5_models()
    ids, mask = inputs()
    seen = {"encoder": [], "decoder": [], "cross keys": []}
    ours.encoder.register_forward_hook(lambda module, args, out: seen["encoder"].append(out[0].shape[0]))
    ours.decoder.register_forward_hook(lambda module, args, out: seen["decoder"].append(tuple(out[0].shape[:2])))
    keys = ours.decoder.block[1].layer[1].EncDecAttention.k
    keys.register_forward_hook(lambda module, args, out: seen["cross keys"].append(out.shape[0]))
    for arguments in ({"num_beams": 4}, {"do_sample": True, "num_return_sequences": 4}):
        for calls in seen.values():
            calls.clear()
        ours.generate(ids, attention_mask=mask, max_new_tokens=5, eos_token_id=[], **arguments)
        assert seen == {"encoder": [3], "decoder": [(3, 1), *[(12, 1)] * 4], "cross keys": [3]}


def test_an_input_gets_the_same_answer_alone_and_in_any_batch():
    ours, _ = PAIRS[0]
    lengths = (9, 5, 2)
    ids, mask = inputs(lengths)
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 3, "top_k": 10}):
        options = {"max_new_tokens": 12, "eos_token_id": [], **options}
        together = ours.generate(ids, attention_mask=mask, **options)
        assert torch.equal(ours.generate(ids, **options), together), "padding is recognised without a mask"
        for row, length in enumerate(lengths):
            assert torch.equal(ours.generate(ids[row : row + 1, :length], **options)[0], together[row])


def test_the_encoders_output_may_be_given():
    ours, theirs = PAIRS[0]
    ids, mask = inputs()
    arguments = {"attention_mask": mask, "max_new_tokens": 10, "num_beams": 2}
    wanted = theirs.generate(ids, do_sample=False, **arguments)
    with torch.no_grad():
        encoded = ours.get_encoder()(input_ids=ids, attention_mask=mask)
    before = encoded.last_hidden_state.clone()
    assert torch.equal(ours.generate(encoder_outputs=encoded, **arguments), wanted)
    assert torch.equal(ours.generate(ids, encoder_outputs=encoded, **arguments), wanted)
    assert torch.equal(encoded.last_hidden_state, before)
    found = ours.generate(encoder_outputs=encoded, do_sample=True, seed=0, max_new_tokens=3)
    assert found.shape == (3, 4)
    with pytest.raises(ValueError, match=r"^attention_mask: shape \(3, 8\)"):
        ours.generate(encoder_outputs=encoded, attention_mask=mask[:, 1:])


def test_scores_and_a_cache_to_go_on_from():
    ours, theirs = PAIRS[0]
    ids, mask = inputs()
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}
    found = ours.generate(ids, eos_token_id=[], **arguments)
    wanted = theirs.generate(ids, do_sample=False, eos_token_id=None, **arguments)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(wanted.scores), rtol=1e-3, atol=1e-3)
    assert found.past_key_values.get_seq_length() == 8
    longer = ours.generate(
        ids, attention_mask=mask, decoder_input_ids=found.sequences, past_key_values=found.past_key_values,
        max_new_tokens=6, eos_token_id=[],
    )  # fmt: skip
    assert torch.equal(longer, ours.generate(ids, attention_mask=mask, max_new_tokens=14, eos_token_id=[]))


def test_decoder_prompts_of_different_lengths():
    ours, _ = PAIRS[0]
    ids, _ = inputs((6, 6))
    begun = torch.tensor([[0, 11, 12, 13], [0, 0, 0, 14]])
    seen = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    options = {"max_new_tokens": 10, "eos_token_id": []}
    both = ours.generate(ids, decoder_input_ids=begun, decoder_attention_mask=seen, **options)
    for row, length in ((0, 4), (1, 2)):
        alone = ours.generate(ids[row : row + 1], decoder_input_ids=begun[row : row + 1, -length:], **options)
        assert torch.equal(alone[0, length:], both[row, 4:])


def test_half_precision():
    ours, _ = t5_models()
    ids, mask = inputs()
    found = ours.to(torch.bfloat16).generate(ids, attention_mask=mask, max_new_tokens=10, num_beams=2, eos_token_id=[])
    assert found.shape == (3, 11) and (found < VOCAB).all()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"decoder_input_ids": torch.zeros(2, 3, dtype=torch.long)}, "decoder_input_ids"),
        ({"decoder_input_ids": torch.zeros(3, 0, dtype=torch.long)}, "decoder_input_ids"),
        (
            {"decoder_input_ids": torch.zeros(3, 2, dtype=torch.long), "decoder_attention_mask": torch.ones(3, 3)},
            "decoder_attention_mask",
        ),
        (
            {"decoder_input_ids": torch.zeros(3, 2, dtype=torch.long), "decoder_attention_mask": torch.eye(3)[:, :2]},
            "decoder_attention_mask",
        ),
        ({"attention_mask": torch.ones(3, 4)}, "attention_mask"),
        ({"decoder_start_token_id": None}, "decoder_start_token_id"),
        ({"input_ids": None}, "input_ids"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    ours, _ = PAIRS[0]
    with pytest.raises(ValueError, match=f"^{name}"):
        ours.generate(**{"input_ids": inputs()[0], "max_new_tokens": 2, **arguments})
