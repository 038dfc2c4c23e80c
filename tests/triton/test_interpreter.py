"""The mends of Triton's interpreter, each beside what torch computes for the same values.

All but the last two, and float16 beside bfloat16 in the dot, fail on the interpreter as Triton 3.6 ships it (the loop
bound with NumPy >= 2.4). On a GPU they pass without any mend, which is the point.
"""

import pytest
import torch
import triton
import triton.language as tl

from fastformer.backends.triton import interpreter, interpreting, launch


@triton.jit
def _arithmetic(x_ptr, y_ptr, sum_ptr, product_ptr, negative_ptr, less_ptr):
    index = tl.arange(0, 64)
    x, y = tl.load(x_ptr + index), tl.load(y_ptr + index)
    tl.store(sum_ptr + index, x + y)
    tl.store(product_ptr + index, x * y)
    tl.store(negative_ptr + index, -x)
    tl.store(less_ptr + index, (x < y).to(tl.int32))


def test_bfloat16_arithmetic_and_comparison(device):
    x, y = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    results = [torch.empty_like(x) for _ in range(3)] + [torch.empty(64, dtype=torch.int32, device=device)]
    launch.launch(_arithmetic, (1,), device, x, y, *results)
    for ours, expected in zip(results, (x + y, x * y, -x, (x < y).int())):
        assert torch.equal(ours, expected)


@triton.jit
def _round(x_ptr, out_ptr, integer_ptr):
    index = tl.arange(0, 256)
    rounded = tl.load(x_ptr + index).to(tl.bfloat16)
    tl.store(out_ptr + index, rounded)
    tl.store(integer_ptr + index, rounded.to(tl.int32))


def test_float32_to_bfloat16_rounds_to_nearest_even(device):
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)) * 100
    # Ties to even in both directions, the largest value that rounds to infinity, a subnormal, infinities.
    x[:6] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.3961775e38, 1e-40, float("inf"), -float("inf")])
    out = torch.empty(256, dtype=torch.bfloat16, device=device)
    integer = torch.empty(256, dtype=torch.int32, device=device)
    launch.launch(_round, (1,), device, x.to(device), out, integer)
    assert torch.equal(out.cpu(), x.bfloat16())
    assert torch.equal(integer.cpu()[6:], x.bfloat16()[6:].int())


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr):
    index = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out_ptr + index, tl.dot(tl.load(a_ptr + index), tl.load(b_ptr + index)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_keeps_float32_products(dtype, device):
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    out = torch.empty(32, 32, device=device)
    launch.launch(_dot, (1,), device, a, b, out)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)


@triton.jit
def _reduce(x_ptr, sum_ptr, max_ptr):
    x = tl.load(x_ptr + tl.arange(0, 16)[:, None] * 4 + tl.arange(0, 4)[None, :])
    tl.store(sum_ptr + tl.arange(0, 16), tl.sum(x, 1))
    tl.store(max_ptr + tl.arange(0, 16), tl.max(x, 1))


def test_bfloat16_reductions(device):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    total, largest = torch.empty(2, 16, dtype=torch.bfloat16, device=device)
    launch.launch(_reduce, (1,), device, x, total, largest)
    assert torch.equal(largest, x.amax(1))
    torch.testing.assert_close(total.float(), x.float().sum(1), rtol=2**-7, atol=2**-7)


@triton.jit
def _loop(out_ptr, count):
    total = 0
    for _ in tl.range(0, tl.load(count)):  # a loop bound from memory: int() of a one-element array
        total += 1
    tl.store(out_ptr, total)


def test_loop_bounds_are_arrays_of_one_element(device):
    out, count = torch.zeros(1, dtype=torch.int32, device=device), torch.tensor([5], dtype=torch.int32, device=device)
    launch.launch(_loop, (1,), device, out, count)
    assert out.item() == 5


@triton.jit
def _logarithm(out_ptr):
    tl.store(out_ptr + tl.arange(0, 4), tl.log(tl.arange(0, 4).to(tl.float32)))


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_infinities_come_without_warnings(device):
    out = torch.empty(4, device=device)
    launch.launch(_logarithm, (1,), device, out)
    assert out[0] == -float("inf")


@triton.jit
def _offset(out_ptr, row, stride):
    tl.store(out_ptr, 1, mask=row * stride < 0)


def test_overflow_of_32_bits_raises(device):
    if not interpreting():
        pytest.skip("about the interpreter")
    out = torch.zeros(1, dtype=torch.int32)
    launch.launch(_offset, (1,), device, out, 2**10, 2**20)
    with pytest.raises(Exception, match="int32 overflow"):
        launch.launch(_offset, (1,), device, out, 2**11, 2**20)


def test_language_is_restored_after_a_launch(device):
    if not interpreting():
        pytest.skip("about the interpreter")
    before = tl.load, tl.core.load, tl.tensor.__add__
    launch.launch(_logarithm, (1,), device, torch.empty(4))
    assert (tl.load, tl.core.load, tl.tensor.__add__) == before
    interpreter.apply()  # a second time does nothing
    launch.launch(_logarithm, (1,), device, torch.empty(4))
