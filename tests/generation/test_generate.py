"""Generation: token for token what transformers generates, with the cache and without, padded and alone."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastformer.generation import GenerateOutput, KVCache, generate, sample
from tests.generation.pairs import END, PAD, VOCAB, models, prompts, some_end_tokens


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("batch", ["one prompt", "equal lengths", "left padding"])
def test_greedy_is_transformers_token_for_token(batch, seed):
    ours, theirs = models(seed)
    ids, mask = prompts({"one prompt": (9,), "equal lengths": (6, 6, 6), "left padding": (9, 5, 9, 2)}[batch])
    arguments = {"attention_mask": mask, "max_new_tokens": 55, "pad_token_id": PAD, "do_sample": False}
    wanted = theirs.generate(ids, **arguments)
    assert len(wanted[0].unique()) > 8, "the models should have something to say"
    assert torch.equal(ours.generate(ids, **arguments), wanted)
    assert torch.equal(ours.generate(ids, use_cache=False, **arguments), wanted)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8, "top_k": 0}, {"top_p": 0.9, "top_k": 20, "temperature": 1.5}],
    ids=str,
)
def test_sampling_with_the_cache_is_sampling_without(arguments):
    ours, _ = models()
    ids, mask = prompts()
    arguments = {"attention_mask": mask, "max_new_tokens": 50, "pad_token_id": PAD, "do_sample": True, **arguments}
    first = ours.generate(ids, seed=7, **arguments)
    assert torch.equal(ours.generate(ids, seed=7, use_cache=False, **arguments), first)
    assert not torch.equal(ours.generate(ids, seed=8, **arguments), first)
    drawn = [ours.generate(ids, generator=torch.Generator().manual_seed(n), **arguments) for n in (7, 7, 8)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")  # theirs
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_greedy_options_together(data):
    def draw(*values):
        return data.draw(st.sampled_from(values))

    ours, theirs = models(draw(0, 1, 2))
    ids, mask = prompts(draw((9,), (6, 6), (9, 5, 2)))
    arguments = {
        "attention_mask": mask,
        "max_new_tokens": draw(1, 4, 25),
        "min_new_tokens": draw(None, 3),
        "min_length": draw(None, 15),
        "repetition_penalty": draw(0.8, 1.0, 1.4),
        "no_repeat_ngram_size": draw(0, 1, 2, 4),
        "eos_token_id": draw(END, [END, 20, 33], some_end_tokens(), None),
        "pad_token_id": PAD,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None or name == "eos_token_id"}
    wanted = theirs.generate(ids, do_sample=False, **arguments)
    assert torch.equal(ours.generate(ids, use_cache=draw(True, False), **arguments), wanted)


def test_each_padded_prompt_gives_its_own_text():
    ours, _ = models()
    lengths = (9, 5, 9, 2)
    ids, mask = prompts(lengths)
    together = ours.generate(ids, attention_mask=mask, max_new_tokens=30, eos_token_id=[])
    for row, length in enumerate(lengths):
        alone = ours.generate(ids[row : row + 1, -length:], max_new_tokens=30, eos_token_id=[])
        assert torch.equal(together[row, -30:], alone[0, -30:])


@pytest.mark.parametrize("options", [{}, {"top_k": 0, "top_p": 0.9}, {"top_k": 0}, {"min_p": 0.02}], ids=str)
def test_a_seed_gives_a_prompt_its_own_text_in_any_batch(options):
    ours, _ = models()
    lengths = (9, 5, 9, 2)
    ids, mask = prompts(lengths)
    options = {"do_sample": True, "seed": 5, "max_new_tokens": 20, "eos_token_id": [], "temperature": 1.4, **options}
    together = ours.generate(ids, attention_mask=mask, num_return_sequences=2, **options)
    for row, length in enumerate(lengths):
        alone = ours.generate(ids[row : row + 1, -length:], num_return_sequences=2, **options)
        assert torch.equal(together[2 * row : 2 * row + 2, -20:], alone[:, -20:])
    order = torch.tensor([3, 1, 0])
    again = ours.generate(ids[order], attention_mask=mask[order], **options)
    assert torch.equal(again[:, -20:], together[::2, -20:][order])
    # A prompt that comes twice is continued twice, as num_return_sequences would.
    twice = ours.generate(ids[[1, 0, 1], -5:], **options)
    assert torch.equal(twice[[0, 2], -20:], together[2:4, -20:])
    assert len({tuple(row) for row in together[:, -20:].tolist()}) == 8


def test_without_a_seed_torchs_generator_decides():
    ours, _ = models()
    ids, _ = prompts((9,))
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(ours.generate(ids, do_sample=True, eos_token_id=[]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_processors_and_criteria_of_the_caller():
    """Those of transformers, in its place: after the options' own, before temperature."""
    ours, theirs = models()
    ids, mask = prompts((9, 5))
    processors = [transformers.SuppressTokensLogitsProcessor([11, 12, 13, 40]), lambda tokens, scores: scores.flip(1)]
    criteria = [lambda tokens, scores: tokens[:, -1] % 5 == 0]
    theirs_criteria = transformers.StoppingCriteriaList([FifthToken()])
    for beams in (1, 3):
        arguments = {"attention_mask": mask, "num_beams": beams, "repetition_penalty": 1.2, "max_new_tokens": 20}
        arguments |= {"pad_token_id": PAD, "logits_processor": processors}
        wanted = theirs.generate(ids, do_sample=False, stopping_criteria=theirs_criteria, **arguments)
        assert wanted.shape[1] < 29 or beams > 1
        assert torch.equal(ours.generate(ids, stopping_criteria=criteria, **arguments), wanted)
        assert torch.equal(ours.generate(ids, stopping_criteria=theirs_criteria, **arguments), wanted)
    seen = []
    ours.generate(
        ids[:1], max_new_tokens=3, do_sample=True, temperature=0.1, return_dict_in_generate=True, output_scores=True,
        stopping_criteria=[lambda tokens, scores: bool(seen.append((tokens.shape, len(scores))))],
    )  # fmt: skip
    assert seen == [((1, 10), 1), ((1, 11), 2), ((1, 12), 3)]


class FifthToken(transformers.StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return input_ids[:, -1] % 5 == 0


def test_end_tokens_and_padding():
    ours, theirs = models()
    ids, mask = prompts()
    free = ours.generate(ids, attention_mask=mask, max_new_tokens=40, eos_token_id=[])[:, 9:]
    ends = [int(free[0, 4]), int(free[2, 11])]  # tokens that will come up, at different times
    for end in (ends[0], ends):
        arguments = {"attention_mask": mask, "max_new_tokens": 40, "eos_token_id": end, "pad_token_id": PAD}
        wanted = theirs.generate(ids, do_sample=False, **arguments)
        assert torch.equal(ours.generate(ids, **arguments), wanted)
    one = ours.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=40, eos_token_id=ends[0])
    assert one.shape == (1, 9 + int((free[0] == ends[0]).int().argmax()) + 1), "stops at the end token"


def test_surplus_tokens_of_a_device_checked_rarely_are_cut_off(monkeypatch):
    from fastformer.generation import decoding

    ours, _ = models()
    ids, mask = prompts()
    free = ours.generate(ids, attention_mask=mask, max_new_tokens=40, eos_token_id=[])[:, 9:]
    arguments = {"attention_mask": mask[:1], "max_new_tokens": 40, "eos_token_id": int(free[0, 4])}
    wanted = ours.generate(ids[:1], **arguments)
    monkeypatch.setattr(decoding, "STEPS_BETWEEN_CHECKS", {})
    assert torch.equal(ours.generate(ids[:1], **arguments), wanted)


def test_padding_is_recognised_without_a_mask():
    ours, theirs = models()
    ids, mask = prompts()
    wanted = theirs.generate(ids, max_new_tokens=10, pad_token_id=PAD, do_sample=False)
    assert torch.equal(ours.generate(ids, max_new_tokens=10, pad_token_id=PAD), wanted)
    assert torch.equal(ours.generate(ids, max_new_tokens=10, pad_token_id=PAD, attention_mask=mask), wanted)


def test_lengths():
    ours, theirs = models()
    ids, _ = prompts((9,))
    assert ours.generate(ids, eos_token_id=[]).shape == (1, 29)  # 20 new tokens, transformers' default
    assert ours.generate(ids, max_length=12, eos_token_id=[]).shape == (1, 12)
    assert torch.equal(ours.generate(ids, max_new_tokens=0), ids)
    assert ours.generate(max_new_tokens=4, eos_token_id=[]).shape == (1, 5)  # from the beginning-of-text token
    assert ours.generate(max_new_tokens=4)[0, 0] == 1
    assert torch.equal(ours.generate(ids, max_new_tokens=55), theirs.generate(ids, max_new_tokens=55, do_sample=False))


def test_several_continuations():
    ours, _ = models()
    ids, mask = prompts((4, 3))
    arguments = {"attention_mask": mask, "do_sample": True, "seed": 1, "max_new_tokens": 20, "eos_token_id": []}
    out = ours.generate(ids, num_return_sequences=3, **arguments)
    assert out.shape == (6, 24)
    assert torch.equal(out[:, :4], ids.repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in out}) == 6


@pytest.mark.parametrize("sampled", [False, True])
def test_scores_and_logits_of_every_step(sampled):
    ours, theirs = models()
    ids, mask = prompts((9, 5))
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": PAD, "eos_token_id": some_end_tokens(50)}
    arguments |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    arguments |= {"repetition_penalty": 1.3, "min_new_tokens": 4, "no_repeat_ngram_size": 2}
    if sampled:  # top_k of 1: only one token can be drawn
        arguments |= {"do_sample": True, "temperature": 0.7, "top_k": 1}
    found = ours.generate(ids, **arguments)
    wanted = theirs.generate(ids, **{"do_sample": False, **arguments})
    assert isinstance(found, GenerateOutput) and torch.equal(found.sequences, wanted.sequences)
    assert found.sequences.shape[1] < 21
    for name in ("scores", "logits"):
        assert len(found[name]) == len(wanted[name]) == found.sequences.shape[1] - 9
        torch.testing.assert_close(torch.stack(found[name]), torch.stack(wanted[name]), rtol=1e-4, atol=1e-4)
    assert found.beam_indices is None and "beam_indices" not in found.keys() and found[0] is found.sequences
    assert not found.sequences.is_inference() and not found.scores[0].is_inference()
    plain = ours.generate(ids, **{**arguments, "return_dict_in_generate": False})
    assert torch.equal(plain, found.sequences), "the flags for more output change nothing without a dictionary"
    assert ours.generate(ids, return_dict_in_generate=True, max_new_tokens=2).scores is None


def test_going_on_from_a_cache():
    ours, theirs = models()
    ids, mask = prompts((9, 5))
    arguments = {"eos_token_id": [], "pad_token_id": PAD}
    first = ours.generate(ids, attention_mask=mask, max_new_tokens=8, return_dict_in_generate=True, **arguments)
    more = torch.cat((first.sequences, torch.full((2, 3), 17)), 1)
    mask = torch.cat((mask, torch.ones(2, 11, dtype=torch.long)), 1)
    wanted = theirs.generate(more, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=PAD,
                             eos_token_id=None)  # fmt: skip
    assert first.past_key_values.get_seq_length() == 16
    calls = []
    handle = ours.transformer.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    given = {"attention_mask": mask, "past_key_values": first.past_key_values, **arguments}
    assert torch.equal(ours.generate(more, max_new_tokens=9, **given), wanted)
    assert calls == [4, *[1] * 8], "the last token of the first call and the new ones"
    handle.remove()
    cache = KVCache(3)
    assert torch.equal(ours.generate(ids, past_key_values=cache, max_new_tokens=2, **arguments)[:, :9], ids)
    assert cache.get_seq_length() == 10
    with pytest.raises(ValueError, match=r"^past_key_values: holds 10 tokens"):
        ours.generate(ids, past_key_values=cache)


def test_several_continuations_compute_their_prompt_once():
    ours, _ = models()
    ids, mask = prompts((9, 5))
    rows = []
    ours.transformer.h[0].register_forward_hook(lambda module, args, out: rows.append(args[0].shape[:2]))
    ours.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=3, max_new_tokens=3, eos_token_id=[])
    assert rows == [(2, 9), (6, 1), (6, 1)]


def test_streamer_receives_what_is_returned():
    class Streamer:
        def __init__(self):
            self.values, self.ended = [], False

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.ended = True

    ours, _ = models()
    ids, _ = prompts((5, 5))
    streamer = Streamer()
    out = ours.generate(ids, max_new_tokens=7, eos_token_id=[], streamer=streamer)
    assert streamer.ended and torch.equal(streamer.values[0], ids)
    assert torch.equal(torch.stack(streamer.values[1:], 1), out[:, 5:])


def test_a_model_in_training_generates_without_dropout_and_stays_in_training():
    ours, _ = models()
    ids, _ = prompts((5,))
    wanted = ours.generate(ids, max_new_tokens=20)
    ours.train()
    ours.transformer.h[0].eval()  # a frozen layer
    assert torch.equal(ours.generate(ids, max_new_tokens=20), wanted)
    assert ours.training and ours.transformer.h[1].training and not ours.transformer.h[0].training
    assert all(p.requires_grad for p in ours.parameters())
    assert not ours.generate(ids, max_new_tokens=2).is_inference()


def test_another_model_can_bring_its_own_decoder():
    """``model.decoder(batch, max_length)`` is used if it returns one; here, the integers from the last token on."""

    class Counting:
        def prefill(self, input_ids, attention_mask=None, repeats=1):
            return torch.nn.functional.one_hot(input_ids[:, -1] + 1, VOCAB).float()

        def step(self, token_ids):
            return torch.nn.functional.one_hot(token_ids + 1, VOCAB).float()

    ours, _ = models()
    asked = []
    ours.decoder = lambda batch, length: asked.append((batch, length)) or Counting()
    out = generate(ours, torch.tensor([[10], [40]]), max_new_tokens=3)
    assert out.tolist() == [[10, 11, 12, 13], [40, 41, 42, 43]] and asked == [(2, 4)]
    ours.decoder = lambda batch, length: None
    assert generate(ours, torch.tensor([[10]]), max_new_tokens=3, eos_token_id=[]).shape == (1, 4)


def test_sample_frequencies():
    """Every filter leaves the tokens it should, in their renormalised proportions."""
    probability = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = probability.log().expand(40000, 5)
    cases = [
        ({}, probability),
        ({"top_k": 3}, torch.tensor([0.4, 0.3, 0.15, 0, 0]) / 0.85),
        ({"top_k": 50}, probability),  # more than there are tokens
        ({"top_p": 0.5}, torch.tensor([0.4, 0.3, 0, 0, 0]) / 0.7),
        ({"top_p": 0.01}, torch.tensor([1.0, 0, 0, 0, 0])),  # always at least one
        ({"top_k": 3, "top_p": 0.8}, torch.tensor([0.4, 0.3, 0, 0, 0]) / 0.7),
        ({"temperature": 0.5}, probability.square() / probability.square().sum()),
    ]
    for arguments, wanted in cases:
        tokens = sample(logits, generator=torch.Generator().manual_seed(0), **arguments)
        found = torch.bincount(tokens, minlength=5) / len(tokens)
        assert (found[wanted == 0] == 0).all(), arguments
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.012, msg=str(arguments))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": 1, "generator": torch.Generator()}, "seed"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"do_sample": False, "num_return_sequences": 2}, "num_return_sequences"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 1.5}, "num_beams"),
        ({"num_beams": 2, "streamer": object()}, "streamer"),
        ({"early_stopping": "always"}, "early_stopping"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"eos_token_id": [-1]}, "eos_token_id"),
        ({"decoder_input_ids": torch.zeros(1, 2, dtype=torch.long)}, "decoder_input_ids"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 60}, "max_new_tokens"),  # 9 + 60 > 64 positions
        ({"max_length": 8, "max_new_tokens": None}, "max_length"),
        ({"attention_mask": torch.ones(1, 8)}, "attention_mask"),
        ({"attention_mask": torch.tensor([[1] * 8 + [0]])}, "attention_mask"),  # padding on the right
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1]])}, "attention_mask"),  # a hole
        ({"attention_mask": torch.zeros(1, 9)}, "attention_mask"),  # nothing but padding
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.tensor([[VOCAB]])}, "input_ids"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    ours, _ = models()
    arguments = {"input_ids": prompts((9,))[0], "do_sample": True, "max_new_tokens": 3, **arguments}
    with pytest.raises(ValueError, match=f"^{name}"):
        ours.generate(**arguments)


def test_sample_says_when_there_is_nothing_to_draw_from():
    for bad in (float("nan"), -torch.inf):
        with pytest.raises(ValueError, match="logits"):
            sample(torch.full((2, 4), bad))
    with pytest.raises(ValueError, match="logits"):
        sample(torch.zeros(4))
    with pytest.raises(TypeError, match="input_ids"):
        models()[0].generate(torch.zeros(1, 3))
    with pytest.raises(TypeError, match="seed"):
        models()[0].generate(do_sample=True, seed="0")


def test_inputs_is_input_ids():
    ours, _ = models()
    ids, _ = prompts((9,))
    assert torch.equal(ours.generate(inputs=ids), ours.generate(ids))
    with pytest.raises(ValueError, match="inputs"):
        ours.generate(ids, inputs=ids)
