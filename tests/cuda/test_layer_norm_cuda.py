"""layer_norm and add_layer_norm of csrc/cuda against float64, under the emulator or on a GPU."""

import pytest
import torch

from fastformer.backends.cuda import _call, add_layer_norm, emulation, layer_norm
from fastformer.backends.reference import add_layer_norm as add_reference
from fastformer.backends.reference import layer_norm as reference
from fastformer.backends.reference.philox import dropout_scales
from tests.cuda.orders import guarded_outputs

EPS = 1e-5
DTYPES = [  # data, parameters
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]
SHAPES = [
    (5, 1),  # a single column: variance zero
    (3, 7),  # less than one warp, no vector access
    (37, 64),  # the narrowest plan: four rows to a warp, a last block with rows missing
    (9, 128),  # two rows to a warp
    (7, 256),  # one pack per thread
    (6, 768),  # GPT-2: some threads hold fewer packs than others
    (2, 1000),  # a row ends inside a warp's packs
    (3, 1023),  # odd: one element at a time, several warps per row
    (2, 4096),  # many warps per row
    (2, 4099),  # too long for registers, one element at a time
    (2, 16416),  # forward too long for registers
    (4, 8200),  # backward too long for registers in half precision; more rows than blocks
    (0, 16),  # no rows
]
IDS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def name(value):
    return "-".join(IDS[d] for d in value) if isinstance(value[0], torch.dtype) else "x".join(map(str, value))


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    with guarded_outputs(monkeypatch, layer_norm, add_layer_norm):
        yield


def assert_as_good(ours, theirs, exact, what):
    """|ours - fp64| <= 2 |the reference in the same dtype - fp64| + one rounding of the largest value."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if ours.numel() == 0:
        return
    error, allowed = (ours.double() - exact).abs().max(), (theirs.double() - exact).abs().max()
    tiny = torch.finfo(ours.dtype).eps * exact.abs().max()
    assert error <= 2 * allowed + tiny, f"{what}: error {error:.3g}, the reference's {allowed:.3g}"


def inputs(shape, dtype, param_dtype, device, count, seed=0):
    torch.manual_seed(seed)
    rows, cols = shape
    tensors = [(torch.randn(rows, cols) * 2 + 0.5).to(dtype) for _ in range(count)]
    weight, bias = (torch.randn(cols).to(param_dtype) for _ in range(2))
    return [t.to(device) for t in (*tensors, weight, bias)]


def doubled(*tensors):
    return [None if t is None else t.double() for t in tensors]


def check_layer_norm(x, dout, weight, bias, param_dtype):
    out, mean, rstd = layer_norm.forward(x, weight, bias, EPS)
    exact = reference.forward(*doubled(x, weight, bias), EPS)
    theirs = reference.forward(x, weight, bias, EPS)
    for label, *three in zip(("out", "mean", "rstd"), (out, mean, rstd), theirs, exact, strict=True):
        assert_as_good(*three, label)

    needs = True, True, True
    gradients = layer_norm.backward(dout, x, weight, mean, rstd, *needs, param_dtype)
    theirs = reference.backward(dout, x, weight, *theirs[1:], *needs, param_dtype)
    exact = reference.backward(*doubled(dout, x, weight), *exact[1:], *needs, torch.float64)
    for label, *three in zip(("dx", "dweight", "dbias"), gradients, theirs, exact, strict=True):
        assert_as_good(*three, label)


def check_add_layer_norm(x, residual, dout, dsummed, weight, bias, p, param_dtype):
    seed = 0x123456789ABCDEF
    ours = add_layer_norm.forward(x, residual, weight, bias, EPS, p, seed)
    theirs = add_reference.forward(x, residual, weight, bias, EPS, p, seed)
    exact = add_reference.forward(*doubled(x, residual, weight, bias), EPS, p, seed)
    labels = "out", "summed", "mean", "rstd"
    for label, *three in zip(labels, ours, theirs, exact, strict=True):
        assert_as_good(*three, label)

    summed, mean, rstd = ours[1:]  # backward starts from the same saved values everywhere
    ours = add_layer_norm.backward(dout, dsummed, summed, weight, mean, rstd, p, seed, True, True, param_dtype)
    theirs = add_reference.backward(dout, dsummed, summed, weight, mean, rstd, p, seed, True, True, param_dtype)
    statistics = reference.forward(summed.double(), None, None, EPS)[1:]
    exact = add_reference.backward(
        *doubled(dout, dsummed, summed, weight), *statistics, p, seed, True, True, torch.float64
    )
    labels = "dx", "dresidual", "dweight", "dbias"
    for label, *three in zip(labels, ours, theirs, exact, strict=True):
        assert_as_good(*three, label)


@pytest.mark.parametrize("dtypes", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_layer_norm(shape, dtypes, device):
    x, dout, weight, bias = inputs(shape, *dtypes, device, 2)
    check_layer_norm(x, dout, weight, bias, dtypes[1])


@pytest.mark.parametrize("dtypes", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_add_layer_norm(shape, dtypes, device):
    *tensors, weight, bias = inputs(shape, *dtypes, device, 4)
    check_add_layer_norm(*tensors, weight, bias, 0.3, dtypes[1])


@pytest.mark.parametrize("order", emulation.ORDERS)
@pytest.mark.parametrize("cols", [64, 1024, 999, 16416])
def test_any_order_of_threads(cols, order, device):
    """Bit for bit what the first order gave: no result hangs on who runs first."""
    if device != "cpu":
        pytest.skip("a GPU chooses its own order")
    *tensors, weight, bias = inputs((11, cols), torch.bfloat16, torch.float32, device, 4)

    def run():
        forward = add_layer_norm.forward(tensors[0], tensors[1], weight, bias, EPS, 0.2, 7)
        backward = add_layer_norm.backward(
            tensors[2], tensors[3], *forward[1:2], weight, *forward[2:], 0.2, 7, True, True, torch.float32
        )
        return [*forward, *backward]

    expected = run()
    emulation.set_order(order)
    for ours, first in zip(run(), expected, strict=True):
        assert torch.equal(ours, first)


@pytest.mark.parametrize("count", [1, 2, 64])
def test_any_number_of_multiprocessors(count, device):
    """The persistent backward: one block for all rows, several rounds each, more blocks than there is work for."""
    if device != "cpu":
        pytest.skip("a GPU has as many as it has")
    x, dout, weight, bias = inputs((150, 64), torch.bfloat16, torch.bfloat16, device, 2)
    _call.library().set_multiprocessors(count)
    try:
        check_layer_norm(x, dout, weight, bias, torch.bfloat16)
    finally:
        _call.library().set_multiprocessors(3)


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("cols", [96, 97])
def test_optional_parameters(cols, has_weight, has_bias, device):
    x, dout, weight, bias = inputs((5, cols), torch.float32, torch.float32, device, 2)
    check_layer_norm(x, dout, weight if has_weight else None, bias if has_bias else None, torch.float32)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
@pytest.mark.parametrize("cols", [72, 8200])
def test_only_the_gradients_needed(cols, needs, device):
    x, dout, weight, _ = inputs((5, cols), torch.float16, torch.float16, device, 2)
    _, mean, rstd = reference.forward(x, weight, None, EPS)
    whole = layer_norm.backward(dout, x, weight, mean, rstd, True, True, True, torch.float16)
    some = layer_norm.backward(dout, x, weight, mean, rstd, *needs, torch.float16)
    for wanted, ours, full in zip(needs, some, whole, strict=True):
        assert (ours is None) != wanted
        assert ours is None or torch.equal(ours, full)


@pytest.mark.parametrize("with_dsummed", [True, False])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_no_dropout_and_all_dropped(p, with_dsummed, device):
    x, residual, dout, dsummed, weight, bias = inputs((6, 200), torch.bfloat16, torch.bfloat16, device, 4)
    check_add_layer_norm(x, residual, dout, dsummed if with_dsummed else None, weight, bias, p, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cols", [8, 40, 67, 1056, 16512])
def test_dropout_mask_is_the_one_of_every_backend(cols, dtype, device):
    """x = 1, residual = 0: what comes out is the mask itself, bit for bit, on the vector, scalar and long paths."""
    seed, rows, p = 2**63 + 12345, 5, 0.25
    x, zero = torch.ones(rows, cols, dtype=dtype, device=device), torch.zeros(rows, cols, dtype=dtype, device=device)
    _, summed, mean, rstd = add_layer_norm.forward(x, zero, None, None, EPS, p, seed)
    mask = dropout_scales(seed, rows, cols, p, torch.device("cpu"), torch.float32).to(dtype)
    assert torch.equal(summed.cpu(), mask)
    dx, dresidual, *_ = add_layer_norm.backward(zero, x, summed, None, mean, rstd, p, seed, False, False, dtype)
    assert torch.equal(dresidual.cpu(), x.cpu()) and torch.equal(dx.cpu(), mask)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "one element off"])
@pytest.mark.parametrize("stride", [96, 104, 101], ids=["dense", "padded", "odd"])
def test_strides_and_alignment(stride, offset, device):
    """Rows apart by more than their length, and rows that start where 16-byte access would fault."""
    rows, cols = 7, 96
    torch.manual_seed(1)

    def make():
        buffer = torch.randn(rows * stride + 8).to(device, torch.bfloat16)
        return buffer[offset : offset + rows * stride].as_strided((rows, cols), (stride, 1), offset)

    x, residual, dout, dsummed = (make() for _ in range(4))
    weight, bias = torch.randn(2, cols).to(device, torch.bfloat16).unbind()
    check_layer_norm(x, dout, weight, bias, torch.bfloat16)
    check_add_layer_norm(x, residual, dout, dsummed, weight, bias, 0.1, torch.bfloat16)


def test_large_mean_keeps_the_variance(device):
    """The two-pass variance: mean² - E[x²] would lose every digit here."""
    x, dout, weight, bias = inputs((3, 512), torch.float32, torch.float32, device, 2)
    check_layer_norm(x + 3000, dout, weight, bias, torch.float32)


def test_errors_name_the_argument(device):
    x = torch.zeros(2, 8, device=device)
    row = torch.zeros(2, device=device)

    def call(x=x, weight=None, out=x, mean=row, eps=EPS):
        _call.library().layer_norm_forward(x, weight, None, out, mean, row, eps, 0)

    with pytest.raises(ValueError, match=r"rows, cols: \d+ x 0"):
        call(x[:, :0])
    with pytest.raises(ValueError, match="x, mean, rstd"):
        call(mean=None)
    with pytest.raises(ValueError, match="out: must not be NULL"):
        call(out=None)
    with pytest.raises(ValueError, match="eps: -1"):
        call(eps=-1.0)
    with pytest.raises(ValueError, match="dtype: -1"):
        call(x.int())
    with pytest.raises(NotImplementedError, match="float64 has no CUDA kernel"):
        call(x.double())
    with pytest.raises(NotImplementedError, match="param_dtype: bfloat16 beside float32"):
        call(weight=x[0].bfloat16())
