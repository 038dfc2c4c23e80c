"""fastformer.nn.Embedding beside torch.nn.Embedding."""

import pytest
import torch

from fastformer import nn
from tests.nn.comparison import assert_drop_in, compare


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("arguments", [{}, {"padding_idx": 3}, {"padding_idx": -1}], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (3, 40), (0, 5)], ids=str)
def test_matches_torch(shape, arguments, dtype):
    theirs = torch.nn.Embedding(12, 20, dtype=dtype, **arguments)
    compare(nn.Embedding(12, 20, dtype=dtype, **arguments), theirs, [torch.randint(12, shape)])


@pytest.mark.parametrize("arguments", [{}, {"padding_idx": 3}], ids=str)
def test_is_a_drop_in(arguments):
    assert_drop_in(lambda: nn.Embedding(12, 5, **arguments), lambda: torch.nn.Embedding(12, 5, **arguments))
    assert isinstance(nn.Embedding(12, 5), torch.nn.Embedding)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
@pytest.mark.filterwarnings("ignore:fastformer.embedding. no fused kernel")
def test_options_without_a_kernel(options):
    ids, results = torch.tensor([[1, 1], [4, 0]]), []
    for make in (nn.Embedding, torch.nn.Embedding):
        torch.manual_seed(2)
        module = make(6, 5, **options)
        out = module(ids)
        out.square().sum().backward()
        results.append((out, module.weight, module.weight.grad.to_dense()))
    torch.testing.assert_close(*results)


def test_from_pretrained():
    weight = torch.randn(6, 4)
    module = nn.Embedding.from_pretrained(weight, padding_idx=2)
    assert type(module) is nn.Embedding and not module.weight.requires_grad and module.padding_idx == 2
    assert torch.equal(module(torch.tensor([5, 2])), weight[[5, 2]])
    assert nn.Embedding.from_pretrained(weight, freeze=False).weight.requires_grad
