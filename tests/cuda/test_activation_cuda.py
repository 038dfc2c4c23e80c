"""The activation of csrc/cuda against float64, under the emulator or on a GPU."""

from functools import partial

import pytest
import torch

from fastformer.backends.cuda import _call, activation, emulation
from tests import op_checks
from tests.cuda.orders import guarded_outputs, running

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("relu", "gelu", "gelu_tanh", "silu")
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
check_activation = partial(op_checks.check_activation, activation)


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    with guarded_outputs(monkeypatch, _call, activation):
        assert activation.empty_like(torch.zeros(1)).isnan()
        yield


@pytest.fixture
def normal(device):
    """Returns a function that gives normally distributed tensors, the same in every run."""
    generator = torch.Generator().manual_seed(1234)
    return lambda dtype, *shape: torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_activation(normal, dtype, kind, device):
    """In packs: alone, which is one line of memory that ends inside a pack, and with a bias, whose rows are apart."""
    x, dout = normal(dtype, 37, 27) * 2, normal(dtype, 37, 27)
    check_activation(x, None, None, None, dout, kind)
    x, dout, bias = normal(dtype, 70, 64) * 2, normal(dtype, 70, 64), normal(dtype, 64)
    check_activation(x, bias, None, None, dout, kind)


@every_dtype
@pytest.mark.parametrize(
    "shape",
    [
        (5, 1),  # a single column
        (9, 127),  # one element at a time, with lanes to spare
        (130, 40),  # several rows to a warp, a last pass with rows missing
        (3, 2056),  # several blocks along a row, the last nearly empty
        (0, 16),  # no rows: nothing but zeros in the biases' gradients
    ],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_gate_and_biases_and_dropout(normal, dtype, shape, device):
    x, up, dout = (normal(dtype, *shape) for _ in range(3))
    bias, up_bias = normal(dtype, shape[1]), normal(dtype, shape[1])
    check_activation(x, bias, up, up_bias, dout, "silu", 0.4, 2**40 + 3)
    check_activation(x, None, up, None, dout, "gelu")


@pytest.mark.parametrize("kind", KINDS)
def test_far_from_zero(normal, kind, device):
    """Both tails, out = x and out = 0 with slopes 1 and 0; NaN passes."""
    x, dout = normal(torch.float32, 7, 64) * 30, normal(torch.float32, 7, 64)
    x[0, :6] = torch.tensor([0.0, -0.0, 1e5, -1e5, 3e38, -3e38])
    check_activation(x, None, None, None, dout, kind)
    x[1, 1] = float("nan")
    assert activation.forward(x, None, None, None, kind).isnan().nonzero().tolist() == [[1, 1]]
    assert activation.backward(dout, x, None, None, None, kind)[0][1, 1].isnan() or kind == "relu"


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "one element off"])
@pytest.mark.parametrize("stride", [96, 104, 101], ids=["dense", "padded", "odd"])
def test_strides_and_alignment(normal, stride, offset, device):
    """One line off by the same amount everywhere, rows on packs, and what goes one element at a time."""
    x, dout = (normal(torch.float16, 7 * stride + 8).as_strided((7, 96), (stride, 1), offset) for _ in range(2))
    check_activation(x, None, None, None, dout, "relu")
    check_activation(x, normal(torch.float16, 96), None, None, dout, "relu")
    if stride == 96:
        out = torch.zeros(7 * 96 + 8, dtype=torch.float16, device=device)
        line = out[offset : offset + 7 * 96].view(7, 96)
        activation.forward(x, None, None, None, "relu", out=line)
        assert torch.equal(line, x.relu()) and not out[:offset].any() and not out[offset + 7 * 96 :].any()


@every_dtype
def test_in_place_on_halves_of_one_tensor(normal, dtype, device):
    """A gated feed-forward's first matmul gives both factors side by side; gradients replace them."""
    both, dout = normal(dtype, 70, 2 * 40), normal(dtype, 70, 40)
    apart = both[:, :40].contiguous(), None, both[:, 40:].contiguous(), None, "silu"
    wanted, (dx, dup, *_) = activation.forward(*apart), activation.backward(dout, *apart)
    x, up, again = both[:, :40], both[:, 40:], torch.empty_like(wanted)
    assert activation.backward(dout, x, None, up, None, "silu", dx=x, dup=up, out=again)[0] is x
    assert torch.equal(both, torch.cat([dx, dup], 1)) and torch.equal(again, wanted)
    x.copy_(apart[0]), up.copy_(apart[2])
    activation.forward(x, None, up, None, "silu", out=x)
    assert torch.equal(x, wanted) and torch.equal(up, apart[2])


@pytest.mark.parametrize("count", [1, 40])
def test_any_number_of_multiprocessors(normal, count, device):
    """One strip that walks down all rows, and as many as there are tiles: the sums agree with float64 either way."""
    if device != "cpu":
        pytest.skip("a GPU has the multiprocessors it has")
    x, up, dout = (normal(torch.bfloat16, 200, 520) for _ in range(3))
    _call.library().set_multiprocessors(count)
    try:
        check_activation(x, normal(torch.bfloat16, 520), up, normal(torch.bfloat16, 520), dout, "gelu_tanh", 0.1)
    finally:
        _call.library().set_multiprocessors(3)


@pytest.mark.parametrize("cols", [40, 33])
def test_any_order_of_threads(normal, cols, device):
    """Bit for bit what the first order gave, and what the same call gives once more."""
    x, up, dout = (normal(torch.bfloat16, 70, cols) for _ in range(3))
    bias, up_bias = normal(torch.bfloat16, cols), normal(torch.bfloat16, cols)

    def run():
        out = activation.forward(x, bias, up, up_bias, "gelu", 0.3, 9)
        return out, *activation.backward(dout, x, bias, up, up_bias, "gelu", 0.3, 9, True, True)

    first = run()
    for order in emulation.ORDERS if device == "cpu" else ("forward",):
        with running(order, "at_once"):
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True)), order


def test_errors_name_the_argument(device):
    x = torch.zeros(6, 8, device=device)

    def call(x=x, out=x, up=None, up_bias=None, kind="relu", p=0.0):
        _call.library().activation_forward(x, None, up, up_bias, out, kind, p, 0, 0)

    def call_backward(dx=x, dbias=None, workspace=None):
        _call.library().activation_backward(
            x, x, None, None, None, dx, None, dbias, None, None, "relu", 0.0, 0, workspace, 0
        )

    with pytest.raises(ValueError, match="out: must not be NULL"):
        call(out=None)
    with pytest.raises(ValueError, match="up_bias: needs up"):
        call(up_bias=x[0])
    with pytest.raises(ValueError, match="activation: tanh"):
        call(kind="tanh")
    with pytest.raises(ValueError, match=r"dropout_p: 1.5 is not in \[0, 1\]"):
        call(p=1.5)
    with pytest.raises(NotImplementedError, match="float64 has no CUDA kernel"):
        call(x.double())
    with pytest.raises(ValueError, match="dout, dx, dup: must not be NULL"):
        call_backward(dx=None)
    with pytest.raises(ValueError, match="workspace: must not be NULL when dbias"):
        call_backward(dbias=torch.zeros(8, device=device))
