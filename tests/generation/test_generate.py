"""Generation: token for token what transformers generates, with the cache and without, padded and alone."""

import pytest
import torch

from fastformer.generation import generate, sample
from tests.generation.pairs import PAD, VOCAB, models, prompts


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


def test_each_padded_prompt_gives_its_own_text():
    ours, _ = models()
    lengths = (9, 5, 9, 2)
    ids, mask = prompts(lengths)
    together = ours.generate(ids, attention_mask=mask, max_new_tokens=30, eos_token_id=[])
    for row, length in enumerate(lengths):
        alone = ours.generate(ids[row : row + 1, -length:], max_new_tokens=30, eos_token_id=[])
        assert torch.equal(together[row, -30:], alone[0, -30:])


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
