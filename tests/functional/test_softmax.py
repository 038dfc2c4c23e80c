"""softmax and log_softmax with a scale, masks and the causal form: values and every gradient against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastformer
from fastformer import functional as F
from fastformer.backends.layout import collapsed
from tests.numerics import assert_close_to_fp64

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = ["cpu", "reference"]
INF = float("inf")

# What is added to scores of shape (2, 3, 5, cols): the shape of the mask, and whether it is a number or a truth value.
MASKS = {
    "nothing": (None, False),
    "keys": ((-1,), False),
    "keys of each sequence": ((2, 1, 1, -1), False),  # a padding mask
    "whole rows": ((2, 1, 5, 1), False),  # broadcast along the row itself
    "every element": ((2, 3, 5, -1), False),
    "bias of each head": ((3, 5, -1), True),
    "bias of each sequence": ((2, 1, 5, -1), True),  # broadcast between two dimensions that are not
    "one number a row": ((3, 5, 1), True),
    "one number": ((), True),
}
# 7: a tail of a vector; 64: whole vectors; 3: fewer keys than queries, so that causal rows are empty; 2060: two chunks
LENGTHS = [7, 64, 3, 2060]


def plain(x: Tensor, dim: int, log: bool, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    """The formula in PyTorch's own operations. What takes no part is 0 (log: -inf) and gets no gradient."""
    z = x * scale
    visible = torch.ones((), dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        visible = mask
    elif mask is not None:
        z = z + mask
    if causal:
        visible = visible & torch.ones(x.shape[-2:], dtype=torch.bool).tril(x.shape[-1] - x.shape[-2])
    z = z.masked_fill(~visible, -INF)
    nothing = torch.isneginf(z).all(dim, keepdim=True)
    z = z.masked_fill(nothing, 0.0)
    out = torch.log_softmax(z, dim) if log else torch.softmax(z, dim)
    return out.masked_fill(nothing, -INF if log else 0.0)


def make_mask(name: str, cols: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor | None:
    shape, added = MASKS[name]
    if shape is None:
        return None
    values = torch.randn([cols if n < 0 else n for n in shape], generator=generator)
    return values.to(dtype).requires_grad_() if added else values > -0.5


def run(function, x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients with everything converted to ``dtype`` first."""
    x = x.detach().to(dtype).requires_grad_()
    leaves = [x]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.detach().to(dtype).requires_grad_()
        leaves.append(mask)
    out = function(x, mask)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, causal, dtype, backend):
    g = torch.Generator().manual_seed(1)
    for cols in LENGTHS:
        x = torch.randn(2, 3, 5, cols, generator=g).to(dtype) * 2
        mask = make_mask(name, cols, dtype, g)
        for log in (False, True):
            ours = F.log_softmax if log else F.softmax
            with fastformer.backend(backend):
                mine = run(lambda x, m, f=ours: f(x, -1, scale=0.7, mask=m, causal=causal), x, mask, dtype)
            peers = [
                run(lambda x, m, log=log: plain(x, -1, log, 0.7, m, causal), x, mask, d) for d in (dtype, torch.float64)
            ]
            for what, *results in zip(("out", "dx", "dmask"), mine, *peers, strict=False):
                # A row's gradients cancel, and the gradient of one number is the sum of 60000 that were rounded before.
                scale = 0.0 if what == "out" else 1024.0 if what == "dmask" and mask.dim() == 0 else 8.0
                assert_close_to_fp64(f"{what}, {cols} columns, log={log}", *results, scale=scale)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_masks_along_any_dimension(dim):
    x, mask = torch.randn(4, 6, 9), torch.rand(6, 1) > 0.3
    for m in (mask, torch.randn(4, 1, 9), None):
        for log, ours in ((False, F.softmax), (True, F.log_softmax)):
            function = lambda x, m, log=log: plain(x, dim, log, 1.0, m, False)  # noqa: E731
            for got, wanted in zip(
                run(lambda x, m, f=ours: f(x, dim, mask=m), x, m, torch.float32), run(function, x, m, torch.float32)
            ):
                torch.testing.assert_close(got, wanted)


def test_float32_bias_beside_half_precision():
    x, bias = torch.randn(3, 5, 37).bfloat16(), torch.randn(5, 37, requires_grad=True)
    out = F.softmax(x, -1, mask=bias)
    torch.testing.assert_close(out, torch.softmax(x.float() + bias, -1).bfloat16())
    (grad,) = torch.autograd.grad(out.float().square().sum(), bias)
    assert grad.dtype == torch.float32 and grad.shape == bias.shape


def test_rows_without_any_element_have_no_gradient():
    x, bias = torch.randn(4, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    for ours, empty in ((F.softmax, 0.0), (F.log_softmax, -INF)):
        out = ours(x, -1, mask=bias, causal=True)  # the first query has no key
        assert (out[0] == empty).all() and not out.isnan().any()
        dx, dbias = torch.autograd.grad(out[1:].nan_to_num(neginf=0.0).square().sum() + out[0].exp().sum(), (x, bias))
        assert (dx[0] == 0).all() and (dx[1, 1:] == 0).all() and torch.equal(dx, dbias) and not dx.isnan().any()


def test_hidden_elements_may_hold_anything():
    x = torch.randn(3, 40)
    mask = torch.rand(3, 40) > 0.3
    spoiled = x.masked_fill(~mask, float("nan"))
    assert torch.equal(F.softmax(spoiled, -1, mask=mask), F.softmax(x, -1, mask=mask))


def test_scale_of_zero_and_of_huge_scores():
    x, bias = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    dx, dbias = torch.autograd.grad(F.softmax(x, -1, scale=0.0, mask=bias).square().sum(), (x, bias))
    assert (dx == 0).all()
    torch.testing.assert_close(dbias, torch.autograd.grad(torch.softmax(bias, -1).square().sum(), bias)[0])
    big = torch.tensor([[1.7e38, 1.3e38, 0.0], [3e7, 3e7 - 8, 1.0]])
    torch.testing.assert_close(F.softmax(big, -1, scale=1.9), torch.softmax(big * 1.9, -1))


def test_repeats_bit_for_bit():
    x, bias = torch.randn(4, 3, 64, 96, requires_grad=True), torch.randn(3, 1, 96, requires_grad=True)
    first, second = (
        torch.autograd.grad(F.softmax(x, -1, scale=0.3, mask=bias).square().sum(), (x, bias)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradcheck():
    x, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (3, 1)))
    for f in (F.softmax, F.log_softmax):
        assert torch.autograd.gradcheck(lambda x, b, f=f: f(x, -1, scale=0.6, mask=b), (x, bias))
    assert torch.autograd.gradcheck(lambda x, b: F.softmax(x, -1, mask=b, causal=True), (x, bias))


# shape of the mask, shape of the input, the three leading dimensions, and whether the mask is read where it lies
COLLAPSES = [
    ((7,), (2, 3, 4, 5, 7), (1, 1, 120), True),  # one row for all
    ((2, 1, 1, 5, 7), (2, 3, 4, 5, 7), (2, 12, 5), True),  # two broadcast neighbours become one
    ((3, 4, 1, 7), (2, 3, 4, 5, 7), (2, 12, 5), True),
    ((2, 1, 4, 1, 7), (2, 3, 4, 5, 7), (1, 1, 120), False),  # nothing collapses: copied
    ((4, 1), (3, 4, 7), (1, 3, 4), True),  # broadcast along the row
    ((1,), (7,), (1, 1, 1), True),  # no leading dimension at all
    ((2, 3, 1, 1), (2, 3, 4, 1), (1, 6, 4), True),  # rows of one element
]


@pytest.mark.parametrize("shape, of, rows, in_place", COLLAPSES, ids=str)
def test_broadcast_masks_are_not_copied(shape, of, rows, in_place):
    mask = torch.arange(torch.Size(shape).numel()).view((1,) * (len(of) - len(shape)) + shape)
    (view,), row_shape = collapsed((mask,), of)
    assert row_shape == rows and view.shape == (*rows, of[-1]) and view.stride(3) in (0, 1)
    assert (view.data_ptr() == mask.data_ptr()) == in_place
    assert torch.equal(view.reshape(of), mask.expand(of))


def test_collapsing_keeps_the_queries_apart():
    (mask, bias), rows = collapsed((torch.ones(2, 1, 1, 7), torch.ones(1, 3, 5, 7)), (2, 3, 5, 7), True)
    assert rows == (2, 3, 5) and mask.stride() == (7, 0, 0, 1) and bias.stride() == (0, 35, 7, 1)
    assert collapsed((None,), (2, 3, 4, 5, 7), True)[1] == (1, 24, 5)
    assert collapsed((torch.ones(2, 1, 4, 1, 7),), (2, 3, 4, 5, 7), True)[1] == (1, 24, 5)


def test_compiles_and_transforms():
    x, bias = torch.randn(2, 4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    mask = torch.rand(2, 1, 6) > 0.3

    def function(x, bias):
        return F.softmax(x, -1, scale=0.5, mask=bias, causal=True) * F.log_softmax(x, -1, mask=mask).exp()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(x, bias).square().sum(), (x, bias)) for f in (function, compiled)]
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)
    gradient = torch.func.grad(lambda b: function(x.detach(), b).square().sum())(bias.detach())
    torch.testing.assert_close(gradient, results[0][1])


def test_operators_pass_torchs_own_checks():
    x, bias = torch.randn(2, 4, 6, requires_grad=True), torch.randn(1, 4, 6, requires_grad=True)
    mask, op = torch.rand(2, 1, 6) > 0.3, torch.ops.fastformer
    torch.library.opcheck(op.softmax.default, (x, False, 0.5, None, bias, True))
    torch.library.opcheck(op.softmax.default, (x, True, 0.5, mask, None, False))
    out = op.softmax(x.detach(), True, 0.5, mask)
    torch.library.opcheck(op.softmax_backward.default, (torch.randn(2, 4, 6), out, True, 0.5, mask, False))


X = torch.randn(4, 6)
BAD = {
    r"mask: shape \(4, 5\) does not broadcast to input's \(4, 6\)": lambda: F.softmax(X, -1, mask=torch.ones(4, 5)),
    r"mask: shape \(1, 4, 6\) does not": lambda: F.softmax(X, -1, mask=torch.ones(1, 4, 6)),
    "mask: dtype torch.int64 beside input": lambda: F.softmax(X, -1, mask=torch.ones(6, dtype=torch.int64)),
    "mask: dtype torch.float64 beside input": lambda: F.softmax(X, -1, mask=torch.ones(6, dtype=torch.float64)),
    "mask: expected a torch.Tensor, got list": lambda: F.log_softmax(X, -1, mask=[True]),
    "causal: needs an input": lambda: F.softmax(X, 0, causal=True),
    "causal: needs an input .*got 1 dimensions": lambda: F.softmax(X[0], -1, causal=True),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
