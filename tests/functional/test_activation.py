"""Activations beyond values and gradients (test_row_ops.py has those): in place, dropout, strided halves, the doors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as TF

import fastformer
from fastformer import functional as F
from fastformer.backends import registry

BACKENDS = ["cpu", "reference"]
INPLACE = {"relu": (F.relu, TF.relu), "silu": (F.silu, TF.silu)}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastformer.backend(request.param):
        yield request.param


@pytest.mark.parametrize("name", INPLACE)
@pytest.mark.parametrize("strided", [False, True])
def test_in_place(name, strided, backend):
    ours, torchs = INPLACE[name]
    x = torch.randn(6, 10)
    mine = x.clone()
    view = mine[:, ::2] if strided else mine
    assert ours(view, inplace=True) is view
    torch.testing.assert_close(view, torchs(x[:, ::2] if strided else x))
    if strided:
        assert torch.equal(mine[:, 1::2], x[:, 1::2]), "columns in between stay"


@pytest.mark.parametrize("name", INPLACE)
def test_in_place_with_gradients(name, backend):
    ours, torchs = INPLACE[name]
    leaf = torch.randn(4, 7, requires_grad=True)
    gradients = []
    for function in (ours, torchs):
        x = leaf * 2
        out = function(x, inplace=True)
        assert out is x
        gradients += torch.autograd.grad(out.square().sum(), leaf)
    torch.testing.assert_close(*gradients)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        ours(leaf, inplace=True)


def test_in_place_compiles():
    compiled = torch.compile(lambda x: F.silu(x * 2, inplace=True), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8)
    torch.testing.assert_close(compiled(x), TF.silu(x * 2))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_is_the_same_forward_and_backward_and_follows_the_seed(gated, p, backend):
    x, up = (torch.randn(9, 700, requires_grad=True) for _ in range(2))

    def call(**options):
        torch.manual_seed(5)
        if gated:
            return F.gated_activation(x, up, dropout_p=p, **options)
        return F.bias_activation(x, None, "silu", dropout_p=p, **options)

    out, again, off = call(), call(), call(training=False)
    assert torch.equal(out, again)
    torch.manual_seed(6)
    other = F.bias_activation(x, None, "silu", dropout_p=p)
    assert p == 1 or not torch.equal(out != 0, other != 0)
    kept = (out != 0).double()
    assert abs(kept.mean().item() - (1 - p)) < 0.03
    scale = 1 / (1 - p) if p < 1 else 0.0
    torch.testing.assert_close(out.double(), off.double() * kept * scale, rtol=1e-6, atol=1e-7)
    leaves = [x, up] if gated else [x]
    upstream = torch.randn(9, 700)
    gradients = torch.autograd.grad(out, leaves, upstream)
    expected = torch.autograd.grad(off, leaves, upstream * kept.float() * scale)
    torch.testing.assert_close(gradients, expected)


def test_the_dropout_mask_is_the_same_on_every_backend_and_for_every_split():
    masks = []
    x = torch.ones(3, 40000)  # few long rows: each thread owns columns
    before = torch.get_num_threads()
    try:
        for backend, threads in (("reference", 1), ("cpu", 1), ("cpu", 5)):
            torch.set_num_threads(threads)
            torch.manual_seed(2)
            with fastformer.backend(backend):
                masks.append(F.bias_activation(x, None, "relu", dropout_p=0.4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
def test_in_place_on_halves_of_one_tensor(dtype, backend):
    """A gated feed-forward's first matmul gives both factors side by side; results and gradients replace them."""
    kernels = registry.select("activation", "cpu", dtype, ("bias", "gate"))
    both, dout, bias = torch.randn(130, 2 * 300).to(dtype), torch.randn(130, 300).to(dtype), torch.randn(300).to(dtype)
    x, up = (t.contiguous() for t in both.chunk(2, 1))
    wanted = kernels.forward(x, bias, up, bias, "silu")
    dx, dup, dbias, dup_bias = kernels.backward(dout, x, bias, up, bias, "silu", need_dbias=True, need_dup_bias=True)
    shared = both.clone()
    x, up = shared.chunk(2, 1)
    kernels.forward(x, bias, up, bias, "silu", out=x)
    assert torch.equal(shared[:, :300], wanted) and torch.equal(shared[:, 300:], both[:, 300:])
    shared = both.clone()
    x, up = shared.chunk(2, 1)
    again = torch.empty_like(dout)
    results = kernels.backward(dout, x, bias, up, bias, "silu", 0.0, 0, True, True, x, up, again)
    assert torch.equal(shared, torch.cat([dx, dup], 1)) and torch.equal(again, wanted)
    assert torch.equal(results[2], dbias) and torch.equal(results[3], dup_bias)
    over = dout.clone()  # dx in the place of dout
    assert torch.equal(kernels.backward(over, x.copy_(both[:, :300]), bias, None, None, "gelu", dx=over)[0], over)
    assert torch.equal(over, kernels.backward(dout, both[:, :300], bias, None, None, "gelu")[0])


def test_dropout_under_transforms_and_compilation():
    x = torch.randn(4, 64)
    torch.manual_seed(1)
    eager = F.bias_activation(x, None, "gelu", dropout_p=0.5)
    leaf = x.clone().requires_grad_()
    compiled = torch.compile(lambda t: F.bias_activation(t, None, "gelu", dropout_p=0.5), backend="aot_eager")
    out = compiled(leaf)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert ((out == 0) == (grad == 0)).all() and 0.3 < (out != 0).float().mean() < 0.7
    torch.testing.assert_close(eager[eager != 0], (2 * TF.gelu(x))[eager != 0])
