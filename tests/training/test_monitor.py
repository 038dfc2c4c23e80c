"""Spikes of the loss, floating-point operations of a token, and the averaged weights, each against its definition."""

import statistics

import pytest
import torch

from fastformer.models import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from fastformer.training import Ema
from fastformer.training.monitor import (
    SpikeDetector,
    flops_per_token,
    name_batch,
    peak_flops,
    peak_memory,
    tokens_in,
)


def test_a_spike_is_a_z_score_over_the_window():
    values = [2.0, 2.1, 1.9, 2.05, 1.95, 2.0, 2.02, 1.98, 2.03, 1.97]
    spikes = SpikeDetector(zscore=4.0, window=8)
    assert not any(spikes.check(value) for value in values)
    recent = values[-8:]
    limit = statistics.fmean(recent) + 4.0 * statistics.stdev(recent)
    message = spikes.check(limit + 1e-6)
    assert (
        f"mean {statistics.fmean(recent):.4f} of the last 8 steps" in message and "4.0 standard deviations" in message
    )
    assert spikes.check(limit + 1e-6)  # it was not taken into the window
    again = SpikeDetector(zscore=4.0, window=8)
    again.load_state_dict(spikes.state_dict())
    assert again.check(limit + 1e-6) and not again.check(limit - 1e-6)
    assert not spikes.check(0.1)  # a loss that falls is none


def test_no_spike_before_there_is_a_mean_and_none_when_off():
    spikes = SpikeDetector(zscore=3.0, window=100)
    assert not any(spikes.check(value) for value in (1.0, 1.0, 50.0))
    off = SpikeDetector(zscore=0.0, window=100)
    assert not any(off.check(1.0) for _ in range(20)) and not off.check(1e9)


def test_flops_are_six_per_parameter_and_attention():
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=3, n_head=2)
    model = GPT2LMHeadModel(config)
    # The token table is the output layer as well; the positions are only looked up.
    count = sum(p.numel() for p in model.parameters()) - 32 * 16
    assert flops_per_token(model, 20) == 6 * count + 12 * 3 * 20 * 16
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape, tie_word_embeddings=False))
    count = sum(p.numel() for p in llama.parameters()) - 50 * 16
    assert flops_per_token(llama, 8) == 6 * count + 12 * 2 * 8 * 16
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    for other in (t5, torch.nn.Linear(2, 2)):
        assert flops_per_token(other, 8) != flops_per_token(other, 8)  # NaN


def test_the_peak_is_measured_and_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    peak_flops.cache_clear()
    rate, source = peak_flops(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert rate > 1e8 and "measured with a matrix product in float32" in source
    assert peak_flops(torch.device("cpu"), torch.float32) == (rate, source)
    assert peak_memory(torch.device("cpu")) > 2**20


def test_tokens_and_names_of_a_batch():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert tokens_in({"input_ids": ids}) == 10
    assert tokens_in({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])}) == 7
    assert name_batch([3, 5]) == "samples 3, 5"
    assert name_batch(list(range(20)), shown=2) == "samples 0, 1 and 18 more"
    assert "does not name" in name_batch([])


def test_the_average_of_weights():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    ema = Ema(model, decay=0.9)
    expected = model.weight.detach().double()
    for step in range(1, 120):
        with torch.no_grad():
            model.weight.normal_()
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    assert set(ema.state_dict()) == {"weight"}
    torch.testing.assert_close(ema.state_dict()["weight"].double(), expected, rtol=1e-5, atol=1e-6)
    weights, average = model.weight.detach().clone(), ema.state_dict()["weight"].clone()
    address = model.weight.data_ptr()
    with ema.applied():
        assert torch.equal(model.weight, average)
    assert torch.equal(model.weight, weights) and model.weight.data_ptr() == address
    assert torch.equal(ema.state_dict()["weight"], average)
    with pytest.raises(ValueError, match=r"ema: saved for other parameters: \['bias'\]"):
        ema.load_state_dict({"weight": average, "bias": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"decay: got 1\.0"):
        Ema(model, 1.0)
