"""cross_entropy of csrc/cuda against float64, under the emulator or on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from fastformer.backends.cuda import _call, cross_entropy, emulation
from tests.cuda.orders import guarded_outputs, running
from tests.numerics import assert_close_to_fp64

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (5, 1),  # a single class: loss and gradient 0
    (3, 7),  # every row starts somewhere else: packs beyond both ends
    (37, 64),  # several rows to a warp, a last block with rows missing
    (9, 127),  # odd, several rows to a warp
    (6, 768),  # some threads hold fewer packs than others
    (3, 1023),  # several warps to a row that starts anywhere
    (2, 4099),  # many warps
    (2, 16400),  # too long for one block
]
IGNORE = -100


def name(shape):
    return "x".join(map(str, shape))


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    with guarded_outputs(monkeypatch, _call, cross_entropy):
        assert cross_entropy.empty_like(torch.zeros(1)).isnan()
        yield


def expected(logits, target, weight, smoothing, z_loss, dloss):
    """(loss, lse, dlogits, dprobabilities) by torch's own and autograd; the loss in float32 for half precision."""
    acc = logits.dtype if logits.dtype == torch.float64 else torch.float32
    z = logits.detach().cpu().requires_grad_()
    t = target.detach().cpu()
    if t.is_floating_point():
        t = t.to(z.dtype).requires_grad_()
    w = None if weight is None else weight.cpu().to(acc)
    lse = torch.logsumexp(z.to(acc), 1)
    soft = t.to(acc) if t.is_floating_point() else t
    loss = F.cross_entropy(
        z.to(acc), soft, w, reduction="none", label_smoothing=smoothing,
        **({} if t.is_floating_point() else {"ignore_index": IGNORE}),
    )  # fmt: skip
    counted = torch.ones_like(loss) if t.is_floating_point() else (t != IGNORE).to(acc)
    loss = loss + z_loss * lse**2 * counted
    wanted = (z, t) if t.is_floating_point() else (z,)
    gradients = torch.autograd.grad(loss, wanted, dloss.cpu().to(acc))
    return loss.detach(), lse.detach(), *gradients


def check(logits, target, weight=None, smoothing=0.0, z_loss=0.0, dloss=None):
    """Forward alone, forward with its gradient, and backward."""
    rows = len(logits)
    dloss = torch.full((), 0.3, device=logits.device).expand(rows) if dloss is None else dloss
    indices = None if target.is_floating_point() else target
    probabilities = target if target.is_floating_point() else None
    exact_target = target.double() if target.is_floating_point() else target
    exact = expected(logits.double(), exact_target, weight, smoothing, z_loss, dloss.double())
    same = expected(logits, target, weight, smoothing, z_loss, dloss)
    options = IGNORE, smoothing, z_loss

    dlogits = _call.empty_like(logits)
    outcomes = [
        cross_entropy.forward(logits, indices, weight, *options, probabilities),
        (*cross_entropy.forward(logits, indices, weight, *options, probabilities, dloss, dlogits), dlogits),
    ]
    if indices is None:
        gradients = cross_entropy.backward_probabilities(dloss, logits, target, weight, smoothing, z_loss)
    else:
        gradients = (cross_entropy.backward(dloss, logits, target, weight, outcomes[0][1], *options),)
    size = dloss.abs().max().item() * (1.0 if weight is None else weight.abs().max().item())
    for outcome in (*outcomes, (None, None, *gradients)):
        labels = ("loss", "lse", "dlogits", "dprobabilities")
        for label, ours, theirs, true in zip(labels, outcome, same, exact, strict=False):
            if ours is not None:
                assert_close_to_fp64(label, ours, theirs, true, scale=size if label == "dlogits" else 0.0)


def inputs(shape, dtype, device, probabilities=False, seed=0):
    torch.manual_seed(seed)
    rows, cols = shape
    logits = (torch.randn(shape) * 3).to(device, dtype)
    if probabilities:
        return logits, torch.softmax(torch.randn(shape), 1).to(device, dtype)
    target = torch.randint(cols, (rows,))
    target[1::4] = IGNORE
    return logits, target.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_class_indices(shape, dtype, device):
    check(*inputs(shape, dtype, device))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=name)
def test_everything_with_class_indices(shape, dtype, weighted, device):
    logits, target = inputs(shape, dtype, device)
    weight = torch.rand(shape[1], device=device) + 0.5 if weighted else None
    check(logits, target, weight, 0.1, 1e-3, torch.randn(shape[0], device=device))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=name)
def test_class_probabilities(shape, dtype, weighted, device):
    logits, target = inputs(shape, dtype, device, probabilities=True)
    weight = torch.rand(shape[1], device=device) + 0.5 if weighted else None
    check(logits, target, weight, 0.1 if weighted else 0.0, 1e-3, torch.randn(shape[0], device=device))


@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 16420), torch.bfloat16),  # two blocks
        ((2, 50257), torch.bfloat16),  # GPT-2: two, of rows that start anywhere
        ((1, 1 << 17), torch.float32),  # eight
        ((1, (1 << 17) + 1), torch.float32),  # sixteen, the last with little to do
    ],
    ids=str,
)
def test_clusters(shape, dtype, probabilities, hopper):
    check(*inputs(shape, dtype, hopper, probabilities))


@pytest.mark.parametrize("cols", [9, 1000, 16416])
def test_targets_out_of_range_and_weights(cols, device):
    """NaN in their own row only; a weight of the target without smoothing takes no other sum."""
    logits, target = inputs((4, cols), torch.float32, device)
    target[0], target[2] = cols, -1
    weight, dlogits = torch.rand(cols, device=device), _call.empty_like(logits)
    one = torch.ones(4, device=device)
    loss, lse = cross_entropy.forward(logits, target, weight, IGNORE, 0.0, 0.0, None, one, dlogits)
    again = cross_entropy.backward(one, logits, target, weight, lse, IGNORE, 0.0)
    for gradient in (dlogits, again):
        assert loss[[0, 2]].isnan().all() and gradient[[0, 2]].isnan().all()
        assert loss[1] == 0 and (gradient[1] == 0).all()
        assert gradient[3].isfinite().all()
    check(logits[3:], target[3:], weight)


@pytest.mark.parametrize("cols", [8, 33, 5000])
def test_a_large_offset_keeps_the_digits(cols, device):
    """Losses are differences of logits, not of their exponentials' logarithm and a logit of 3000."""
    logits, target = inputs((5, cols), torch.float32, device)
    logits += 3000
    exact = F.cross_entropy(logits.double(), target, reduction="none", ignore_index=IGNORE)
    smooth = F.cross_entropy(logits.double(), target, reduction="none", ignore_index=IGNORE, label_smoothing=0.2)
    for smoothing, true in ((0.0, exact), (0.2, smooth)):
        loss, _ = cross_entropy.forward(logits, target, None, IGNORE, smoothing)
        assert (loss.cpu().double() - true.cpu()).abs().max() <= 4e-6


@pytest.mark.parametrize("cols", [64, 1000, 16420])
def test_the_gradient_may_take_the_place_of_the_logits(cols, hopper):
    logits, target = inputs((4, cols), torch.bfloat16, hopper)
    one, dlogits = torch.ones(4), _call.empty_like(logits)
    cross_entropy.forward(logits, target, None, IGNORE, 0.1, 0.0, None, one, dlogits)
    cross_entropy.forward(logits, target, None, IGNORE, 0.1, 0.0, None, one, logits)
    assert torch.equal(logits, dlogits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, -0.37])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 1641)], ids=name)
def test_scaling_a_gradient(shape, factor, dtype, device):
    """In place, and from one element off the boundary as well."""
    torch.manual_seed(0)
    for offset in (0, 1):
        buffer = torch.randn(shape[0] * shape[1] + 20, dtype=torch.float32).to(device, dtype)
        gradient = buffer[8 + offset : 8 + offset + shape[0] * shape[1]].view(shape)
        before = buffer.clone()
        cross_entropy.scale(gradient, torch.tensor(factor, device=device, dtype=torch.float32))
        expected = before[8 + offset : 8 + offset + gradient.numel()].view(shape)
        rounded = torch.tensor(factor).to(dtype).float().to(device)
        torch.testing.assert_close(gradient, (expected.float() * rounded).to(dtype), rtol=0, atol=0)
        gradient.copy_(expected)
        assert torch.equal(buffer, before)  # nothing around it was touched


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "one element off"])
@pytest.mark.parametrize("stride", [96, 104, 101], ids=["dense", "padded", "odd"])
def test_strides_and_alignment(stride, offset, device):
    """Rows whose offsets from 16 bytes agree with the gradient's, and rows whose do not: one element at a time."""
    torch.manual_seed(1)
    logits = torch.randn(7 * stride + 8).to(device, torch.float16).as_strided((7, 96), (stride, 1), offset)
    _, target = inputs((7, 96), torch.float16, device)
    check(logits, target)
    probabilities = torch.rand(7 * stride + 8).to(device, torch.float16).as_strided((7, 96), (stride, 1), offset)
    check(logits, probabilities, None, 0.1)


@pytest.mark.parametrize("completion", ["at_once", "late"])
@pytest.mark.parametrize("order", emulation.ORDERS)
@pytest.mark.parametrize("cols", [50, 1500, 16421])
def test_any_order_of_threads(cols, order, completion, hopper):
    """Bit for bit what the first order gave: no result hangs on who runs first."""
    logits, target = inputs((3, cols), torch.bfloat16, hopper)
    weight = torch.rand(cols)

    def run():
        dlogits = _call.empty_like(logits)
        forward = cross_entropy.forward(logits, target, weight, IGNORE, 0.1, 1e-3, None, torch.ones(3), dlogits)
        return *forward, dlogits, cross_entropy.backward(torch.ones(3), logits, target, weight, forward[1], IGNORE, 0.1)

    first = run()
    with running(order, completion):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_no_rows(device):
    logits = torch.zeros(0, 5, device=device)
    loss, lse = cross_entropy.forward(logits, torch.zeros(0, dtype=torch.int64, device=device), None, IGNORE, 0.0)
    assert loss.shape == lse.shape == (0,)


def test_errors_name_the_argument(device):
    x = torch.zeros(2, 8, device=device)
    row, target = torch.zeros(2, device=device), torch.zeros(2, dtype=torch.int64, device=device)

    def call(x=x, target=target, loss=row, smoothing=0.0, probabilities=None, dloss=None, dlogits=None):
        _call.library().cross_entropy_forward(
            x, target, None, loss, row, IGNORE, smoothing, 0.0, probabilities, dloss, dlogits, 0
        )

    with pytest.raises(ValueError, match="rows, cols: 2 x 0"):
        call(x.as_strided((2, 0), (8, 1)))
    with pytest.raises(ValueError, match="target, probabilities: exactly one"):
        call(probabilities=x)
    with pytest.raises(ValueError, match=r"label_smoothing: 1\.5"):
        call(smoothing=1.5)
    with pytest.raises(ValueError, match="loss, lse: must not be NULL"):
        call(loss=None)
    with pytest.raises(ValueError, match="dloss: must not be NULL beside dlogits"):
        call(dlogits=x)
    with pytest.raises(NotImplementedError, match="float64 has no CUDA kernel"):
        call(x.double())
