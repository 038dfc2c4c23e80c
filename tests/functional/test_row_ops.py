"""The operations on rows (norms, softmax, activations, cross-entropy): values and gradients against float64, on each
backend.

torch in the same dtype gives the allowance: an error up to twice its own, plus a few roundings (tests/nn/comparison).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as TF

import fastformer
from fastformer import functional as F
from fastformer.backends import registry
from tests.nn.comparison import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = ["cpu", "reference"]

# (rows, cols)
SHAPES = [
    (1, 1),  # nothing to vectorise
    (0, 8),  # no rows: gradients of parameters are zeros
    (3, 7),  # shorter than any vector
    (5, 64),  # whole vectors, a row count that is no multiple of the backward's two
    (9, 257),  # a tail of one
    (130, 1024),  # enough for two threads
    (2, 5000),  # more than one chunk of partial sums
    (1, 2**18),  # one very long row
]


@dataclass(frozen=True)
class Op:
    """An operation, torch's own beside it, and the shapes of its parameters for a row of n."""

    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    parameters: Callable[[int], list[tuple[int, ...]]] = lambda n: []
    spread: float = 1.0


EPS = 1e-5


def _target(x: Tensor) -> Tensor:
    target = (torch.arange(x.shape[0]) * 7919) % x.shape[1]
    target[1::5] = -100
    return target


OPS = {
    "layer_norm": Op(
        lambda x, w, b: F.layer_norm(x, x.shape[1:], w, b),
        lambda x, w, b: TF.layer_norm(x, x.shape[1:], w, b),
        lambda n: [(n,), (n,)],
    ),
    "layer_norm, weight only": Op(
        lambda x, w: F.layer_norm(x, x.shape[1:], w), lambda x, w: TF.layer_norm(x, x.shape[1:], w), lambda n: [(n,)]
    ),
    "layer_norm, plain": Op(lambda x: F.layer_norm(x, x.shape[1:]), lambda x: TF.layer_norm(x, x.shape[1:])),
    "add_layer_norm": Op(
        lambda x, w, b: _both(F.add_layer_norm(x, x.flip(0), x.shape[1:], w, b)),
        lambda x, w, b: _both((TF.layer_norm(x + x.flip(0), x.shape[1:], w, b), x + x.flip(0))),
        lambda n: [(n,), (n,)],
    ),
    "rms_norm": Op(
        lambda x, w: F.rms_norm(x, x.shape[1:], w, EPS),
        lambda x, w: TF.rms_norm(x, x.shape[1:], w, EPS),
        lambda n: [(n,)],
    ),
    "rms_norm, weight and bias": Op(
        lambda x, w, b: F.rms_norm(x, x.shape[1:], w, EPS, bias=b),
        lambda x, w, b: _biased_rms_norm(x, w, b),
        lambda n: [(n,), (n,)],
    ),
    "rms_norm, plain": Op(
        lambda x: F.rms_norm(x, x.shape[1:], eps=EPS), lambda x: TF.rms_norm(x, x.shape[1:], eps=EPS)
    ),
    "add_rms_norm": Op(
        lambda x, w, b: _both(F.add_rms_norm(x, x.flip(0), x.shape[1:], w, EPS, bias=b)),
        lambda x, w, b: _both((_biased_rms_norm(x + x.flip(0), w, b), x + x.flip(0))),
        lambda n: [(n,), (n,)],
    ),
    "softmax": Op(lambda x: F.softmax(x, -1), lambda x: TF.softmax(x, -1), spread=4.0),
    "log_softmax": Op(lambda x: F.log_softmax(x, -1), lambda x: TF.log_softmax(x, -1), spread=4.0),
    "softmax over columns": Op(lambda x: F.softmax(x, 0), lambda x: TF.softmax(x, 0)),
    "gelu": Op(F.gelu, TF.gelu, spread=4.0),
    "gelu tanh": Op(lambda x: F.gelu(x, "tanh"), lambda x: TF.gelu(x, approximate="tanh"), spread=4.0),
    "silu": Op(F.silu, TF.silu, spread=4.0),
    "relu": Op(F.relu, TF.relu),
    "bias_activation": Op(
        lambda x, b: F.bias_activation(x, b, "gelu_tanh"),
        lambda x, b: TF.gelu(x + b, approximate="tanh"),
        lambda n: [(n,)],
    ),
    "gated_activation": Op(
        lambda x, b, c: F.gated_activation(x, x.flip(0), "silu", gate_bias=b, up_bias=c),
        lambda x, b, c: TF.silu(x + b) * (x.flip(0) + c),
        lambda n: [(n,), (n,)],
        spread=2.0,
    ),
    "cross_entropy, sum": Op(
        lambda x: F.cross_entropy(x, _target(x), reduction="sum"),
        lambda x: TF.cross_entropy(x, _target(x), reduction="sum"),
    ),
    "cross_entropy, none, weights, smoothing": Op(
        lambda x, w: F.cross_entropy(x, _target(x), w.detach().abs(), reduction="none", label_smoothing=0.1) + 0 * w[0],
        lambda x, w: (
            TF.cross_entropy(x, _target(x), w.detach().abs(), reduction="none", label_smoothing=0.1) + 0 * w[0]
        ),
        lambda n: [(n,)],
    ),
}


def _biased_rms_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return TF.rms_norm(x, x.shape[1:], w, EPS) + b


def _both(outputs: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat(outputs)


def run(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_output_and_gradients(name, shape, dtype, backend):
    op = OPS[name]
    if shape[0] == 0 and "cross_entropy" in name and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("torch has no half-precision cross-entropy of nothing to compare with")
    g = torch.Generator().manual_seed(3)
    tensors = [(torch.randn(shape, generator=g) * op.spread).to(dtype)]
    tensors += [torch.randn(s, generator=g).to(dtype) for s in op.parameters(shape[1])]
    wanted = run(op.torchs, [t.double() for t in tensors])
    same = run(op.torchs, tensors)
    with fastformer.backend(backend):
        ours = run(op.ours, tensors)
    for i, (o, s, w) in enumerate(zip(ours, same, wanted, strict=True)):
        assert_as_accurate(f"{name} {i}", o, s, w)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_multidimensional_input(backend):
    x = torch.randn(6, 4, 10)[:, ::2].transpose(0, 1)[..., :9]  # (2, 6, 9), nothing contiguous
    w, b = torch.randn(6, 9), torch.randn(6, 9)
    with fastformer.backend(backend):
        torch.testing.assert_close(F.layer_norm(x, (6, 9), w, b), TF.layer_norm(x, (6, 9), w, b))
        torch.testing.assert_close(F.layer_norm(x, (9,)), TF.layer_norm(x, (9,)))
        torch.testing.assert_close(F.rms_norm(x, (6, 9), w), TF.rms_norm(x, (6, 9), w))
        torch.testing.assert_close(F.rms_norm(x, (9,)), TF.rms_norm(x, (9,)))
        for dim in (0, 1, 2, -1):
            torch.testing.assert_close(F.softmax(x, dim), TF.softmax(x, dim))
        torch.testing.assert_close(F.gelu(x), TF.gelu(x))
        torch.testing.assert_close(F.gelu(torch.tensor(0.5)), TF.gelu(torch.tensor(0.5)))
        torch.testing.assert_close(F.gated_activation(x, x[:, :, :9]), TF.silu(x) * x)
        logits, target = torch.randn(3, 7, 2, 2), torch.randint(0, 7, (3, 2, 2))
        torch.testing.assert_close(F.cross_entropy(logits, target), TF.cross_entropy(logits, target))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_minus_infinity_give_zeros(backend):
    x = torch.randn(3, 40)
    x[1] = float("-inf")
    x[2, :39] = float("-inf")
    x.requires_grad_()
    with fastformer.backend(backend):
        out = F.softmax(x, -1)
        (grad,) = torch.autograd.grad(out, x, torch.randn(3, 40))
    assert (out[1] == 0).all() and (grad[1] == 0).all() and out[2, 39] == 1 and not grad.isnan().any()


ADD_NORMS = {"add_layer_norm": TF.layer_norm, "add_rms_norm": TF.rms_norm}


@pytest.mark.parametrize("name", ADD_NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_the_same_forward_and_backward_and_follows_the_seed(backend, name):
    x, residual, add_norm = torch.randn(64, 200, requires_grad=True), torch.zeros(64, 200), getattr(F, name)
    with fastformer.backend(backend):
        torch.manual_seed(11)
        out, summed = add_norm(x, residual, (200,), dropout_p=0.25)
        torch.manual_seed(11)
        again = add_norm(x, residual, (200,), dropout_p=0.25)[1]
        other = add_norm(x, residual, (200,), dropout_p=0.25)[1]
        (grad,) = torch.autograd.grad(summed.sum(), x)
        off = add_norm(x, residual, (200,), dropout_p=0.25, training=False)[1]
        none = add_norm(x, residual, (200,), dropout_p=1.0)[1]
    kept = summed != 0
    assert torch.equal(summed, again) and not torch.equal(summed, other)
    torch.testing.assert_close(summed[kept], (x / 0.75)[kept])
    torch.testing.assert_close(grad, kept / 0.75)  # the same elements, the same scale
    assert abs(kept.float().mean().item() - 0.75) < 5 * (0.75 * 0.25 / kept.numel()) ** 0.5
    assert torch.equal(off, x) and (none == 0).all()
    torch.testing.assert_close(out, ADD_NORMS[name](summed, (200,)))


@pytest.mark.parametrize("add_norm", [F.add_layer_norm, F.add_rms_norm])
def test_the_dropout_mask_is_the_same_on_every_backend(add_norm):
    x, residual = torch.ones(33, 129), torch.zeros(33, 129)
    masks = []
    for backend in BACKENDS:
        torch.manual_seed(4)
        with fastformer.backend(backend):
            masks.append(add_norm(x, residual, (129,), dropout_p=0.4)[1])
    assert torch.equal(*masks)


@pytest.mark.parametrize("used", [0, 1], ids=["out", "summed"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("door", ["eager", "operator"])
@pytest.mark.parametrize("name", ADD_NORMS)
def test_the_gradient_of_one_output_alone(name, door, dropout_p, used, monkeypatch):
    """A post-norm block uses ``out`` and not ``summed``: backward is then given nothing for it, not zeros to read."""
    kernels, given = registry.load("cpu", name), []
    backward = kernels.backward
    monkeypatch.setattr(kernels, "backward", lambda *a: given.append(a[1]) or backward(*a))
    x, residual = torch.randn(6, 40, requires_grad=True), torch.randn(6, 40, requires_grad=True)
    d = torch.randn(6, 40)

    def both(x, residual):
        return getattr(F, name)(x, residual, (40,), dropout_p=dropout_p)

    one = lambda x, residual: both(x, residual)[used]  # noqa: E731
    if door == "operator":
        one = torch.compile(one, fullgraph=True, backend="aot_eager")
    with fastformer.backend("cpu"), torch.autograd.set_multithreading_enabled(False):
        torch.manual_seed(2)
        ours = torch.autograd.grad(one(x, residual), (x, residual), d)
        torch.manual_seed(2)
        upstream = [d, torch.zeros_like(d)] if used == 0 else [torch.zeros_like(d), d]
        wanted = torch.autograd.grad(both(x, residual), (x, residual), upstream)
    assert (given[0] is None) == (used == 0) and given[1] is not None
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


GRADCHECKS = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (5,), w, b), [(3, 5), (5,), (5,)]),
    "add_layer_norm": (lambda x, r, w, b: F.add_layer_norm(x, r, (5,), w, b), [(3, 5), (3, 5), (5,), (5,)]),
    "rms_norm": (lambda x, w, b: F.rms_norm(x, (5,), w, 1e-3, bias=b), [(3, 5), (5,), (5,)]),
    "add_rms_norm": (lambda x, r, w: F.add_rms_norm(x, r, (5,), w), [(3, 5), (3, 5), (5,)]),
    "softmax": (lambda x: F.softmax(x, 0), [(3, 5)]),
    "log_softmax": (lambda x: F.log_softmax(x, 1), [(3, 5)]),
    "gelu": (F.gelu, [(3, 5)]),
    "silu": (F.silu, [(3, 5)]),
    "relu": (F.relu, [(3, 5)]),
    "bias_activation": (lambda x, b: F.bias_activation(x, b, "gelu_tanh"), [(3, 5), (5,)]),
    "gated_activation": (
        lambda x, u, b, c: F.gated_activation(x, u, "gelu", gate_bias=b, up_bias=c),
        [(3, 5), (3, 5), (5,), (5,)],
    ),
    "cross_entropy": (lambda x: F.cross_entropy(x, torch.tensor([1, -100, 4]), label_smoothing=0.1), [(3, 5)]),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name):
    function, shapes = GRADCHECKS[name]
    assert torch.autograd.gradcheck(function, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes])


def test_repeats_bit_for_bit():
    for name, op in OPS.items():
        tensors = [torch.randn(600, 300), *(torch.randn(s) for s in op.parameters(300))]
        for a, b in zip(run(op.ours, tensors), run(op.ours, tensors), strict=True):
            assert torch.equal(a, b), name


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 200), st.integers(0, 2**31))
def test_layer_norm_of_any_shape_has_mean_0_and_variance_1(rows, cols, seed):
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = F.layer_norm(x, (cols,), eps=0.0 if cols > 1 else 1e-5)
    assert y.mean(1).abs().max() < 1e-9
    if cols > 1:
        torch.testing.assert_close(y.var(1, unbiased=False), torch.ones(rows, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 200), st.floats(-3, 3), st.integers(0, 2**31))
def test_rms_norm_of_any_shape_has_mean_square_1_and_no_scale(rows, cols, exponent, seed):
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1
    y = F.rms_norm(x, (cols,), eps=0.0)
    torch.testing.assert_close(y.square().mean(1), torch.ones(rows, dtype=torch.float64))
    torch.testing.assert_close(F.rms_norm(x * 10**exponent, (cols,), eps=0.0), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_rms_norm_without_eps_adds_torchs(dtype):
    """It matters where x is small: 1e-4 squared is less than float32's epsilon, 5e-9 squared than float64's."""
    x = torch.full((2, 6), 5e-9 if dtype == torch.float64 else 1e-4).to(dtype)
    torch.testing.assert_close(F.rms_norm(x, (6,)), TF.rms_norm(x, (6,)))
    torch.testing.assert_close(F.add_rms_norm(x, x, (6,))[0], TF.rms_norm(x + x, (6,)))
    assert (F.rms_norm(x, (6,)) < 0.5).all()


X, W = torch.randn(4, 6), torch.randn(6)
BAD = {
    r"normalized_shape: \(5,\) is not the end": lambda: F.layer_norm(X, (5,)),
    r"weight: shape \(5,\) is not \(6,\)": lambda: F.layer_norm(X, (6,), W[:5]),
    "weight: dtype torch.float64 beside input": lambda: F.layer_norm(X, (6,), W.double()),
    "bias: dtype torch.bfloat16": lambda: F.layer_norm(X.bfloat16(), (6,), W, W.bfloat16()),
    "eps: -1 is negative": lambda: F.layer_norm(X, (6,), eps=-1),
    "input: expected a torch.Tensor, got list": lambda: F.layer_norm([1.0], (1,)),
    "input: dtype torch.int64 is not one of": lambda: F.gelu(torch.arange(3)),
    r"normalized_shape: \(\) is not the end": lambda: F.rms_norm(X, ()),
    r"weight: shape \(4,\) is not \(6,\)": lambda: F.rms_norm(X, (6,), W[:4]),
    r"bias: shape \(1, 6\) is not \(6,\)": lambda: F.rms_norm(X, (6,), W, bias=W[None]),
    "eps: -2 is negative": lambda: F.rms_norm(X, (6,), eps=-2),
    "eps: nan is negative": lambda: F.add_rms_norm(X, X, (6,), eps=float("nan")),
    "input: dtype torch.int64 is not one of ": lambda: F.rms_norm(torch.arange(3), (3,)),
    "weight: expected a torch.Tensor or None, got float": lambda: F.rms_norm(X, (6,), 1e-5),
    r"residual: shape \(2, 6\)": lambda: F.add_rms_norm(X, X[:2], (6,)),
    r"dropout_p: -1 is not in \[0, 1\]": lambda: F.add_rms_norm(X, X, (6,), dropout_p=-1),
    "residual: shape": lambda: F.add_layer_norm(X, X[:2], (6,)),
    "residual: dtype": lambda: F.add_layer_norm(X, X.double(), (6,)),
    r"dropout_p: 1.5 is not in \[0, 1\]": lambda: F.add_layer_norm(X, X, (6,), dropout_p=1.5),
    "dim: 2 is out of range": lambda: F.softmax(X, 2),
    "approximate: 'tan' is not one of 'none', 'tanh'; did you mean 'tanh'": lambda: F.gelu(X, "tan"),
    r"bias: shape \(5,\)": lambda: F.bias_activation(X, W[:5]),
    "bias: dtype torch.float64 differs from input's": lambda: F.bias_activation(X, W.double()),
    "activation: 'sillu' is not one of .* did you mean 'silu'": lambda: F.bias_activation(X, W, "sillu"),
    r"dropout_p: -0.1 is not in \[0, 1\]": lambda: F.bias_activation(X, W, dropout_p=-0.1),
    r"up: shape \(2, 6\) is not gate's \(4, 6\)": lambda: F.gated_activation(X, X[:2]),
    "up: dtype torch.bfloat16 differs": lambda: F.gated_activation(X, X.bfloat16()),
    r"up_bias: shape \(5,\)": lambda: F.gated_activation(X, X, up_bias=W[:5]),
    r"gate_bias: shape \(5,\)": lambda: F.gated_activation(X, X, gate_bias=W[:5]),
    "target: row 2 is 6, not in": lambda: F.cross_entropy(X, torch.tensor([0, 1, 6, 2])),
    "target: row 2 is -3, not in": lambda: F.cross_entropy(X, torch.tensor([0, 1, -3, 2])),
    "target: dtype torch.int32": lambda: F.cross_entropy(X, torch.zeros(4, dtype=torch.int32)),
    r"target: indices of shape \(3,\)": lambda: F.cross_entropy(X, torch.zeros(3, dtype=torch.int64)),
    "target: probabilities of shape": lambda: F.cross_entropy(X, X[:2]),
    r"weight: shape \(5,\) is not \(6,\) ?": lambda: F.cross_entropy(X, torch.zeros(4, dtype=torch.int64), W[:5]),
    "reduction: 'men' is not one of .* did you mean 'mean'": lambda: F.cross_entropy(X, X, reduction="men"),
    "label_smoothing: 2": lambda: F.cross_entropy(X, X, label_smoothing=2),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        BAD[message]()


def _operator_calls():
    x, w, t = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True), torch.tensor([1, 7, -100])
    mean, rstd, d = torch.zeros(3), torch.ones(3), torch.randn(3, 8)
    p, q = x.detach(), w.detach()
    op = torch.ops.fastformer
    yield op.layer_norm, (x, [8], w, w, 1e-5)
    yield op.layer_norm_backward, (d, p, [8], q, mean, rstd, torch.float32)
    yield op.add_layer_norm, (x, x, [8], w, None, 1e-5, 0.5, torch.tensor(3))
    yield op.add_layer_norm_backward, (d, d, p, [8], q, mean, rstd, 0.5, torch.tensor(3), torch.float32)
    yield op.add_layer_norm_backward, (d, None, p, [8], q, mean, rstd, 0.0, None, torch.float32)
    yield op.rms_norm, (x, [8], w, w, 1e-5)
    yield op.rms_norm_backward, (d, p, [8], q, rstd, torch.float32)
    yield op.add_rms_norm, (x, x, [8], w, None, 1e-5, 0.5, torch.tensor(3))
    yield op.add_rms_norm_backward, (d, None, p, [8], q, rstd, 0.5, torch.tensor(3), torch.float32)
    yield op.add_rms_norm_backward, (None, d, p, [8], None, rstd, 0.0, None, torch.float32)
    yield op.softmax, (x, False)
    yield op.softmax_backward, (d, p.softmax(1), False)
    yield op.activation, (x, w, None, None, "gelu_tanh", 0.0, None)
    yield op.activation, (x, w, x, None, "silu", 0.5, torch.tensor(3))
    yield op.activation_backward, (d, p, q, None, None, "gelu_tanh", 0.0, None)
    yield op.activation_backward, (d, p, q, p, q, "silu", 0.5, torch.tensor(3))
    ids, seed, needs = torch.tensor([[0, 2, 2]]), torch.tensor(3), [True, True, False, True, False]
    yield op.embedding, (ids, x, x, None, None, 0, None, 1, 2.0, w, w, 1e-5, 0.5, seed)
    yield op.embedding, (ids, x, None, None, None, 0, None, -1, 1.0, None, None, None, 0.0, None)
    tables = (ids, p, p, None, None, 0, None, 1, 2.0, q)
    yield op.embedding_backward, (d[None], *tables, mean, rstd, 1e-5, 0.5, seed, needs, torch.float32)
    heads = torch.randn(2, 3, 3, 12).transpose(1, 2).requires_grad_()
    yield op.rotary, (heads, heads[:, :1], p[:, :4], p[:, 4:], ids, 0, 0, True, False)
    yield op.rotary, (heads, None, p[:, :4], p[:, 4:], None, 0, 0, False, True)
    yield op.cross_entropy, (x, t, None, None, -100, 0.1, 0.0)
    yield op.cross_entropy_backward, (torch.ones(3), p, t, None, None, p.logsumexp(1), -100, 0.0, 0.0)


def test_operators_pass_torchs_own_checks():
    from fastformer.functional import _doors

    tried = set()
    for operator, arguments in _operator_calls():
        torch.library.opcheck(operator.default, arguments)
        tried.add(operator.__name__)
    elsewhere = {"attention", "attention_backward", "decode_attention", "linear"}
    elsewhere |= {"linear_cross_entropy", "linear_cross_entropy_backward", "linear_cross_entropy_reduced"}
    assert tried | elsewhere == set(_doors.operators)


def test_compiles_to_one_graph():
    def function(x, w, b):
        y, s = F.add_layer_norm(F.layer_norm(x, (8,), w, b), x, (8,), w, b)
        y, s = F.add_rms_norm(F.rms_norm(y, (8,), w), s, (8,), w, 1e-4, bias=b)
        y = F.gated_activation(F.bias_activation(y + s, b, "gelu_tanh"), y)
        return F.cross_entropy(F.softmax(y, -1), torch.tensor([1, 2, -100]))

    tensors = [torch.randn(3, 8), torch.randn(8), torch.randn(8)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, wanted in zip(run(compiled, tensors), run(function, tensors), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_torch_func_transforms():
    x, w = torch.randn(3, 4, 8), torch.randn(8)

    def ours(x):
        y, s = F.add_rms_norm(F.rms_norm(F.layer_norm(x, (8,), w, w), (8,), w), x, (8,))
        return F.gelu(F.softmax(y + s, -1)).square().sum()

    def theirs(x):
        s = TF.rms_norm(TF.layer_norm(x, (8,), w, w), (8,), w) + x
        return TF.gelu(TF.softmax(TF.rms_norm(s, (8,)) + s, -1)).square().sum()

    transform = lambda f: torch.func.vmap(torch.func.grad(f))(x)  # noqa: E731
    torch.testing.assert_close(transform(ours), transform(theirs))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", OPS)
def test_tensors_are_read_alike_with_and_without_torchs_table(name, dtype):
    from fastformer import _C

    op = OPS[name]
    x = torch.randn(6, 20).to(dtype)[:, 3:16].requires_grad_()  # rows at a distance
    parameters = [torch.randn(shape).to(dtype).requires_grad_() for shape in op.parameters(13)]
    results = []
    try:
        for wanted in (True, False):
            _C.use_exchange(wanted)
            out = op.ours(x, *parameters)
            results.append([out, *torch.autograd.grad(out.double().square().sum(), [x, *parameters])])
    finally:
        _C.use_exchange(True)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
