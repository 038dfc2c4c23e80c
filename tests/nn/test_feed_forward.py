"""fastformer.nn.FeedForward beside the same block from torch.nn."""

import pytest
import torch

from fastformer import nn
from tests.nn.comparison import assert_drop_in, compare


class TorchFeedForward(torch.nn.Module):
    def __init__(self, embed_dim, hidden_dim, activation="gelu", bias=True, dtype=None):
        super().__init__()
        self.linear1 = torch.nn.Linear(embed_dim, hidden_dim, bias, dtype=dtype)
        self.linear2 = torch.nn.Linear(hidden_dim, embed_dim, bias, dtype=dtype)
        self.activation = torch.nn.GELU("tanh" if activation == "gelu_tanh" else "none")

    def forward(self, x):
        return self.linear2(self.activation(self.linear1(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        (3, 5, 24),  # a transformer's activations
        (24,),  # one token, no leading dimension
        (2, 0, 24),  # no tokens
    ],
)
def test_matches_torch(shape, bias, activation, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    theirs = TorchFeedForward(24, 40, activation, bias, dtype)
    compare(nn.FeedForward(24, 40, activation, bias, dtype=dtype), theirs, [x])


def test_is_a_drop_in():
    assert_drop_in(lambda: nn.FeedForward(8, 20), lambda: TorchFeedForward(8, 20))


def test_dropout_only_in_training():
    module = nn.FeedForward(16, 32, dropout=0.5)
    x = torch.randn(200, 16)
    zeros = (module(x) == 0).float().mean().item()
    assert 0.45 < zeros < 0.55
    module.eval()
    assert (module(x) == 0).sum() == 0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 4), "embed_dim"),
        ((4, -1), "hidden_dim"),
        ((4, 4, "relux"), "activation"),
        ((4, 4, "gelu", True, 1.5), "dropout"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        nn.FeedForward(*arguments)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="x"):
        nn.FeedForward(4, 8)(torch.randn(2, 5))
