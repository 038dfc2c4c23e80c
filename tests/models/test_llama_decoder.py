"""Llama's own decoder beside its forward: the same logits token by token, and where it has to stay away."""

import pytest
import torch

from fastformer.generation.decoder import CachedDecoder, decoder_for
from fastformer.models.llama_decoder import FusedDecoder
from tests.models.llama_pairs import CONFIGS, ids, ours_of, theirs_of
from tests.models.test_llama import Adapter

PROMPT, STEPS = 9, 12
USED = ("grouped heads", "one key head, untied", "wide heads", "odd sizes", "biases", "gelu", "relu", "padding token")
SCALED = ("dynamic", "yarn", "llama3", "longrope, long", "longrope, short", "proportional")


def model_of(dtype=torch.float32, **changes):
    return ours_of(theirs_of(dtype, **changes))


def own_decoder(model, length=PROMPT + STEPS):
    with torch.inference_mode():
        return model.decoder(3, length)


def logits_of(decoder, mask=None, repeats=1, order=None):
    """Of the prompt and of each step; halfway the sequences change places."""
    with torch.inference_mode():
        found = [decoder.prefill(ids(3, PROMPT), mask, repeats)]
        for i, tokens in enumerate(ids(3 * repeats, STEPS).unbind(1)):
            if order is not None and i == STEPS // 2:
                decoder.reorder(order)
            found.append(decoder.step(tokens if order is None or i < STEPS // 2 else tokens[: len(order)]))
    return found


def assert_same(model, tolerance, **options):
    fused = own_decoder(model)
    assert isinstance(fused, FusedDecoder)
    mine, wanted = (logits_of(d, **options) for d in (fused, CachedDecoder(model, PROMPT + STEPS)))
    for step, (a, b) in enumerate(zip(mine, wanted, strict=True)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, step=step: f"step {step}: {m}")


def left_padding():
    mask = torch.ones(3, PROMPT, dtype=torch.long)
    mask[1, :4] = 0
    return mask


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", USED + SCALED)
def test_the_same_logits(name, padded):
    assert_same(model_of(torch.float64, **CONFIGS[name]), 1e-11, mask=left_padding() if padded else None)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_dtypes(dtype, tolerance):
    assert_same(model_of(dtype), tolerance, mask=left_padding())


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_repeated_and_reordered(padded):
    mask = left_padding() if padded else None
    order = torch.tensor([1, 1, 3, 2, 5, 4])  # within each prompt's two continuations
    assert_same(model_of(torch.float64), 1e-11, mask=mask, repeats=2, order=order)


def test_fewer_sequences():
    assert_same(model_of(torch.float64), 1e-11, order=torch.tensor([2, 0]))


def test_the_cache_it_leaves_continues_in_forward():
    model = model_of(torch.float64)
    decoder = own_decoder(model)
    tokens = ids(3, PROMPT + STEPS)
    with torch.inference_mode():
        decoder.prefill(tokens[:, :PROMPT])
        for column in range(PROMPT, PROMPT + 5):
            decoder.step(tokens[:, column])
        rest = model(tokens[:, PROMPT + 5 :], past_key_values=decoder.past_key_values).logits
        torch.testing.assert_close(rest, model(tokens).logits[:, PROMPT + 5 :], rtol=0, atol=1e-11)


def test_a_full_cache_and_a_wrong_token_are_named():
    decoder = own_decoder(model_of(), PROMPT + 1)
    with torch.inference_mode():
        decoder.prefill(ids(3, PROMPT))
        with pytest.raises((ValueError, IndexError), match="97"):
            decoder.step(torch.full((3,), 97))
        decoder.step(ids(3, 1)[:, 0])
        with pytest.raises(ValueError, match="token_ids: 11 positions do not fit into a cache of 10"):
            decoder.step(ids(3, 1)[:, 0])


def hooked(model):
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: None)


def hooked_norm(model):
    model.model.norm.register_forward_pre_hook(lambda *_: None)


def replaced(model):
    model.model.layers[1].mlp.up_proj = Adapter(model.model.layers[1].mlp.up_proj)


def subclassed(model):
    model.lm_head.__class__ = type("Other", (type(model.lm_head),), {})


def apart(model):
    layer = model.model.layers[0].self_attn
    layer.k_proj.weight = torch.nn.Parameter(layer.k_proj.weight.detach().clone())


def mixed(model):
    model.model.norm.double()


@pytest.mark.parametrize("change", [hooked, hooked_norm, replaced, subclassed, apart, mixed])
def test_it_stays_away_where_modules_have_to_be_called(change):
    model = model_of()
    change(model)
    assert own_decoder(model) is None
    with torch.inference_mode():
        assert isinstance(decoder_for(model, 3, 20), CachedDecoder)


def test_it_stays_away_from_other_kinds_of_calls():
    import fastformer

    model = model_of()
    assert model.decoder(3, 20) is None, "gradients are recorded"
    with torch.autocast("cpu", torch.bfloat16):
        assert own_decoder(model) is None
    with fastformer.backend("reference"):
        assert own_decoder(model) is None


def test_generation_goes_beyond_the_length_trained_on():
    """Positions are rotary: max_position_embeddings limits nothing, as in transformers."""
    theirs = theirs_of(**CONFIGS["dynamic"], eos_token_id=None, pad_token_id=0)
    prompt = ids(2, 6).clamp(min=1)
    found = ours_of(theirs).generate(prompt, max_new_tokens=15)
    wanted = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=15, do_sample=False)
    assert found.tolist() == wanted.tolist()
