"""Values at the edges of the format: where an exponential overflows, a tail underflows, or everything is masked."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as TF

import fastformer
from fastformer import functional as F
from tests.numerics import assert_close_to_fp64

BACKENDS = ["cpu", "reference"]
HALVES = [torch.bfloat16, torch.float16]
INF = float("inf")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastformer.backend(request.param):
        yield request.param


def test_gelu_keeps_its_left_tail():
    """0.5 x (1 + erf) has lost every digit at -6, the kernel none: relative error, not error."""
    x = -torch.arange(0.0, 12.9, 0.01)
    exact = x.double() * 0.5 * torch.erfc(-x.double() * math.sqrt(0.5))
    relative = ((F.gelu(x).double() - exact) / exact)[1:].abs()
    assert relative.max() < 2e-5 and relative[:400].max() < 2e-6
    u = math.sqrt(2 / math.pi) * (x.double() + 0.044715 * x.double() ** 3)
    exact = x.double() * torch.sigmoid(2 * u)
    kept = exact.abs() > 2e-37  # beyond, the exponential is flushed to zero
    relative = ((F.gelu(x, "tanh").double() - exact) / exact)[kept][1:].abs()
    assert relative.max() < 2e-5


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_huge_numbers(approximate, backend):
    largest = 3e38 if backend == "cpu" else 1e38  # torch's own doubles it where it runs AVX-512
    x = torch.tensor([-largest, -1e20, -1e4, -20.0, 20.0, 1e4, 1e20, largest], requires_grad=True)
    out = F.gelu(x, approximate)
    (grad,) = torch.autograd.grad(out.sum(), x)
    if backend == "cpu":  # torch's own multiplies 0 by an overflowed square
        assert torch.equal(grad, torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]))
    assert torch.equal(out[4:], x[4:]) and (out[:4] == 0).all()


def test_softmax_of_large_offsets(backend):
    x = torch.randn(5, 300)
    for offset in (-1e4, 1e4, 3e7):
        shifted = x + offset
        exact = TF.softmax(shifted.double(), 1)
        assert_close_to_fp64("softmax", F.softmax(shifted, 1), TF.softmax(shifted, 1), exact)
        exact, same = TF.log_softmax(shifted.double(), 1), TF.log_softmax(shifted, 1)
        assert_close_to_fp64("log_softmax", F.log_softmax(shifted, 1), same, exact)


def test_cross_entropy_of_large_offsets(backend):
    """The loss is a difference of logits: an offset they share costs it no digits (lse - z would lose them)."""
    logits, target = torch.randn(6, 500) * 3 + 1e4, torch.arange(6) * 83
    for smoothing in (0.0, 0.3):
        ours, same, exact = (
            f(x, target, reduction="none", label_smoothing=smoothing)
            for f, x in ((F.cross_entropy, logits), (TF.cross_entropy, logits), (TF.cross_entropy, logits.double()))
        )
        # the reference subtracts a rounded logsumexp: half a unit in the last place of 1e4
        assert_close_to_fp64("loss", ours, same, exact, scale=0.0 if backend == "cpu" else 1e4)


def test_cross_entropy_with_excluded_classes(backend):
    """Logits of -inf take no probability: the loss of the others is what it is without those classes."""
    logits = torch.randn(4, 90)
    logits[:, 50:] = -INF
    logits.requires_grad_()
    target = torch.tensor([0, 49, 3, 7])
    loss = F.cross_entropy(logits, target)
    torch.testing.assert_close(loss, TF.cross_entropy(logits[:, :50], target))
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad[:, 50:] == 0).all() and grad.isfinite().all()
    assert F.cross_entropy(logits.detach(), torch.tensor([0, 60, 3, 7]), reduction="none")[1] == INF


def test_cross_entropy_over_no_counted_target(backend):
    logits = torch.randn(3, 4, requires_grad=True)
    target = torch.full((3,), -100)
    assert F.cross_entropy(logits, target).isnan()  # torch's answer too: 0 / 0
    for reduction in ("sum", "none"):
        loss = F.cross_entropy(logits, target, reduction=reduction)
        assert (loss == 0).all()
        assert (torch.autograd.grad(loss.sum(), logits)[0] == 0).all()
    # an ignored row's logits do not matter, whatever they are
    logits = torch.tensor([[float("nan"), 1.0], [2.0, 1.0]], requires_grad=True)
    loss = F.cross_entropy(logits, torch.tensor([-100, 0]), reduction="sum")
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and (grad[0] == 0).all()


def test_fully_masked_rows_of_the_logarithm(backend):
    x = torch.full((2, 33), -INF)
    x[1, 4] = 1.0
    x.requires_grad_()
    out = F.log_softmax(x, -1)
    (grad,) = torch.autograd.grad(out[:, 4].nan_to_num(neginf=0.0).sum() + out[0].exp().sum(), x)
    assert (out[0] == -INF).all() and out[1, 4] == 0 and not grad.isnan().any() and (grad[0] == 0).all()


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
def test_half_precision_overflow_becomes_infinity(dtype, backend):
    top = torch.finfo(dtype).max
    kind = "gelu" if backend == "cpu" else "relu"  # torch's own gelu of infinity may be NaN
    x, bias = torch.tensor([[top, 1.0]]).to(dtype), torch.tensor([top, 1.0]).to(dtype)
    assert F.bias_activation(x, bias, kind)[0, 0] == INF
    summed = F.add_layer_norm(torch.full((1, 8), top, dtype=dtype), torch.full((1, 8), top, dtype=dtype), (8,))[1]
    assert (summed == INF).all()


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
def test_half_precision_rounds_to_nearest_even(dtype):
    """x + 0 through add_layer_norm: every bit pattern comes back, halfway sums go to the even neighbour."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)[None]
    out = F.add_layer_norm(x, torch.zeros_like(x), (x.shape[1],))[1]
    assert torch.equal(out.nan_to_num(nan=1.5, posinf=INF, neginf=-INF), x.nan_to_num(nan=1.5, posinf=INF, neginf=-INF))
    a = torch.randn(1, 4099).to(dtype)
    b = (torch.randn(1, 4099) * 0.01).to(dtype)
    summed = F.add_layer_norm(a, b, (4099,))[1]
    assert torch.equal(summed, (a.float() + b.float()).to(dtype))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 300), st.floats(0.1, 30), st.integers(0, 2**31), st.sampled_from(BACKENDS))
def test_softmax_rows_are_distributions(rows, cols, spread, seed, backend):
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * spread
    with fastformer.backend(backend):
        p, log_p = F.softmax(x, -1), F.log_softmax(x, -1)
    assert (p >= 0).all() and (p <= 1).all()
    torch.testing.assert_close(p.double().sum(1), torch.ones(rows, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_p.exp(), p, rtol=1e-5, atol=1e-7)
    assert torch.equal(p.argmax(1), x.argmax(1)) or spread < 0.2  # the order is kept (ties aside)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(2, 200), st.floats(0, 1), st.booleans(), st.integers(0, 2**31))
def test_cross_entropy_gradient_rows_sum_to_zero(rows, cols, smoothing, weighted, seed):
    """Softmax does not see a constant added to a row, so neither does the loss."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, cols, generator=g).requires_grad_()
    target = torch.randint(0, cols, (rows,), generator=g)
    weight = torch.rand(cols, generator=g) + 0.1 if weighted else None
    loss = F.cross_entropy(logits, target, weight, reduction="sum", label_smoothing=smoothing)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss >= 0
    assert grad.double().sum(1).abs().max() < 2e-6 * cols**0.5


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 300), st.floats(0.1, 20), st.sampled_from(["none", "tanh"]), st.integers(0, 2**31)
)
def test_gelu_is_x_minus_its_mirror_image(rows, cols, spread, approximate, seed):
    """gelu(x) - gelu(-x) = x, and the bias gradient is the column sum of the input gradient."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, cols, generator=g) * spread).requires_grad_()
    bias = torch.zeros(cols, requires_grad=True)
    torch.testing.assert_close(F.gelu(x, approximate) - F.gelu(-x, approximate), x)
    dx, dbias = torch.autograd.grad(
        F.bias_activation(x, bias, "gelu_tanh" if approximate == "tanh" else "gelu").sum(), (x, bias)
    )
    torch.testing.assert_close(dx.sum(0), dbias)
