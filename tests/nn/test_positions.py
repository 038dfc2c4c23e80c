"""Rotary, sinusoidal and learned position encodings."""

import copy
import pickle

import pytest
import torch

from fastformer import functional as F
from fastformer import nn

SCALINGS = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, everything": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
        "truncate": False,
    },
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.25,
    },
    "yarn, factor from the lengths": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1 + 0.01 * i for i in range(16)],
        "long_factor": [1 + 0.7 * i for i in range(16)],
        "original_max_position_embeddings": 48,
    },
    "longrope, factor": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 16,
        "long_factor": [3.0] * 16,
        "original_max_position_embeddings": 48,
        "factor": 7.0,
    },
    "longrope, attention factor": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 16,
        "long_factor": [3.0] * 16,
        "attention_factor": 1.5,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.4, "factor": 2.0},
}


def table_of_transformers(scaling, length, dim=32, base=500000.0, trained=64):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    from transformers import LlamaConfig

    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": base}
    config = LlamaConfig(
        hidden_size=2 * dim, num_attention_heads=2, max_position_embeddings=trained, rope_parameters=parameters
    )
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
    return cos[0, :, : dim // 2], sin[0, :, : dim // 2]


@pytest.mark.parametrize("length", [40, 64, 200])  # within, at and beyond the length trained on
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_transformers(name, length):
    module = nn.RotaryEmbedding(32, 500000.0, max_position_embeddings=64, scaling=SCALINGS[name])
    ours = module.tables(length, torch.device("cpu"), torch.bfloat16)
    for mine, theirs in zip(ours, table_of_transformers(SCALINGS[name], length), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine[:length], theirs)
    computed = module.rows(torch.arange(length)[None], torch.float16)
    assert all(torch.equal(mine[0], table[:length]) for mine, table in zip(computed, ours, strict=True))


def test_rotates_by_its_tables_and_extends_them():
    module = nn.RotaryEmbedding(8, max_position_embeddings=4, interleaved=True)
    q, k = torch.randn(2, 3, 5, 12), torch.randn(2, 1, 5, 12)
    for offset in (0, 100, 7):
        cos, sin = nn.RotaryEmbedding(8).tables(200, q.device, q.dtype)
        wanted = F.rotary_embedding(q, k, cos, sin, position_offset=offset, interleaved=True)
        ids = torch.arange(offset, offset + 5)
        torch.testing.assert_close(module(q, k, position_offset=offset), wanted)
        torch.testing.assert_close(module(q, k, position_ids=ids), wanted)
        torch.testing.assert_close(module(q, k, position_offset=torch.tensor([offset, offset])), wanted)
        torch.testing.assert_close(module(q, position_offset=offset)[0], wanted[0])
    assert module(q.bfloat16())[0].dtype == torch.bfloat16
    exact = module(q.double())[0]
    torch.testing.assert_close(exact.float(), module(q)[0])
    assert module.tables(5, q.device, torch.float64)[0].dtype == torch.float64
    x = q.clone()
    assert module(x, inplace=True)[0] is x and torch.equal(x, module(q)[0])


def test_dynamic_scaling_follows_the_length_and_returns():
    module = nn.RotaryEmbedding(16, max_position_embeddings=8, scaling={"type": "dynamic", "factor": 2.0})
    unscaled = nn.RotaryEmbedding(16, max_position_embeddings=8)
    short, long = torch.randn(1, 1, 6, 16), torch.randn(1, 1, 30, 16)
    assert torch.equal(module(short)[0], unscaled(short)[0])
    first = module(long)[0]
    assert not torch.allclose(first, unscaled(long)[0])
    assert torch.equal(module(short)[0], unscaled(short)[0]) and torch.equal(module(long)[0], first)


def test_longrope_chooses_by_the_length_of_each_text():
    module = nn.RotaryEmbedding(32, max_position_embeddings=64, scaling=SCALINGS["longrope"])
    short, long = (module.rows(torch.arange(n), torch.float32)[0] for n in (48, 49))
    assert not torch.allclose(short[40], long[40])
    q = torch.randn(1, 1, 60, 32)
    for length in (48, 60, 48, 60):
        x = q[:, :, :length]
        cos, sin = module.rows(torch.arange(length), torch.float32)
        assert torch.equal(module(x)[0], F.rotary_embedding(x, None, cos, sin)[0])


def test_tables_made_while_generating_serve_training():
    module = nn.RotaryEmbedding(8)
    with torch.inference_mode():
        module(torch.randn(1, 1, 3, 8))
        module.rows(torch.arange(3), torch.float32)
    q = torch.randn(1, 1, 3, 8, requires_grad=True)
    module(q)[0].sum().backward()
    cos, sin = module.rows(torch.arange(3), torch.float32)
    F.rotary_embedding(q, None, cos, sin)[0].sum().backward()
    assert torch.isfinite(q.grad).all()


def test_long_tables_are_made_when_they_are_needed():
    module = nn.RotaryEmbedding(8, max_position_embeddings=131072)
    assert len(module.tables(5, torch.device("cpu"), torch.float32)[0]) == 4096
    assert len(module.tables(5000, torch.device("cpu"), torch.float32)[0]) == 8192


def test_rotary_module_has_no_state_and_can_be_copied():
    module = nn.RotaryEmbedding(8, scaling=SCALINGS["llama3"])
    q = torch.randn(1, 2, 3, 8)
    out = module(q)[0]
    assert len(pickle.dumps(module)) < 3000, "without tables"
    assert not module.state_dict() and not list(module.parameters())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.bfloat16()):
        assert torch.equal(twin(q)[0], out) and repr(twin) == repr(module)


def test_rotary_module_compiles():
    module, q, k = nn.RotaryEmbedding(8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, position_offset=4), module(q, k, position_offset=4))


BAD = {
    "dim: 7 is not a positive even": lambda: nn.RotaryEmbedding(7),
    "max_position_embeddings: 0": lambda: nn.RotaryEmbedding(8, max_position_embeddings=0),
    "rope_type 'ntk' is not one of 'default', 'linear'": lambda: nn.RotaryEmbedding(8, scaling={"rope_type": "ntk"}),
    "'linear' needs factor": lambda: nn.RotaryEmbedding(8, scaling={"rope_type": "linear"}),
    "'linear' has no beta_fast": lambda: nn.RotaryEmbedding(
        8, scaling={"rope_type": "linear", "factor": 2.0, "beta_fast": 1}
    ),
    "'longrope' needs long_factor": lambda: nn.RotaryEmbedding(
        8, scaling={"rope_type": "longrope", "short_factor": [1.0] * 4}
    ),
    "long_factor has 3 numbers for 4 pairs": lambda: nn.RotaryEmbedding(
        8, scaling={"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 3}
    ),
    "length, dim, offset: -1, 4, 0": lambda: F.sinusoidal_positions(-1, 4),
    "base: 0 is not positive": lambda: F.sinusoidal_positions(3, 4, base=0),
    r"x: shape \(3, 5\) is not \(\*, S, 4\)": lambda: nn.SinusoidalPositionalEncoding(4)(torch.zeros(3, 5)),
    "d_model: 0 is not positive": lambda: nn.SinusoidalPositionalEncoding(0),
    "x: expected a torch.Tensor, got int": lambda: nn.LearnedPositionalEncoding(3, 4)(3),
    "position_offset: positions 2 .. 4 of 4": lambda: nn.LearnedPositionalEncoding(4, 2)(torch.zeros(3, 2), 2),
    "position_offset: 2 is given beside": lambda: nn.LearnedPositionalEncoding(4, 2)(
        torch.zeros(3, 2), 2, position_ids=torch.zeros(3, dtype=torch.int64)
    ),
    "num_buckets: 3 and max_distance 128 do not": lambda: nn.RelativePositionBias(3, 128, 2),
    "num_buckets: 32 and max_distance 16 do not": lambda: nn.RelativePositionBias(32, 16, 2, bidirectional=False),
    "num_heads: 0 is not positive": lambda: nn.RelativePositionBias(32, 128, 0),
    "query_length, key_length: 3 and 0": lambda: nn.RelativePositionBias(32, 128, 2)(3, 0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        BAD[message]()


def test_sinusoids_are_the_papers():
    table = F.sinusoidal_positions(50, 6, offset=3)
    for row in range(50):
        for i in range(3):
            angle = torch.tensor((row + 3) / 10000 ** (2 * i / 6), dtype=torch.float64)
            torch.testing.assert_close(table[row, 2 * i], angle.sin().float())
            torch.testing.assert_close(table[row, 2 * i + 1], angle.cos().float())
    assert torch.equal(F.sinusoidal_positions(50, 5, offset=3)[:, :1], F.sinusoidal_positions(53, 5)[3:, :1])
    assert F.sinusoidal_positions(2, 5, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert F.sinusoidal_positions(0, 4).shape == (0, 4)


def test_sinusoidal_encoding():
    module = nn.SinusoidalPositionalEncoding(6, max_len=4)
    x = torch.randn(2, 9, 6)
    torch.testing.assert_close(module(x, 5), x + F.sinusoidal_positions(14, 6)[5:])
    torch.testing.assert_close(module(x[0]), x[0] + F.sinusoidal_positions(9, 6))
    assert module(x.bfloat16()).dtype == torch.bfloat16 and not module.state_dict()
    dropping = nn.SinusoidalPositionalEncoding(6, 0.5)
    assert (dropping(x) == 0).any() and torch.equal(dropping.eval()(x), module(x))


def test_learned_encoding():
    module = nn.LearnedPositionalEncoding(20, 6)
    x = torch.randn(2, 9, 6)
    assert list(module.state_dict()) == ["weight"] and module.weight.std().item() == pytest.approx(0.02, rel=0.3)
    torch.testing.assert_close(module(x, 5), x + module.weight[5:14])
    ids = torch.randint(20, (2, 9))
    torch.testing.assert_close(module(x, position_ids=ids), x + module.weight[ids])
    module(x, position_ids=ids).sum().backward()
    torch.testing.assert_close(module.weight.grad[:, 0], torch.bincount(ids.flatten(), minlength=20).float())
    dropping = nn.LearnedPositionalEncoding(20, 6, 0.5)
    assert (dropping(x) == 0).any() and not (dropping.eval()(x) == 0).any()


@pytest.mark.parametrize("offset", [0, 3, 150])  # 150: every distance beyond the last bucket's
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 5), (40, 300)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_bias_is_that_of_t5(bidirectional, queries, keys, offset):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="transformers is not installed")
    config = t5.T5Config(num_heads=3, relative_attention_num_buckets=16, relative_attention_max_distance=100)
    config.is_decoder = not bidirectional
    theirs = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = nn.RelativePositionBias(16, 100, 3, bidirectional)
    ours.load_state_dict(theirs.relative_attention_bias.state_dict(), strict=True)
    bias = ours(queries, keys, offset)
    wanted = theirs.compute_bias(queries, keys, past_seen_tokens=offset)
    assert torch.equal(bias, wanted)
    upstream = torch.randn(bias.shape)
    bias.backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(ours.weight.grad, theirs.relative_attention_bias.weight.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_bias_inside_the_kernel_is_the_tensor_added(bidirectional):
    module = nn.RelativePositionBias(16, 50, 2, bidirectional)
    torch.nn.init.normal_(module.weight)
    q, k, v = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 60, 8), torch.randn(2, 2, 60, 8)
    gradients = []
    for options in ({"relative_bias": module.relative_bias}, {"bias": module(9, 60, 60 - 9)}):
        out = F.attention(q, k, v, **options)
        gradients.append(torch.autograd.grad(out.sin().sum(), module.weight)[0])
        torch.testing.assert_close(out, F.attention(q, k, v, bias=module(9, 60, 51)))
    torch.testing.assert_close(*gradients)


def test_relative_bias_as_a_module():
    module = nn.RelativePositionBias(32, 128, 4, dtype=torch.bfloat16)
    assert list(module.state_dict()) == ["weight"] and module.weight.shape == (32, 4)
    assert module.weight.float().std().item() == pytest.approx(0.02, rel=0.3)
    assert module(3, 5).dtype == torch.bfloat16
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(3, 5), module(3, 5)) and repr(twin) == repr(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(6, 5), module(6, 5))
    with torch.device("meta"):
        assert nn.RelativePositionBias(32, 128, 4).weight.is_meta
