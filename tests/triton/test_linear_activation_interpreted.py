"""A feed-forward's first matmul with its epilogue, one kernel each way, against the reference and float64."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

import fastformer
from fastformer import functional as F
from fastformer.backends.triton import linear_activation
from fastformer.backends.triton.linear_activation import Tile
from tests.nn.comparison import assert_as_accurate

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [
    (1, 16, 16),  # one row
    (40, 48, 96),  # tails in every direction, several tiles
    (70, 33, 65),  # nothing a multiple of anything
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles each way at the sizes an interpreter can afford; a group of two rows of tiles."""
    tile = Tile(16, 32, 16, 4, 1)
    for table in ("FORWARD_TILES", "BACKWARD_TILES"):
        monkeypatch.setattr(linear_activation, table, {(sm, gated): tile for sm in (80, 90) for gated in (False, True)})
    monkeypatch.setattr(linear_activation, "GROUP_ROWS", 2)


def tensors(dtype, device, rows, width, hidden):
    g = torch.Generator().manual_seed(2)
    shapes = [(rows, width), (hidden, width), (hidden,), (hidden, width), (hidden,), (width, hidden), (width,)]
    return [(torch.randn(s, generator=g) / s[-1] ** 0.5).to(dtype).to(device) for s in shapes]


def gradients(function, leaves):
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    out = function(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    used = torch.autograd.grad(out, leaves, upstream.to(out), allow_unused=True)
    return [out.detach(), *(t for t in used if t is not None)]


def compare(block, leaves, backward_seed=9):
    def on(backend, tensors):
        torch.manual_seed(backward_seed)
        with fastformer.backend(backend), torch.autograd.set_multithreading_enabled(False):
            return gradients(block, tensors)

    exact, same = on("reference", [t.double() for t in leaves]), on("reference", leaves)
    ours = on("triton", leaves)
    for i, results in enumerate(zip(ours, same, exact, strict=True)):
        assert_as_accurate(f"result {i}", *results)
    return ours, on("triton", leaves)


# Shapes with activations, and dtypes with both, by twos: an interpreted kernel takes seconds.
@pytest.mark.parametrize(
    "shape, activation, dropout_p, name",
    [
        (SHAPES[0], "gelu", 0.0, "bf16"),
        (SHAPES[0], "relu", 0.3, "fp16"),
        (SHAPES[0], "gelu_tanh", 0.3, "bf16"),
        (SHAPES[1], "gelu", 0.0, "fp16"),
        (SHAPES[1], "relu", 0.3, "bf16"),
        (SHAPES[1], "gelu_tanh", 0.3, "fp16"),
        (SHAPES[2], "gelu", 0.0, "bf16"),
        (SHAPES[2], "relu", 0.3, "fp16"),
        (SHAPES[2], "gelu_tanh", 0.3, "fp16"),
        (SHAPES[2], "gelu_tanh", 0.0, "bf16"),
    ],
)
def test_feed_forward(shape, activation, dropout_p, name, device):
    dtype = HALVES[name]
    x, w1, b1, _, _, w2, b2 = tensors(dtype, device, *shape)
    first, second = compare(lambda *t: F.feed_forward(*t, activation, dropout_p=dropout_p), [x, w1, b1, w2, b2])
    assert all(torch.equal(a, b) for a, b in zip(first, second)), "repeats bit for bit"
    compare(lambda x, w1, w2: F.feed_forward(x, w1, None, w2, None, activation, recompute=True), [x, w1, w2])


@pytest.mark.parametrize(
    "shape, dropout_p, name",
    [
        (SHAPES[0], 0.0, "fp16"),
        (SHAPES[0], 0.3, "bf16"),
        (SHAPES[1], 0.0, "bf16"),
        (SHAPES[1], 0.3, "fp16"),
        (SHAPES[2], 0.0, "fp16"),
        (SHAPES[2], 0.3, "bf16"),
    ],
)
def test_gated_feed_forward(shape, dropout_p, name, device):
    dtype = HALVES[name]

    def block(x, w_gate, b_gate, w_up, b_up, w_down, b_down):
        biases = {"b_gate": b_gate, "b_up": b_up, "b_down": b_down}
        return F.gated_feed_forward(x, w_gate, w_up, w_down, dropout_p=dropout_p, residual=x, **biases)

    leaves = tensors(dtype, device, *shape)
    compare(block, leaves)
    plain = [leaves[i] for i in (0, 1, 3, 5)]
    compare(lambda *t: F.gated_feed_forward(*t, "gelu", dropout_p=dropout_p), plain)


def test_transposed_weights_and_no_gradients(device):
    """GPT-2 passes views of (in, out) weights."""
    x, w1, b1, _, _, w2, b2 = tensors(torch.bfloat16, device, 40, 48, 96)
    w1, w2 = (w.t().contiguous().t() for w in (w1, w2))
    with fastformer.backend("triton"):
        ours = F.feed_forward(x, w1, b1, w2, b2)
    with fastformer.backend("reference"):
        same = F.feed_forward(x, w1, b1, w2, b2)
        exact = F.feed_forward(*(t.double() for t in (x, w1, b1, w2, b2)))
    assert_as_accurate("out", ours, same, exact)


def test_the_joined_weights_of_a_module(device):
    from fastformer import nn

    module = nn.GatedFeedForward(32, 48, device=device, dtype=torch.bfloat16)
    x = torch.randn(20, 32).to(device, torch.bfloat16)
    results = []
    for backend in ("triton", "reference"):
        with fastformer.backend(backend), torch.autograd.set_multithreading_enabled(False):
            module.zero_grad()
            out = module(x)
            out.float().square().sum().backward()
            results.append([out.detach(), *(p.grad.clone() for p in module.parameters())])
    for ours, same in zip(*results, strict=True):
        torch.testing.assert_close(ours, same, rtol=0.05, atol=0.02)
