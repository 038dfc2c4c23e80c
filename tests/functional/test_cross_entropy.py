"""cross_entropy beyond class indices: probabilities, the z-loss, and the gradient written in the forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as TF

import fastformer
from fastformer import _C
from fastformer import functional as F
from fastformer.backends.cpu import cross_entropy as cpu
from tests.nn.comparison import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = ["cpu", "reference"]
SHAPES = [
    (1, 1),  # nothing to choose
    (6, 7),  # a tail only
    (40, 130),  # whole vectors and a tail, several rows at once
    (3, 5000),  # several chunks of partial sums
    (9, 20011),  # cut into parts over threads
]


def plain(logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, z_loss: float, reduction: str):
    """torch's own loss with the z-loss added, in the dtype of ``logits``."""
    loss = TF.cross_entropy(logits, target, weight, reduction="none", label_smoothing=smoothing)
    indices = not target.is_floating_point()
    counted = target != -100 if indices else torch.ones(len(logits), dtype=torch.bool)
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(logits, 1) ** 2 * counted
    if reduction == "none":
        return loss
    total = counted.sum() if weight is None or not indices else weight[target.where(counted, 0)][counted].sum()
    return loss.sum() / (total if indices else len(logits)) if reduction == "mean" else loss.sum()


def inputs(shape, dtype, probabilities: bool):
    g = torch.Generator().manual_seed(2)
    logits = (torch.randn(shape, generator=g) * 3).to(dtype)
    weight = torch.rand(shape[1], generator=g).to(dtype) + 0.1
    if probabilities:
        return logits, torch.randn(shape, generator=g).softmax(1).to(dtype), weight
    target = torch.randint(0, shape[1], shape[:1], generator=g)
    target[1::5] = -100
    return logits, target, weight


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
def test_loss_and_gradients(probabilities, shape, dtype, backend):
    logits, target, weight = inputs(shape, dtype, probabilities)

    def run(function, dtype, reduction, options, upstream):
        leaves = [logits.detach().to(dtype).requires_grad_()]
        if probabilities and options[3]:
            leaves.append(target.to(dtype).requires_grad_())
        t = leaves[1] if len(leaves) > 1 else target.to(dtype) if probabilities else target
        w = weight.to(dtype) if options[0] else None
        loss = function(leaves[0], t, w, options[1], options[2], reduction)
        scale = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).view(loss.shape) * upstream
        return [loss.detach(), *torch.autograd.grad(loss, leaves, scale.to(dtype))]

    def ours(logits, target, weight, smoothing, z_loss, reduction):
        return F.cross_entropy(logits, target, weight, label_smoothing=smoothing, z_loss=z_loss, reduction=reduction)

    for reduction in ("none", "sum", "mean"):
        # weights, label smoothing, z-loss, gradient of the probabilities
        for options in (
            (False, 0.0, 0.0, False),
            (True, 0.2, 0.0, False),
            (False, 0.1, 1e-2, True),
            (True, 0, 0, True),
        ):
            for upstream in (1.0, 2.0):  # 0.5 from linspace: a factor other than 1, and 1
                same = run(plain, dtype, reduction, options, upstream)
                exact = run(plain, torch.float64, reduction, options, upstream)
                with fastformer.backend(backend):
                    mine = run(ours, dtype, reduction, options, upstream)
                for what, *results in zip(("loss", "dlogits", "dprobabilities"), mine, same, exact, strict=False):
                    assert_as_accurate(f"{what} {reduction} {options}", *results)


def test_shapes_with_classes_in_the_middle_and_mixed_dtypes():
    logits, q = torch.randn(2, 7, 3, 4, requires_grad=True), torch.rand(2, 7, 3, 4, requires_grad=True)
    for reduction in ("none", "mean", "sum"):
        ours, theirs = (f(logits, q, reduction=reduction) for f in (F.cross_entropy, TF.cross_entropy))
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(*(torch.autograd.grad(x.square().sum(), (logits, q)) for x in (ours, theirs))):
            torch.testing.assert_close(a, b)
    one = F.cross_entropy(logits[0, :, 0, 0], q[0, :, 0, 0])
    torch.testing.assert_close(one, TF.cross_entropy(logits[0, :, 0, 0], q[0, :, 0, 0]))
    low = F.cross_entropy(logits.bfloat16(), q)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, TF.cross_entropy(logits.bfloat16().float(), q))


class Saved:
    """The tensors autograd keeps between the passes."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: self.tensors.append(t) or t, lambda t: t)
        self.hooks.__enter__()
        return self.tensors

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def test_the_mean_keeps_its_gradient_and_not_the_logits():
    x, target = torch.randn(50, 300, requires_grad=True), torch.randint(0, 300, (50,))
    logits = x * 1.0
    with Saved() as saved:
        loss = F.cross_entropy(logits, target)
    assert len(saved) == 1 and saved[0].shape == logits.shape and saved[0].data_ptr() != logits.data_ptr()
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.data_ptr() == saved[0].data_ptr()  # as it is, where nothing scales it
    with Saved() as saved:
        loss = F.cross_entropy(logits, target)
    (scaled,) = torch.autograd.grad(0.5 * loss, logits)
    assert scaled.data_ptr() == saved[0].data_ptr()  # in place
    torch.testing.assert_close(scaled, 0.5 * grad)


def test_what_cannot_be_written_in_forward_keeps_the_logits():
    x, indices = torch.randn(5, 30, requires_grad=True), torch.randint(0, 30, (5,))
    q = torch.rand(5, 30, requires_grad=True)
    for logits, target, reduction in (
        (x, indices, "none"),  # dloss may be anything
        (x.detach().half().requires_grad_(), indices, "mean"),  # dloss is what keeps small gradients from underflow
        (x, q, "mean"),  # the gradient of the probabilities is a second tensor of that size
    ):
        with Saved() as saved:
            F.cross_entropy(logits, target, reduction=reduction)
        assert logits.data_ptr() in [t.data_ptr() for t in saved]
    assert not cpu.gradient_in_forward(100, torch.float16) and cpu.gradient_in_forward(50257, torch.bfloat16)
    assert not cpu.gradient_in_forward(2**21, torch.float32)  # the row is gone from the cache before it is needed again


def test_loss_scaling_keeps_small_gradients_of_float16():
    logits = torch.full((4096, 64), -9.0, dtype=torch.float16)
    logits[:, 0] = 4.0
    logits.requires_grad_()
    loss = F.cross_entropy(logits, torch.zeros(4096, dtype=torch.int64))
    (grad,) = torch.autograd.grad(loss, logits, torch.tensor(65504.0, dtype=torch.float16))
    assert (grad[:, 1:] > 0).all()  # 2e-6 / 4096 alone would be nothing


def test_several_backward_passes_of_one_graph():
    x, target = torch.randn(20, 30, requires_grad=True), torch.randint(0, 30, (20,))
    (wanted,) = torch.autograd.grad(TF.cross_entropy(x, target), x)
    loss = F.cross_entropy(x, target)
    for factor in (0.25, 0.0, 1.0, 3.0):
        (grad,) = torch.autograd.grad(loss, x, torch.tensor(factor), retain_graph=True)
        torch.testing.assert_close(grad, wanted * factor)
    (0.5 * loss).backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(x.grad, 1.5 * wanted)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_second_derivative_is_an_error():
    x = torch.randn(4, 5, requires_grad=True)
    for reduction in ("mean", "none"):
        loss = F.cross_entropy(x, torch.zeros(4, dtype=torch.int64), reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@pytest.mark.parametrize("shape", [(3, 50257), (700, 130), (9, 20011)], ids=str)
@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_the_gradient_may_be_written_over_the_logits(shape, threads, dtype):
    logits, target, weight = inputs(shape, dtype, False)
    target[0] = shape[1] - 1  # in the last part
    weight, before = weight.float(), torch.get_num_threads()
    loss, lse, dloss = (torch.ones(shape[0]) for _ in range(3))
    try:
        torch.set_num_threads(threads)
        for smoothing in (0.0, 0.1):
            wanted, over = torch.empty_like(logits), logits.clone()
            arguments = (-100, smoothing, 1e-3, None, dloss)
            _C.cross_entropy_forward(logits, target, weight, loss, lse, *arguments, wanted)
            _C.cross_entropy_forward(over, target, weight, loss, lse, *arguments, over)
            assert torch.equal(over, wanted)
            over = logits.clone()
            _C.cross_entropy_backward(dloss, logits, target, weight, lse, wanted, -100, smoothing, 1e-3)
            _C.cross_entropy_backward(dloss, over, target, weight, lse, over, -100, smoothing, 1e-3)
            assert torch.equal(over, wanted)
    finally:
        torch.set_num_threads(before)


def test_a_target_out_of_range_is_found_before_anything_is_written():
    logits, dloss = torch.randn(4, 5), torch.ones(4)
    dlogits = torch.full_like(logits, 7.0)
    for target in (torch.tensor([0, 1, 5, 2]), torch.tensor([0, -1, 2, 2])):
        with pytest.raises(IndexError, match="target: row"):
            cpu.forward(logits, target, None, -100, 0.0, dloss=dloss, dlogits=dlogits)
        with pytest.raises(IndexError, match="target: row"):
            F.cross_entropy(logits.requires_grad_(), target, torch.ones(5))
    assert (dlogits == 7).all()


def test_ignored_rows_are_not_read():
    logits = torch.randn(6, 40)
    logits[[1, 3]] = float("nan")
    logits.requires_grad_()
    target = torch.tensor([0, -100, 5, -100, 39, 7])
    loss = F.cross_entropy(logits, target, z_loss=0.1)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and (grad[[1, 3]] == 0).all() and grad.isfinite().all()


def test_compiles_and_passes_torchs_own_checks():
    x, q = torch.randn(4, 9, requires_grad=True), torch.rand(4, 9, requires_grad=True)
    target, weight = torch.tensor([1, 8, -100, 0]), torch.rand(9)

    def function(x, q):
        loss = F.cross_entropy(x, target, weight, label_smoothing=0.1, z_loss=0.01)
        return loss + F.cross_entropy(x, q, label_smoothing=0.1, z_loss=0.01, reduction="sum")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, wanted in zip(*(torch.autograd.grad(f(x, q), (x, q)) for f in (compiled, function)), strict=True):
        torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(
        torch.func.grad(function)(x.detach(), q.detach()), torch.autograd.grad(function(x, q), x)[0]
    )
    op = torch.ops.fastformer
    torch.library.opcheck(op.cross_entropy.default, (x, None, q, weight, -100, 0.1, 0.01))
    lse, p = torch.logsumexp(x.detach(), 1), q.detach()
    arguments = (torch.ones(4), x.detach(), None, p, weight, lse, -100, 0.1, 0.01)
    torch.library.opcheck(op.cross_entropy_backward.default, arguments)


def test_bad_z_loss():
    with pytest.raises(ValueError, match=r"z_loss: -1\.0 is negative"):
        F.cross_entropy(torch.randn(2, 3), torch.zeros(2, dtype=torch.int64), z_loss=-1.0)
