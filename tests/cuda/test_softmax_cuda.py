"""softmax and log_softmax of csrc/cuda against float64, under the emulator or on a GPU."""

import pytest
import torch

from fastformer.backends.cuda import _call, emulation, softmax
from tests.cuda.orders import guarded_outputs, running
from tests.numerics import assert_close_to_fp64

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (5, 1),  # a single column: always 1
    (3, 7),  # every row starts somewhere else: packs beyond both ends
    (37, 64),  # several rows to a warp, a last block with rows missing
    (9, 127),  # odd, several rows to a warp
    (6, 768),  # some threads hold fewer packs than others
    (3, 1023),  # several warps to a row that starts anywhere
    (2, 4099),  # many warps
    (2, 16400),  # too long for one block
    (0, 16),  # no rows
]


def name(shape):
    return "x".join(map(str, shape))


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    with guarded_outputs(monkeypatch, _call):
        assert softmax.empty_like(torch.zeros(1)).isnan()
        yield


def visible_of(shape, cols, mask, causal):
    visible = torch.ones(*shape, cols, dtype=torch.bool) if mask is None else mask.expand(*shape, cols).cpu()
    if causal:
        visible = visible & torch.ones(shape[2], cols, dtype=torch.bool).tril(cols - shape[2])
    return visible.reshape(-1, cols)


def expected(x, dout, scale, log, mask, bias, shape, causal):
    """(out, dx) with autograd, in the dtype of x. What takes no part is 0 (-inf), without a gradient."""
    x = x.detach().cpu().requires_grad_()
    rows, cols = x.shape
    z = x * scale
    if shape is not None:
        if bias is not None:
            z = z + bias.cpu().to(x.dtype).expand(*shape, cols).reshape(rows, cols)
        visible = visible_of(shape, cols, mask, causal)
        z = torch.where(visible, z, float("-inf"))
        some = visible.any(1, keepdim=True)
        out = (torch.log_softmax if log else torch.softmax)(torch.where(some, z, 0.0), 1)
        out = torch.where(some, out, float("-inf") if log else 0.0)
    else:
        out = (torch.log_softmax if log else torch.softmax)(z, 1)
    (dx,) = torch.autograd.grad(out, x, dout.cpu()) if x.numel() else (torch.zeros_like(x),)
    return out.detach(), dx


def check(x, dout, scale=1.0, log=False, mask=None, bias=None, shape=None, causal=False):
    out = softmax.forward(x, scale, log, mask, bias, shape, causal)
    dx = softmax.backward(dout, out, scale, log, mask, shape, causal)
    exact_bias = None if bias is None else bias.double()
    exact, exact_dx = expected(x.double(), dout.double(), scale, log, mask, exact_bias, shape, causal)
    same, same_dx = expected(x, dout, scale, log, mask, bias, shape, causal)
    assert_close_to_fp64("out", out, same, exact)
    size = dout.abs().max().item() * abs(scale) if dout.numel() else 0.0
    assert_close_to_fp64("dx", dx, same_dx, exact_dx, scale=size)
    return out, dx


def inputs(shape, dtype, device, seed=0):
    torch.manual_seed(seed)
    return [(torch.randn(shape) * 3).to(device, dtype) for _ in range(2)]


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_softmax(shape, dtype, log, device):
    check(*inputs(shape, dtype, device), 0.7, log)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 16416), torch.bfloat16),  # two blocks
        ((2, 33001), torch.float32),  # four, of rows that start anywhere
        ((1, 1 << 17), torch.bfloat16),
        ((1, (1 << 17) + 3), torch.float32),  # sixteen, the last with little to do
    ],
    ids=str,
)
def test_clusters(shape, dtype, log, hopper):
    check(*inputs(shape, dtype, hopper), 0.7, log)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_the_longest_rows(log, hopper):
    """One column more than 16 blocks hold: the path of every other card."""
    check(*inputs((1, 16 * 512 * 8 * 4 + 1), torch.float32, hopper), 1.0, log)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("case", ["mask", "keys", "queries", "bias", "float bias", "causal", "all", "wide"])
@pytest.mark.parametrize("cols", [24, 65])
def test_masks(cols, case, log, device):
    torch.manual_seed(1)
    shape, dtype = (2, 3, 5), torch.bfloat16
    x, dout = inputs((30, cols), dtype, device)
    mask = bias = None
    causal = case in ("causal", "all")
    if case in ("mask", "all"):
        mask = torch.rand(2, 1, 5, cols) > 0.4
        mask[1, :, 2] = False  # rows without any element
    if case == "keys":
        mask = torch.rand(2, 1, 1, cols) > 0.4
    if case == "queries":
        mask = torch.rand(2, 3, 5, 1) > 0.4
    if case in ("bias", "all"):
        bias = torch.randn(1, 3, 5, cols).to(dtype)
    if case == "float bias":
        bias = torch.randn(2, 1, 1, 1)
    if case == "wide":  # more queries than keys under causal: the first see nothing
        shape, causal = (1, 1, 30), True
        x, dout = inputs((30, 17), dtype, device)
    views = [None if t is None else t.to(device).expand(*shape, x.shape[1]) for t in (mask, bias)]
    check(x, dout, 0.3, log, *views, shape, causal)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("hidden", ["half", "all"])
def test_masked_rows_in_clusters(hidden, log, hopper):
    """Whole blocks of a cluster see nothing, or all of them."""
    x, dout = inputs((2, 16416), torch.bfloat16, hopper)
    mask = torch.zeros(1, 1, 2, 16416, dtype=torch.bool)
    mask[0, 0, 0, 9000:] = True
    if hidden == "half":
        mask[0, 0, 1, 100:200] = True
    check(x, dout, 1.0, log, mask, None, (1, 1, 2))


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("cols", [9, 70, 5000])
def test_infinities_without_a_mask(cols, log, device):
    """-inf among the scores is torch's business as well; a row of nothing else gives zeros, +inf gives NaN."""
    x, dout = inputs((4, cols), torch.float32, device)
    x[0, ::2] = x[1] = float("-inf")
    x[2, 3] = float("inf")
    x[3, 5] = float("nan")
    out = softmax.forward(x, 1.0, log)
    dx = softmax.backward(dout, out, 1.0, log)
    exact, exact_dx = expected(x.double(), dout.double(), 1.0, log, None, None, None, False)
    assert (out[1] == (float("-inf") if log else 0.0)).all() and (dx[1] == 0).all()
    assert out[2:].isnan().all() and exact[2:].isnan().all()
    torch.testing.assert_close(out[0].cpu(), exact[0].float())
    torch.testing.assert_close(dx[0].cpu(), exact_dx[0].float())


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "one element off"])
@pytest.mark.parametrize("stride", [96, 104, 101], ids=["dense", "padded", "odd"])
def test_strides_and_alignment(stride, offset, device):
    """Rows whose offsets from 16 bytes agree with the output's, and rows whose do not: one element at a time."""
    torch.manual_seed(1)
    x, dout = (
        torch.randn(7 * stride + 8).to(device, torch.float16).as_strided((7, 96), (stride, 1), offset) for _ in range(2)
    )
    for log in (False, True):
        check(x, dout, -1.5, log)


@pytest.mark.parametrize("completion", ["at_once", "late"])
@pytest.mark.parametrize("order", emulation.ORDERS)
@pytest.mark.parametrize("cols", [50, 1500, 16420])
def test_any_order_of_threads(cols, order, completion, hopper):
    """Bit for bit what the first order gave: no result hangs on who runs first."""
    x, dout = inputs((3, cols), torch.bfloat16, hopper)
    mask = torch.rand(1, 1, 3, cols) > 0.3

    def run():
        out = softmax.forward(x, 1.0, True, mask, None, (1, 1, 3), True)
        return out, softmax.backward(dout, out, 1.0, True, mask, (1, 1, 3), True)

    first = run()
    with running(order, completion):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_errors_name_the_argument(device):
    x = torch.zeros(6, 8, device=device)
    mask = torch.ones(1, 2, 3, 8, dtype=torch.bool, device=device)

    def call(x=x, out=x, mask=mask, bias=None, shape=(1, 2, 3)):
        _call.library().softmax_forward(x, out, 1.0, False, mask, bias, shape, False, 0)

    with pytest.raises(ValueError, match="out: must not be NULL"):
        call(out=None)
    with pytest.raises(ValueError, match="row_shape: 1 x 2 x 4 is not rows, 6"):
        call(shape=(1, 2, 4))
    with pytest.raises(ValueError, match="mask_stride: the last is 3"):
        call(mask=torch.ones(1, 2, 8, 3, dtype=torch.bool, device=device).transpose(2, 3))
    with pytest.raises(ValueError, match="bias_dtype: float16"):
        call(bias=torch.zeros(1, 2, 3, 8, dtype=torch.float16, device=device))
    with pytest.raises(NotImplementedError, match="float64 has no CUDA kernel"):
        call(x.double())
