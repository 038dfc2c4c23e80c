"""T5 in float16: trained ones have activations beyond its largest number, 65504, and must give numbers all the same."""

import copy

import pytest
import torch
import transformers

from fastformer.models import T5ForConditionalGeneration
from tests.models.t5_pairs import CONFIGS, inputs, ours_of, theirs_of

LARGEST, SMALLEST = torch.finfo(torch.float16).max, 2.0**-24
LOSS_SCALE = 1024.0  # as one trains in float16: most gradients of a mean loss are below its normal numbers

# name -> (part of a parameter's name, factor): what is too large in the model's first blocks
OVERFLOWS = {
    "the feed-forward's output": [("0.layer.1.DenseReluDense.wo", 3e4), ("0.layer.2.DenseReluDense.wo", 3e4)],
    "its hidden activations": [("wi_0", 300.0), ("wi_1", 600.0), ("wo", 3.0)],
    "attention's output": [("0.SelfAttention.o", 5e4), ("EncDecAttention.o", 5e4)],
    "the sum of many": [("wo", 3e4), ("SelfAttention.o", 3e4)],
}


def overflowing(name, config="1.1"):
    """transformers' T5 in float64: its weights are float16 numbers, its residual stream or activations go beyond."""
    theirs = theirs_of(**CONFIGS[config])
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            for part, factor in OVERFLOWS[name]:
                if part in key:
                    p.mul_(factor)
    theirs = theirs.half().double()
    seen = []
    for module in theirs.modules():  # what enters a norm or wo is kept by no output
        if type(module).__name__ in ("ExactNorm", "Linear"):
            module.register_forward_hook(lambda m, args, out: seen.append(max(args[0].abs().max(), out.abs().max())))
    theirs(**inputs())
    assert max(seen) > 2 * LARGEST
    for module in theirs.modules():
        module._forward_hooks.clear()
    return theirs


def run(model):
    model.zero_grad()
    output = model(**inputs())
    (output.loss * LOSS_SCALE).backward()
    found = {"logits": output.logits, "loss": output.loss}
    found |= {name: p.grad for name, p in model.named_parameters()}
    return {name: value.detach().double() for name, value in found.items()}


def assert_near(found, wanted, relative=6e-2):
    for name, value in wanted.items():
        assert torch.isfinite(found[name]).all(), f"{name} is not finite"
        error, scale = (found[name] - value).norm().item(), value.norm().item()
        tiny = 2 * SMALLEST * value.numel() ** 0.5  # float16 has no digits of the smallest gradients
        assert error <= relative * scale + tiny, f"{name}: error {error:.3g} of {scale:.3g}"


@pytest.mark.parametrize(
    ("name", "config"),
    [(name, "1.1") for name in OVERFLOWS] + [(name, "1.0") for name in OVERFLOWS if "hid" not in name],
)
def test_half_gives_the_numbers_of_float64(name, config):
    theirs = overflowing(name, config)
    wanted = run(theirs)
    assert_near(run(ours_of(theirs).half()), wanted)


@pytest.mark.parametrize("name", OVERFLOWS)
def test_a_loaded_model_keeps_wo_in_float32(tmp_path, name):
    theirs = overflowing(name)
    wanted = run(theirs)
    theirs.float().save_pretrained(tmp_path)
    ours = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    peers = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    mine, dtypes = ({k: p.dtype for k, p in model.state_dict().items()} for model in (ours, peers))
    assert mine == dtypes
    assert {k for k, dtype in mine.items() if dtype == torch.float32} == {k for k in mine if k.endswith("wo.weight")}
    assert_near(run(ours), wanted)


@pytest.mark.parametrize("name", OVERFLOWS)
def test_replaced_layers_of_such_a_model_saturate(name):
    """What a layer computes by itself in float16 is at most the largest number, never NaN."""
    ours = ours_of(overflowing(name)).half()
    for module in ours.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, args, out: out)
    found = run(ours)
    assert torch.isfinite(found["loss"]) and torch.isfinite(found["logits"]).all()


def test_generation_and_hidden_states_are_finite():
    ours = ours_of(overflowing("the feed-forward's output")).half()
    with torch.no_grad():
        given = {k: v for k, v in inputs().items() if k != "labels"}
        first = ours(**given, decoder_input_ids=torch.zeros(3, 1, dtype=torch.long), output_hidden_states=True)
        second = ours(
            **given, decoder_input_ids=first.logits.argmax(-1), past_key_values=first.past_key_values, use_cache=True
        )
    states = (*first.encoder_hidden_states, *first.decoder_hidden_states, second.logits)
    assert all(torch.isfinite(state).all() for state in states)
    assert max(state.abs().max() for state in states) > LARGEST and second.logits.dtype == torch.float16


def test_training_converges_like_in_float32():
    """A few steps of gradient descent, in float16 with the loss scaled, follow those in float32."""
    losses = []
    for dtype in (torch.float32, torch.float16):
        ours = ours_of(theirs_of(seed=5, **CONFIGS["1.0"])).to(dtype).train()
        found = []
        for _ in range(8):
            ours.zero_grad()
            loss = ours(**inputs()).loss
            (loss * LOSS_SCALE).backward()
            with torch.no_grad():
                for p in ours.parameters():
                    p -= 0.02 / LOSS_SCALE * p.grad
            found.append(loss.item())
        losses.append(found)
    assert losses[0][-1] < 0.8 * losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=0.03, atol=0)


def test_a_copy_in_float16_is_the_same_model():
    ours = ours_of(theirs_of()).half()
    assert torch.equal(copy.deepcopy(ours)(**inputs()).logits, ours(**inputs()).logits)
