"""The split of the work over threads: any count gives the same numbers to rounding, the same count the same bits.

Few long rows are cut across; many short ones are dealt out whole; strides need not equal the row length.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as TF

from fastformer import functional as F
from tests.numerics import assert_close_to_fp64


@pytest.fixture
def threads():
    """Sets the thread count; more than there are cores is fine."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


SHAPES = [
    (1, 1 << 17),  # one row cut into parts
    (3, 50257),  # parts that are no multiple of a vector, and fewer rows than threads
    (9, 20011),  # just over two rows a thread, still cut
    (700, 130),  # whole rows, uneven shares
]


def _functions(x, target, w):
    yield "softmax", lambda f, x: f.softmax(x, -1)
    yield "log_softmax", lambda f, x: f.log_softmax(x, -1)
    yield "cross_entropy", lambda f, x: f.cross_entropy(x, target, reduction="none")
    yield (
        "cross_entropy, weights and smoothing",
        lambda f, x: f.cross_entropy(x, target, w.abs().to(x.dtype), reduction="none", label_smoothing=0.2),
    )
    yield "layer_norm", lambda f, x: f.layer_norm(x, x.shape[1:], w.to(x.dtype), w.to(x.dtype))
    yield "rms_norm", lambda f, x: f.rms_norm(x, x.shape[1:], w.to(x.dtype), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_thread_count(shape, dtype, threads):
    g = torch.Generator().manual_seed(6)
    wide = (torch.randn(shape[0], shape[1] + 7, generator=g) * 3).to(dtype)
    x = wide[:, 5:-2]  # rows further apart than they are long, beginning off any alignment
    target, w = torch.randint(0, shape[1], shape[:1], generator=g), torch.randn(shape[1], generator=g).to(dtype)
    target[0] = shape[1] - 1  # in the last part
    for name, function in _functions(x, target, w):

        def run(f, x, function=function):
            leaf = x.detach().requires_grad_()
            out = function(f, leaf)
            upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
            return [out.detach(), *torch.autograd.grad(out, leaf, upstream)]

        exact, same = run(TF, x.double()), run(TF, x)
        for count in (1, 2, 5):
            threads(count)
            first, second = run(F, x), run(F, x)
            for what, ours, again, *expected in zip(("output", "dx"), first, second, same, exact, strict=True):
                assert torch.equal(ours, again), f"{name} {what}: differs from run to run with {count} threads"
                assert_close_to_fp64(f"{name} {what}, {count} threads", ours, *expected, scale=1.0)


@pytest.mark.parametrize("shape", [(2, 70001), (5, 4096), (4000, 24)], ids=str)
def test_bias_gradients_of_any_split(shape, threads):
    """Column sums: over few long rows each thread owns columns, over many short ones each has sums of its own."""
    g = torch.Generator().manual_seed(7)
    x, bias, w = torch.randn(shape, generator=g), torch.randn(shape[1], generator=g), torch.randn(shape[1], generator=g)
    upstream = torch.randn(shape, generator=g)

    def run(f, x, bias, w):
        leaves = [t.detach().requires_grad_() for t in (x, bias, w)]
        x, bias, w = leaves
        y = F.bias_activation(x, bias) if f is F else TF.gelu(x + bias)
        out = f.layer_norm(y, (shape[1],), w, bias)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(x.dtype))]

    exact, same = run(TF, x.double(), bias.double(), w.double()), run(TF, x, bias, w)
    for count in (1, 2, 5):
        threads(count)
        first, second = run(F, x, bias, w), run(F, x, bias, w)
        for what, ours, again, *expected in zip(("out", "dx", "dbias", "dw"), first, second, same, exact, strict=True):
            assert torch.equal(ours, again), f"{what}: differs from run to run with {count} threads"
            assert_close_to_fp64(f"{what}, {count} threads", ours, *expected)


def test_an_index_out_of_range_is_found_in_any_row(threads):
    logits = torch.randn(5000, 12)
    for row in (0, 2500, 4999):
        target = torch.zeros(5000, dtype=torch.int64)
        target[row] = 12
        with pytest.raises(IndexError, match=rf"target: row {row} is 12, not in \[0, 12\)"):
            F.cross_entropy(logits, target)
