"""Linear layers next to each other in memory: one matmul while they are, the same numbers when they are not."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn import functional as TF

from fastformer import nn
from fastformer.functional import _joined as functional_joined
from fastformer.nn._joined import JoinedLayers

SIZES = {"equal": (12, 12, 12), "grouped heads": (12, 4, 4), "two": (6, 10)}


class Projections(JoinedLayers):
    """Two or three layers of one input."""

    def __init__(self, sizes=(12, 12, 12), bias=True, linear=nn.Linear, **options):
        super().__init__()
        self.joined_layers = ("q", "k", "v")[: len(sizes)]
        for name, size in zip(self.joined_layers, sizes, strict=True):
            setattr(self, name, linear(8, size, bias=bias, **options))
        self.join()

    def forward(self, x):
        whole = self.joined_output(x)
        return torch.cat([layer(x) for layer in self.children()], -1) if whole is None else whole


def is_joined(module):
    layers = list(module.children())
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    found = functional_joined.joined(*weights) is not None
    assert biases[0] is None or found == (functional_joined.joined(*biases) is not None)
    return found


def separately(module, x):
    return torch.cat([TF.linear(x, layer.weight, layer.bias) for layer in module.children()], -1)


@pytest.mark.parametrize("linear", [nn.Linear, torch.nn.Linear])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients(sizes, bias, linear):
    module = Projections(sizes, bias, linear, dtype=torch.float64)
    assert is_joined(module) and module.joined_output(torch.zeros(1, 8, dtype=torch.float64)) is not None
    leaves = dict(module.named_parameters())
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, sum(sizes), dtype=torch.float64)
    wanted = torch.autograd.grad(separately(module, x), [x, *leaves.values()], upstream)
    out = module(x)
    torch.testing.assert_close(out, separately(module, x), rtol=1e-13, atol=1e-13)
    found = torch.autograd.grad(out, [x, *leaves.values()], upstream)
    for name, mine, gradient in zip(("x", *leaves), found, wanted, strict=True):
        torch.testing.assert_close(mine, gradient, rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(module(x), out.detach())


def test_frozen_parameters_get_no_gradient():
    module, x = Projections(), torch.randn(4, 8)
    for frozen in (["q.weight"], ["k.bias", "v.weight"], ["q.weight", "k.weight", "v.weight"]):
        module.zero_grad()
        for name, p in module.named_parameters():
            p.requires_grad_(name not in frozen)
        module(x).sum().backward()
        assert {n for n, p in module.named_parameters() if p.grad is None} == set(frozen)
    module.requires_grad_(False)
    assert not module(x).requires_grad


def test_second_derivatives():
    module, x = Projections((2, 3), dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: module(x).square(), (x, *module.parameters()))


def test_a_change_before_backward_is_noticed():
    module, x = Projections(), torch.randn(4, 8, requires_grad=True)
    for layer in module.children():
        out = module(x).sum()
        with torch.no_grad():
            layer.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def test_memory_follows():
    """Loading, optimizer steps, copies, pickles, conversions, empty memory after the meta device."""
    module, x = Projections(), torch.randn(3, 8)
    module.load_state_dict(Projections().state_dict())
    optimizer = torch.optim.AdamW(module.parameters())
    module(x).sum().backward()
    optimizer.step()
    assert is_joined(module)
    expected = module(x)
    torch.testing.assert_close(expected, separately(module, x))
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
        module.double().float(),
    ):
        assert is_joined(twin)
        torch.testing.assert_close(twin(x), expected)
    assert [p.data_ptr() for p in optimizer.param_groups[0]["params"]] == [p.data_ptr() for p in module.parameters()]
    with torch.device("meta"):
        empty = Projections()
    empty.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert is_joined(empty)
    torch.testing.assert_close(empty(x), expected)


def test_memory_that_is_in_place_is_left_there():
    module = Projections()
    before = [p.data_ptr() for p in module.parameters()]
    assert module.to(torch.float32) is module and [p.data_ptr() for p in module.parameters()] == before
    module.share_memory()
    assert is_joined(module) and all(p.is_shared() for p in module.parameters())


@pytest.mark.parametrize("what", ["parameter", "layer", "hook", "parametrisation"])
def test_replaced_parts_run_one_by_one(what):
    module, x = Projections(), torch.randn(3, 8)
    expected, watched = module(x), []
    if what == "parameter":
        module.k.weight = torch.nn.Parameter(module.k.weight.detach().clone())
    elif what == "layer":
        module.k = torch.nn.Sequential(module.k)
    elif what == "hook":
        module.k.register_forward_hook(lambda *_: watched.append(1))
    else:
        torch.nn.utils.parametrizations.weight_norm(module.k)
    for twin in (module, copy.deepcopy(module).double().float()):
        if what != "parameter" or twin is module:
            assert twin.joined_output(x) is None
        torch.testing.assert_close(twin(x), expected)
    assert len(watched) == (2 if what == "hook" else 0)


def test_only_what_is_alike_is_joined():
    for other in (torch.nn.Linear(8, 12, bias=False), nn.Linear(8, 12, dtype=torch.float64), torch.nn.Linear(9, 12)):
        module = Projections()
        module.k = other
        module.to(device="cpu")
        assert not is_joined_quietly(module)
    tied = Projections()
    tied.v.weight = tied.k.weight
    tied.double()
    assert tied.v.weight is tied.k.weight
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(tied(x), separately(tied, x))


def is_joined_quietly(module):
    weights, biases = zip(*((layer.weight, layer.bias) for layer in module.children()), strict=True)
    return all(functional_joined.joined(*parts) is not None for parts in (weights, biases))


def test_transforms_and_compilation_see_the_layers():
    module, x = Projections(), torch.randn(3, 8)
    expected = module(x)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    torch.testing.assert_close(torch.func.functional_call(module, state, (x,)), expected)
    torch.testing.assert_close(torch.func.vmap(module)(x), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), expected)


def test_autocast():
    module, x = Projections(), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, wanted = module(x), separately(module, x)
        assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
