"""linear_cross_entropy on Triton's interpreter (or a GPU): chunks, the padded buffer, the scaling without the host."""

import pytest
import torch
from torch.nn import functional as TF

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

import fastformer
from fastformer import functional as F
from fastformer.backends.triton import linear_cross_entropy
from tests.numerics import assert_close_to_fp64


def torchs(x, w, target, linear_bias=None, reduction="mean", label_smoothing=0.0):
    return TF.cross_entropy(TF.linear(x, w, linear_bias), target, reduction=reduction, label_smoothing=label_smoothing)


def run(function, tensors, target, upstream, dtype=None, **options):
    x, w, bias = (t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors)
    # In autograd's own thread for a device the choice of backend would not be seen.
    with torch.autograd.set_multithreading_enabled(False):
        loss = function(x, w, target, linear_bias=bias, **options)
        return [loss.detach(), *torch.autograd.grad(loss, (x, w, bias), upstream.to(loss.dtype).expand(loss.shape))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "shape, options",
    [
        ((5, 8, 2), {}),  # rows shorter than their padding
        ((70, 24, 65), {"reduction": "sum", "label_smoothing": 0.1}),  # two chunks, a column beyond a padded row
        ((270, 16, 70), {}),  # four chunks
        ((70, 24, 65), {"reduction": "none"}),
    ],
    ids=str,
)
def test_loss_and_gradients(shape, options, dtype, device):
    rows, features, classes = shape
    g = torch.Generator().manual_seed(6)
    make = lambda *s: torch.randn(*s, generator=g).to(device, dtype)  # noqa: E731
    tensors = make(rows, features), make(classes, features) / features**0.5, make(classes)
    target = ((torch.arange(rows) * 7919) % classes).to(device)
    target[1::5] = -100
    for upstream in (torch.tensor(1.0), torch.tensor(0.75)):
        upstream = upstream.to(device)
        exact = run(torchs, tensors, target, upstream, torch.float64, **options)
        same = run(torchs, tensors, target, upstream, **options)
        with fastformer.backend("triton"):
            ours = run(F.linear_cross_entropy, tensors, target, upstream, **options)
        for i, (o, s, e) in enumerate(zip(ours, same, exact, strict=True)):
            assert_close_to_fp64(f"result {i}", o, s, e, scale=1.0 / rows)


def test_rows_of_the_buffer_are_padded(device):
    for dtype, classes in ((torch.bfloat16, 50257), (torch.float32, 3)):
        x, w = torch.empty(9, 4, dtype=dtype, device=device), torch.empty(classes, 4, dtype=dtype, device=device)
        buffer = linear_cross_entropy.Padded(x, w, None).buffer()
        assert buffer.shape == (9, classes)
        assert buffer.stride(0) * dtype.itemsize % linear_cross_entropy.ROW_BYTES == 0


def test_a_target_out_of_range_is_nan(device):
    x, w = torch.randn(4, 8, device=device, requires_grad=True), torch.randn(5, 8, device=device, requires_grad=True)
    with fastformer.backend("triton"), torch.autograd.set_multithreading_enabled(False):
        loss = F.linear_cross_entropy(x, w, torch.tensor([0, 7, -1, 4], device=device), reduction="none")
        dx, dw = torch.autograd.grad(loss.sum(), (x, w))
    assert loss.isnan().tolist() == [False, True, True, False]
    assert dx.isnan().any(1).tolist() == [False, True, True, False] and dw.isnan().all()


def test_scaling(device):
    gradients = (torch.arange(5000.0, device=device), None, torch.ones(3, dtype=torch.bfloat16, device=device))
    scaled = linear_cross_entropy.scale(gradients, torch.tensor(0.5, device=device))
    assert scaled[0] is gradients[0] and scaled[1] is None
    assert torch.equal(scaled[0], torch.arange(5000.0, device=device) * 0.5) and (scaled[2] == 0.5).all()
    before = scaled[0].clone()
    assert torch.equal(linear_cross_entropy.scale(scaled, torch.tensor(1.0, device=device))[0], before)
