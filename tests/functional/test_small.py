"""The two short ways of small eager calls: one C++ call without a derivative, PyTorch's own function with one.

What either takes has to give what the general way gives, what it refuses has to reach the general way.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as TF

import fastformer
from fastformer import _C
from fastformer import functional as F
from fastformer.backends import registry
from tests.numerics import assert_close_to_fp64

N = 24
PLAIN = ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "softmax", "activation", "cross_entropy"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def torch_up_to(monkeypatch):
    """The registry's limits, which tests/conftest.py has taken away."""
    limits = {
        "layer_norm": 131072,
        "add_layer_norm": 65536,
        "relu": 1 << 20,
        "silu": 65536,
        "cross_entropy": 16384,
        "feed_forward": 16384,
    }
    for name, limit in limits.items():
        monkeypatch.setitem(registry.TORCH_UP_TO, name, limit)


def _w(x):
    return torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype)


def _targets(x):
    return torch.arange(len(x)) % x.shape[1]


CALLS = {
    "layer_norm": lambda f, x: f.layer_norm(x, (N,), _w(x), _w(x)),
    "layer_norm, bare": lambda f, x: f.layer_norm(x, [N]),
    "rms_norm": lambda f, x: f.rms_norm(x, (N,), _w(x)),
    "add_layer_norm": lambda f, x: torch.stack(f.add_layer_norm(x, x.flip(0), (N,), _w(x), _w(x))),
    "add_rms_norm": lambda f, x: torch.stack(f.add_rms_norm(x, x.flip(0), (N,), dropout_p=0.5, training=False)),
    "softmax": lambda f, x: f.softmax(x, -1),
    "log_softmax": lambda f, x: f.log_softmax(x, 1),
    "relu": lambda f, x: f.relu(x),
    "gelu": lambda f, x: f.gelu(x),
    "gelu_tanh": lambda f, x: f.gelu(x, "tanh"),
    "silu": lambda f, x: f.silu(x),
    "cross_entropy": lambda f, x: f.cross_entropy(x, _targets(x), ignore_index=3, label_smoothing=0.1),
    "cross_entropy, sum": lambda f, x: f.cross_entropy(x, _targets(x), reduction="sum"),
}


def _taken(monkeypatch, call):
    """What ``call()`` returns, and the answers of the C++ functions it asked."""
    answers = []
    for op in PLAIN:
        function = getattr(_C, f"{op}_plain")

        def asked(*args, function=function):
            answers.append(function(*args))
            return answers[-1]

        monkeypatch.setattr(_C, f"{op}_plain", asked)
    return call(), answers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_one_call_gives_the_same_bits_as_the_general_way(name, dtype, monkeypatch):
    x = torch.randn(7, N).to(dtype)
    with torch.no_grad():  # a parameter's gradient is not wanted either
        found, answers = _taken(monkeypatch, lambda: CALLS[name](F, x))
        assert answers == [True]
        _C.use_exchange(False)  # without torch's table of functions the short way refuses
        try:
            expected, answers = _taken(monkeypatch, lambda: CALLS[name](F, x))
        finally:
            assert _C.use_exchange(True)
    assert answers == [False]
    assert found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)


def test_large_outputs_come_out_right():
    x = torch.randn(1025, 1024)  # over 4 MiB: on huge pages
    assert_close_to_fp64("softmax", F.softmax(x, -1), TF.softmax(x, -1), TF.softmax(x.double(), -1))


UNUSUAL = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "of rows apart": lambda x: torch.cat((x, x), 1)[:, :N],
    "no rows": lambda x: x[:0],
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
}


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "softmax", "gelu", "cross_entropy"])
@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_tensors_go_the_general_way(kind, name):
    x = torch.randn(7, N)
    unusual = UNUSUAL[kind](x)
    expected = CALLS[name](F, x[:0].clone() if kind == "no rows" else x)
    found = CALLS[name](F, unusual)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, equal_nan=True)


WRONG = {
    "sizes that are not the row's": (lambda x: F.layer_norm(x, (N - 1,)), ValueError, "normalized_shape"),
    "an empty shape": (lambda x: F.layer_norm(x, ()), ValueError, "normalized_shape"),
    "a weight that is short": (lambda x: F.layer_norm(x, (N,), _w(x)[1:]), ValueError, "weight: shape"),
    "a weight of nothing": (lambda x: F.layer_norm(x, (N,), torch.empty(0)), ValueError, "weight: shape"),
    "a weight elsewhere": (lambda x: F.rms_norm(x, (N,), torch.ones(N, device="meta")), ValueError, "weight: is on"),
    "a weight of integers": (lambda x: F.layer_norm(x, (N,), torch.ones(N, dtype=torch.int)), TypeError, "weight"),
    "no tensor": (lambda x: F.layer_norm(x, (N,), "ones"), TypeError, "weight: expected a torch.Tensor"),
    "parameters of two dtypes": (lambda x: F.layer_norm(x, (N,), _w(x), _w(x).bfloat16()), TypeError, "bias: dtype"),
    "a negative eps": (lambda x: F.layer_norm(x, (N,), None, None, -1.0), ValueError, "eps: -1.0"),
    "a residual of fewer rows": (lambda x: F.add_layer_norm(x, x[1:], (N,)), ValueError, "residual: shape"),
    "a residual of another shape": (lambda x: F.add_rms_norm(x, x.view(1, 7, N), (N,)), ValueError, "residual: shape"),
    "a probability of two": (
        lambda x: F.add_layer_norm(x, x, (N,), dropout_p=2.0, training=False),
        ValueError,
        "dropout_p",
    ),
    "integers": (lambda x: F.softmax(x.int(), 1), TypeError, "input: dtype torch.int32"),
    "a dimension too many": (lambda x: F.softmax(x, 2), IndexError, "dim: 2"),
    "integers to gelu": (lambda x: F.gelu(x.long()), TypeError, "input: dtype torch.int64"),
    "a target out of range": (lambda x: F.cross_entropy(x, torch.full((7,), N)), IndexError, "target: row 0"),
    "targets of another type": (lambda x: F.cross_entropy(x, torch.ones(7, dtype=torch.int32)), TypeError, "target"),
    "too few targets": (lambda x: F.cross_entropy(x, torch.ones(6, dtype=torch.long)), ValueError, "target"),
    "smoothing above one": (
        lambda x: F.cross_entropy(x, _targets(x), label_smoothing=1.5),
        ValueError,
        "label_smoothing: 1.5",
    ),
}


@pytest.mark.parametrize("gradient", [False, True], ids=["without gradient", "with gradient"])
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named(kind, gradient, torch_up_to):
    call, error, message = WRONG[kind]
    with pytest.raises(error, match=message):
        call(torch.randn(7, N, requires_grad=gradient))


# ---- with a derivative -----------------------------------------------------------------------------------------------

LEFT_TO_TORCH = ["add_layer_norm", "layer_norm", "layer_norm, bare", "relu", "silu", "cross_entropy"]


def _ours(out):
    """Whether one of our nodes made it."""
    return isinstance(out.grad_fn, torch.autograd.function.BackwardCFunction)


def _add(f, x):
    """add_layer_norm's two results, or torch's."""
    if f is F:
        return F.add_layer_norm(x, x.flip(0), (N,), _w(x), _w(x))
    return TF.layer_norm(x + x.flip(0), (N,), _w(x), _w(x)), x + x.flip(0)


@pytest.mark.parametrize("name", LEFT_TO_TORCH)
def test_a_small_call_with_a_gradient_is_torchs(name, torch_up_to):
    call = CALLS.get(name) if name != "add_layer_norm" else lambda f, x: _add(f, x)[0]
    x = torch.randn(7, N, requires_grad=True)
    out = call(F, x)
    assert out.grad_fn is not None and not _ours(out)
    (grad,) = torch.autograd.grad(out.sin().sum(), x)
    exact_x = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(call(TF, exact_x).sin().sum(), exact_x)
    torch.testing.assert_close(grad.double(), exact, atol=1e-5, rtol=1e-5)
    with fastformer.backend("cpu"):
        ours = call(F, x)
    assert _ours(ours)
    torch.testing.assert_close(ours, out)


def test_the_sum_of_a_small_addition_has_a_gradient_too(torch_up_to):
    x = torch.randn(7, N, requires_grad=True)
    gradients = [torch.autograd.grad(sum(t.sin().sum() for t in _add(f, x)), x)[0] for f in (F, TF)]
    torch.testing.assert_close(*gradients)


def test_a_large_call_with_a_gradient_is_ours(torch_up_to):
    x = torch.randn(129, 1024, requires_grad=True)
    assert _ours(F.layer_norm(x, (1024,))) and not _ours(F.layer_norm(x[:128], (1024,)))


def test_half_precision_losses_are_ours(torch_up_to):
    """torch's bfloat16 cross-entropy rounds the logarithm of every probability."""
    x = torch.randn(7, N).bfloat16().requires_grad_()
    assert _ours(CALLS["cross_entropy"](F, x))


def test_rows_of_nothing_but_minus_infinity(torch_up_to):
    """Zeros, not torch's NaN, at any size, with and without a gradient."""
    x = torch.full((2, N), -torch.inf, requires_grad=True)
    out = F.softmax(x, -1)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert (out == 0).all() and (grad == 0).all()
    assert (F.softmax(x.detach(), -1) == 0).all()


def test_autocast_does_not_change_the_dtype(torch_up_to):
    x = torch.randn(7, N).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        for name in LEFT_TO_TORCH:
            assert CALLS[name](F, x).dtype == torch.bfloat16


def test_explain_says_so(torch_up_to):
    x = torch.randn(7, N)
    assert fastformer.explain("layer_norm", x, (N,)).backend == "cpu"
    found = fastformer.explain("layer_norm", x.requires_grad_(), (N,))
    assert found.backend == "torch" and "168 elements with a gradient" in str(found)
    assert fastformer.explain("activation", x, "relu").backend == "torch"
    assert fastformer.explain("activation", x, "gelu").backend == "cpu"
    with torch.no_grad():
        assert fastformer.explain("layer_norm", x, (N,)).backend == "cpu"
    with fastformer.backend("reference"):
        assert fastformer.explain("layer_norm", x, (N,)).backend == "reference"


def test_compiled_and_transformed_calls_see_operators(torch_up_to):
    x = torch.randn(7, N)

    def loss(x):
        return F.layer_norm(x, (N,)).square().sum() + F.softmax(x, -1)[:, 0].sum() + F.gelu(x).sum()

    exact = torch.autograd.functional.jacobian(loss, x)
    torch.testing.assert_close(torch.func.grad(loss)(x), exact)
    batched = torch.func.vmap(lambda row: F.softmax(row, -1))(x)
    torch.testing.assert_close(batched, F.softmax(x, -1))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gradient", [False, True])
def test_small_feed_forwards(activation, gradient, torch_up_to):
    shapes = ((3, 5, 8), (32, 8), (32,), (6, 32), (6,), (3, 5, 6))
    x, w1, b1, w2, b2, residual = tensors = [torch.randn(s, requires_grad=gradient) for s in shapes]

    def call():
        return F.feed_forward(x, w1, b1, w2, b2, activation, residual=residual)

    small = call()
    with fastformer.backend("cpu"):
        large = call()
    torch.testing.assert_close(small, large)
    assert gradient == small.requires_grad
    if gradient:
        assert "FeedForward" not in type(small.grad_fn).__name__ and "FeedForward" in type(large.grad_fn).__name__
        for ours, other in zip(*(torch.autograd.grad(out.square().sum(), tensors) for out in (small, large))):
            torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="b1: shape"):
        F.feed_forward(x, w1, b1[:1], w2, b2, activation)
