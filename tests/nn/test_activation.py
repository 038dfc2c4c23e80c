"""fastformer.nn.GELU, SiLU, ReLU, Softmax and LogSoftmax beside torch.nn's."""

import pytest
import torch

from fastformer import nn
from tests.nn.comparison import assert_drop_in, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate, dtype):
    # Both tails, where an approximation may leave x or 0.
    x = torch.linspace(-12, 12, 977, dtype=dtype).view(1, 977)
    compare(nn.GELU(approximate), torch.nn.GELU(approximate), [x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["SiLU", "ReLU"])
@pytest.mark.parametrize("inplace", [False, True])
def test_silu_and_relu(kind, inplace, dtype):
    x = torch.linspace(-30, 30, 977, dtype=dtype).view(1, 977)

    def call(module, x):
        return module(x * 1) if inplace else module(x)  # a leaf cannot be changed in place

    compare(getattr(nn, kind)(inplace), getattr(torch.nn, kind)(inplace), [x], call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((5, 37), -1),  # rows of odd length
        ((3, 4, 6), 1),  # a middle dimension: strided rows
        ((7,), 0),  # one row
        ((2, 1), 1),  # one class: the probability is 1
    ],
)
def test_softmax(kind, shape, dim, dtype):
    torch.manual_seed(0)
    compare(getattr(nn, kind)(dim), getattr(torch.nn, kind)(dim), [4 * torch.randn(shape, dtype=dtype)])


def test_softmax_of_a_masked_row_is_zero_with_zero_gradient():
    x = torch.full((2, 3), -torch.inf)
    x[1] = 0
    x.requires_grad_()
    out = nn.Softmax(-1)(x)
    torch.testing.assert_close(out, torch.tensor([[0.0, 0, 0], [1 / 3] * 3]))
    out[0].sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 3))


def test_without_dim_warns_as_torch_does():
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        out = nn.Softmax()(torch.randn(2, 3))
    torch.testing.assert_close(out.sum(1), torch.ones(2))


def test_are_drop_ins():
    assert_drop_in(lambda: nn.GELU("tanh"), lambda: torch.nn.GELU("tanh"))
    assert_drop_in(lambda: nn.SiLU(True), lambda: torch.nn.SiLU(True))
    assert_drop_in(lambda: nn.ReLU(), lambda: torch.nn.ReLU())
    assert_drop_in(lambda: nn.Softmax(1), lambda: torch.nn.Softmax(1))
    assert_drop_in(lambda: nn.LogSoftmax(1), lambda: torch.nn.LogSoftmax(1))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="approximate"):
        nn.GELU("exact")
    with pytest.raises(TypeError, match="input"):
        nn.GELU()(torch.arange(3))
    with pytest.raises(IndexError, match="dim"):
        nn.Softmax(2)(torch.randn(2, 3))
