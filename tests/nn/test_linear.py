"""fastformer.nn.Linear beside torch.nn's."""

import pytest
import torch

from fastformer import nn
from fastformer.backends import matmul
from tests.nn.comparison import assert_drop_in, compare


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 30, 24), (3, 24), (24,), (0, 24)])
def test_matches_torch(shape, bias, converted, dtype, monkeypatch):
    """On a CPU with instructions for half precision and on one without."""
    monkeypatch.setattr(matmul, "CONVERTED", frozenset({torch.bfloat16, torch.float16} if converted else ()))
    torch.manual_seed(0)
    theirs = torch.nn.Linear(24, 33, bias=bias, dtype=dtype)
    compare(nn.Linear(24, 33, bias=bias, dtype=dtype), theirs, [torch.randn(shape).to(dtype)])


@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"dtype": torch.bfloat16}], ids=str)
def test_is_a_drop_in(arguments):
    assert_drop_in(lambda: nn.Linear(12, 7, **arguments), lambda: torch.nn.Linear(12, 7, **arguments))
    assert isinstance(nn.Linear(12, 7), torch.nn.Linear)  # code that looks for linear layers finds it


def test_on_the_meta_device():
    module = nn.Linear(12, 7, device="meta", dtype=torch.bfloat16)
    assert module(torch.empty(3, 12, device="meta", dtype=torch.bfloat16)).shape == (3, 7)
    module.to_empty(device="cpu").reset_parameters()
    assert module(torch.zeros(3, 12, dtype=torch.bfloat16)).equal(module.bias.expand(3, 7))


def test_frozen_tied_and_hooked():
    """A frozen weight gets no gradient, a shared one the sum of both uses; hooks run."""
    module = nn.Linear(24, 24, dtype=torch.bfloat16)
    x = torch.randn(20, 24, dtype=torch.bfloat16, requires_grad=True)
    module.weight.requires_grad_(False)
    module(x).sum().backward()
    assert module.weight.grad is None and module.bias.grad is not None and x.grad is not None
    module.weight.requires_grad_(True)
    tied = nn.Linear(24, 24, bias=False, dtype=torch.bfloat16)
    tied.weight = module.weight
    calls = []
    tied.register_forward_hook(lambda *_: calls.append(1))
    hidden = module(x)
    alone = torch.autograd.grad(tied(hidden.detach()).sum(), tied.weight)[0]
    through = torch.autograd.grad(hidden, module.weight, tied.weight.sum(0).expand(20, 24).detach())[0]
    tied(module(x)).sum().backward()
    torch.testing.assert_close(module.weight.grad, alone + through, rtol=2e-2, atol=2e-2 * alone.abs().max().item())
    assert calls == [1, 1]
