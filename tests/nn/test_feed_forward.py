"""fastformer.nn.FeedForward and GatedFeedForward beside the same blocks from torch.nn."""

import copy
import pickle

import pytest
import torch

from fastformer import nn
from fastformer.functional import _joined
from tests.nn.comparison import assert_drop_in, compare

ACTIVATIONS = {
    "relu": torch.nn.ReLU(),
    "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU("tanh"),
    "silu": torch.nn.SiLU(),
}


class TorchFeedForward(torch.nn.Module):
    def __init__(self, embed_dim, hidden_dim, activation="gelu", bias=True, dtype=None):
        super().__init__()
        self.linear1 = torch.nn.Linear(embed_dim, hidden_dim, bias, dtype=dtype)
        self.linear2 = torch.nn.Linear(hidden_dim, embed_dim, bias, dtype=dtype)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x, residual=None):
        out = self.linear2(self.activation(self.linear1(x)))
        return out if residual is None else residual + out


class TorchGatedFeedForward(torch.nn.Module):
    def __init__(self, embed_dim, hidden_dim, activation="silu", bias=False, dtype=None):
        super().__init__()
        self.gate_proj = torch.nn.Linear(embed_dim, hidden_dim, bias, dtype=dtype)
        self.up_proj = torch.nn.Linear(embed_dim, hidden_dim, bias, dtype=dtype)
        self.down_proj = torch.nn.Linear(hidden_dim, embed_dim, bias, dtype=dtype)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x, residual=None):
        out = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return out if residual is None else residual + out


PAIRS = {"plain": (nn.FeedForward, TorchFeedForward), "gated": (nn.GatedFeedForward, TorchGatedFeedForward)}
every_form = pytest.mark.parametrize("form", PAIRS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        (3, 5, 24),  # a transformer's activations
        (24,),  # one token, no leading dimension
        (2, 0, 24),  # no tokens
    ],
)
@every_form
def test_matches_torch(form, shape, bias, activation, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    ours, theirs = (module(24, 40, activation, bias, dtype=dtype) for module in PAIRS[form])
    compare(ours, theirs, [x])


@every_form
def test_residual_and_recomputation(form):
    torch.manual_seed(0)
    ours, theirs = PAIRS[form]
    inputs = [torch.randn(4, 24), torch.randn(4, 24)]
    for recompute in (False, True):
        compare(ours(24, 40, recompute=recompute), theirs(24, 40), inputs)


@every_form
def test_is_a_drop_in(form):
    ours, theirs = PAIRS[form]
    assert_drop_in(lambda: ours(8, 20), lambda: theirs(8, 20))


@every_form
def test_dropout_only_in_training(form):
    module = PAIRS[form][0](16, 32, dropout=0.5)
    x = torch.randn(200, 16)
    zeros = (module(x) == 0).float().mean().item()
    assert 0.45 < zeros < 0.55
    same = (module(x, x) == x).float().mean().item()  # the residual is not dropped
    assert 0.45 < same < 0.55
    module.eval()
    assert (module(x) == 0).sum() == 0


@every_form
def test_activation_dropout_only_in_training(form):
    module = PAIRS[form][0](16, 32, activation_dropout=1.0)
    x = torch.randn(20, 16)
    bias = getattr(module, "linear2", None)
    assert torch.equal(module(x), torch.zeros(20, 16) + (0 if bias is None else bias.bias))
    assert (module.eval()(x) == 0).sum() == 0


def joined(module):
    return _joined.joined(module.gate_proj.weight, module.up_proj.weight) is not None


def test_gate_and_up_stay_one_matmul():
    module = nn.GatedFeedForward(8, 12)
    assert joined(module)
    module.load_state_dict(TorchGatedFeedForward(8, 12).state_dict())
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    assert joined(module)
    x = torch.randn(3, 8)
    expected = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.double().float()):
        assert joined(twin)
        torch.testing.assert_close(twin(x), expected)
    assert module.double()(x.double()).dtype == torch.float64 and joined(module)
    assert [p.data_ptr() for p in optimizer.param_groups[0]["params"]] == [p.data_ptr() for p in module.parameters()]


def test_replaced_parameters_work_as_two_matmuls():
    module = nn.GatedFeedForward(8, 12)
    x = torch.randn(3, 8)
    expected = module(x)
    module.up_proj.weight = torch.nn.Parameter(module.up_proj.weight.detach().clone())
    assert not joined(module)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 4), "embed_dim"),
        ((4, -1), "hidden_dim"),
        ((4, 4, "relux"), "activation: 'relux' .* did you mean 'relu'"),
        ((4, 4, "gelu", True, 1.5), "dropout"),
    ],
)
@every_form
def test_bad_arguments_are_named(form, arguments, name):
    module = PAIRS[form][0]
    with pytest.raises(ValueError, match=name):
        module(*arguments)
    with pytest.raises(ValueError, match="activation_dropout"):
        module(4, 4, activation_dropout=-1)


@every_form
def test_bad_input_is_named(form):
    module = PAIRS[form][0](4, 8)
    with pytest.raises(ValueError, match="input features are not x's"):
        module(torch.randn(2, 5))
    with pytest.raises(ValueError, match="residual"):
        module(torch.randn(2, 4), torch.randn(3, 4))


@pytest.mark.parametrize("cls", [nn.FeedForward, nn.GatedFeedForward])
def test_replaced_and_hooked_layers_are_called(cls):
    block, x = cls(12, 20, "silu", dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    wanted = block(x, residual=x)

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    for name, layer in list(block.named_children()):
        calls = []
        handle = layer.register_forward_hook(lambda m, i, out, calls=calls: calls.append(1))
        torch.testing.assert_close(block(x, residual=x), wanted)
        assert calls == [1]
        handle.remove()
        setattr(block, name, Doubled(layer))
        assert not torch.allclose(block(x, residual=x), wanted)
        block.to(torch.float64)
        copy.deepcopy(block)
        setattr(block, name, layer)
    torch.testing.assert_close(block(x, residual=x), wanted)
