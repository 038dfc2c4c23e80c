"""linear_cross_entropy: values and gradients against float64 on each backend, chunk by chunk and through both doors.

torch in the same dtype, with all logits in memory, gives the allowance (tests/numerics.py).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as TF

import fastformer
from fastformer import functional as F
from fastformer.backends import chunks, matmul
from fastformer.backends.cpu import cross_entropy
from tests.numerics import assert_close_to_fp64

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = ["cpu", "reference"]

# (rows, features, classes)
SHAPES = [
    (0, 8, 5),  # no rows: the weight's gradient is zeros
    (1, 1, 1),  # one class: loss and gradients are zero
    (3, 7, 11),  # one chunk
    (70, 24, 300),  # a chunk of 64 rows and one of six
    (300, 33, 2049),  # four chunks; widened, a second block of one class
]
OPTIONS = {
    "plain": {},
    "bias": {"linear_bias": True},
    "bias, weights, smoothing": {"linear_bias": True, "weight": True, "label_smoothing": 0.2},
    "bias, z-loss": {"linear_bias": True, "z_loss": 1e-3},
}


def torchs(input, linear_weight, target, *, linear_bias=None, z_loss=0.0, ignore_index=-100, **options):
    """What it computes, in torch's operations."""
    logits = TF.linear(input, linear_weight, linear_bias)
    reduction = options.pop("reduction", "mean")
    loss = TF.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index, **options)
    counted = target != ignore_index
    if z_loss:
        loss = loss + torch.where(counted, z_loss * logits.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    weight = options.get("weight")
    return loss.sum() / (counted.sum() if weight is None else (weight[target.where(counted, 0)] * counted).sum())


def problem(shape, dtype, **options):
    rows, features, classes = shape
    g = torch.Generator().manual_seed(3)
    x, w = torch.randn(rows, features, generator=g), torch.randn(classes, features, generator=g) * 2 / features**0.5
    target = (torch.arange(rows) * 7919) % classes
    target[1::5] = -100
    options = dict(options)
    if options.get("linear_bias"):
        options["linear_bias"] = torch.randn(classes, generator=g).to(dtype)
    if options.get("weight"):
        options["weight"] = torch.rand(classes, generator=g).to(dtype)
    return x.to(dtype), w.to(dtype), target, options


def run(function, x, w, target, options, upstream=None, dtype=None) -> list[Tensor]:
    """Loss and gradients; ``dtype`` converts the tensors first."""
    convert = lambda t: t.detach().to(dtype or t.dtype)  # noqa: E731
    options = {k: convert(v) if isinstance(v, Tensor) else v for k, v in options.items()}
    leaves = [convert(t).requires_grad_() for t in (x, w)]
    if options.get("linear_bias") is not None:
        leaves.append(options["linear_bias"].requires_grad_())
    loss = function(*leaves[:2], target, **options)
    if upstream is None:
        upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]


def check(x, w, target, options, **more):
    wanted = run(torchs, x, w, target, options, dtype=torch.float64)
    same = run(torchs, x, w, target, options)
    ours = run(F.linear_cross_entropy, x, w, target, options, **more)
    # A gradient adds rows of p - 1, whose sum may be much smaller.
    scales = [0.0, w.abs().max().item(), x.abs().max().item() if len(x) else 0.0, 1.0]
    scales = [s if options.get("reduction") == "none" else s / max(len(x), 1) for s in scales]
    for i, (o, s, e) in enumerate(zip(ours, same, wanted, strict=True)):
        assert_close_to_fp64(f"result {i}", o, s, e, scale=scales[i])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients(shape, name, reduction, dtype, backend):
    if shape[0] == 0 and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("torch has no half-precision cross-entropy of nothing to compare with")
    x, w, target, options = problem(shape, dtype, **OPTIONS[name])
    with fastformer.backend(backend):
        check(x, w, target, options | {"reduction": reduction})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_with_and_without_products_of_its_own(reduction, multiplies, dtype, monkeypatch):
    monkeypatch.setattr(matmul, "CONVERTED", frozenset() if multiplies else frozenset({dtype}))
    x, w, target, options = problem((300, 33, 2049), dtype, linear_bias=True)
    check(x, w, target, options | {"reduction": reduction})


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "shape",
    [
        (5, 33),  # a tail beyond whole vectors
        (130, 1024),  # rows over two threads
        (1, 2**18),  # parts of a row over two threads: one may write what another still has to read
    ],
    ids=str,
)
def test_the_gradient_may_overwrite_the_logits(shape, dtype):
    logits = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    target = (torch.arange(shape[0]) * 7919 + 11) % shape[1]
    dloss, options = torch.full((), 0.5, dtype=acc).expand(shape[0]), (-100, 0.1, 1e-4)
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            apart, mine = torch.empty_like(logits), logits.clone()
            loss, _ = cross_entropy.forward(logits, target, None, *options, dloss=dloss, dlogits=apart)
            again, _ = cross_entropy.forward(mine, target, None, *options, dloss=dloss, dlogits=mine)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(loss, again) and torch.equal(apart, mine)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(DTYPES))
def test_chunks_are_a_quarter_of_the_rows(rows, dtype):
    size = chunks.chunk_rows(rows, 1000, dtype)
    assert 0 <= size <= rows and (size > 0) == (rows > 0)
    assert size <= max(chunks.MIN_ROWS, -(-rows // chunks.CHUNKS))
    if dtype.itemsize < 4:  # what a half-precision gradient is rounded
        assert rows <= size * chunks.CHUNKS
    else:
        assert size <= chunks.MAX_ROWS


def test_few_logits_are_one_chunk(monkeypatch):
    monkeypatch.setattr(chunks, "SMALL_LOGITS", 1 << 18)
    assert chunks.chunk_rows(768, 96, torch.float32) == 768 and chunks.chunk_rows(768, 50257, torch.float32) == 192
    x, w = torch.randn(300, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    target = torch.arange(300) % 40
    losses = [
        f(x, w)
        for f in (lambda x, w: F.linear_cross_entropy(x, w, target), lambda x, w: TF.cross_entropy(x @ w.t(), target))
    ]
    torch.testing.assert_close(*losses)
    for ours, theirs in zip(*(torch.autograd.grad(loss, (x, w)) for loss in losses), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_shape_and_stride(backend):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(6, 10, 9, generator=g).transpose(0, 1)[::2, :, :8]  # (5, 6, 8), nothing contiguous
    w = torch.randn(8, 40, generator=g).t()[::2]  # columns of a transposed table
    target = torch.randint(20, (6, 5), generator=g).t()
    for reduction in ("mean", "none"):
        options = {"reduction": reduction}
        flat = {"x": x.reshape(30, 8), "w": w.contiguous(), "target": target.reshape(30)}
        wanted = run(torchs, *flat.values(), options, None if reduction == "mean" else torch.ones(30))
        with fastformer.backend(backend):
            ours = run(F.linear_cross_entropy, x, w, target, options, None if reduction == "mean" else torch.ones(5, 6))
            one = F.linear_cross_entropy(x[1, 2], w, target[1, 2], **options)
        for o, t in zip(ours, wanted, strict=True):
            torch.testing.assert_close(o, t.view(o.shape))
        assert one.shape == ()
        torch.testing.assert_close(one, torchs(x[1, 2], w, target[1, 2]))


def test_a_transposed_weight_gets_its_gradient_in_its_own_layout():
    w = torch.randn(8, 30).t().requires_grad_()
    loss = F.linear_cross_entropy(torch.randn(5, 8), w, torch.arange(5))
    assert torch.autograd.grad(loss, w)[0].stride() == w.stride()


@pytest.mark.parametrize("wanted", ["input", "weight", "bias", "input and bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_some_inputs_only(reduction, wanted):
    x, w, target, options = problem((70, 24, 300), torch.float32, linear_bias=True)
    every = dict(zip(("input", "weight", "bias"), run(torchs, x, w, target, options, torch.ones(()))[1:]))
    if reduction == "none":
        every = {k: g * (target != -100).sum() for k, g in every.items()}
    leaves = {"input": x, "weight": w, "bias": options["linear_bias"].detach()}
    for name in wanted.split(" and "):
        leaves[name].requires_grad_()
    loss = F.linear_cross_entropy(x, w, target, linear_bias=leaves["bias"], reduction=reduction)
    for name, g in zip(
        wanted.split(" and "), torch.autograd.grad(loss.sum(), [t for t in leaves.values() if t.requires_grad])
    ):
        torch.testing.assert_close(g, every[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
def test_a_retained_graph_gives_the_gradients_again(dtype):
    x, w, target, _ = problem((70, 24, 300), dtype)
    x.requires_grad_(), w.requires_grad_()
    loss = F.linear_cross_entropy(x, w, target)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w), torch.full((), 3.0, dtype=dtype), retain_graph=True)
    third = torch.autograd.grad(loss, (x, w))
    for a, b, c in zip(first, second, third):
        assert torch.equal(a, c)
        rounding = torch.finfo(dtype).eps
        terms = 3 / len(x) * max(x.abs().max().item(), w.abs().max().item())  # of the sums that a gradient is
        torch.testing.assert_close(b, 3 * a, rtol=4 * rounding, atol=16 * rounding * terms)


def test_the_result_of_backward_is_not_copied():
    x, w = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    loss = F.linear_cross_entropy(x, w, torch.arange(5))
    written = [g.data_ptr() for g in loss.grad_fn.gradients[:2]]
    loss.backward()
    assert [x.grad.data_ptr(), w.grad.data_ptr()] == written


def test_float16_survives_a_mean_over_many_rows_under_a_loss_scale():
    # 1 / 4096 of p - onehot is below float16's smallest normal number for most classes: a loss scale is there for it.
    x, w, target, _ = problem((4096, 8, 20), torch.float16)
    scale = torch.tensor(2.0**13)
    check_scaled = [
        run(f, x, w, target, {}, scale, dtype)[1:]
        for f, dtype in ((F.linear_cross_entropy, None), (torchs, None), (torchs, torch.float64))
    ]
    for o, s, e in zip(*check_scaled, strict=True):
        assert_close_to_fp64("gradient", o, s, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_counted_target(backend):
    x, w = torch.randn(70, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    target = torch.full((70,), 4)
    with fastformer.backend(backend):
        assert F.linear_cross_entropy(x, w, target, ignore_index=4).isnan()  # torch's answer too: 0 / 0
        loss = F.linear_cross_entropy(x, w, target, ignore_index=4, reduction="sum")
        gradients = torch.autograd.grad(loss, (x, w))
    assert loss == 0 and not any(g.any() for g in gradients)


@pytest.mark.parametrize("row, value", [(0, 30), (69, -1)])  # the first chunk's first row, the last chunk's last
@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_target_out_of_range_is_found_first(row, value, with_gradients, monkeypatch):
    x, w = torch.randn(70, 8, requires_grad=with_gradients), torch.randn(30, 8)
    target = torch.zeros(70, dtype=torch.int64)
    target[row] = value
    monkeypatch.setattr(chunks, "run", lambda *a: pytest.fail("a chunk was computed"))
    with pytest.raises(IndexError, match=rf"target: row {row} is {value}, not in \[0, 30\)"):
        F.linear_cross_entropy(x, w, target)


def test_probabilities_and_several_positions_a_row():
    g = torch.Generator().manual_seed(4)
    x, w = torch.randn(6, 8, generator=g), torch.randn(5, 3, 2, 8, generator=g)
    logits = lambda x, w: torch.einsum("nf,cijf->ncij", x, w)  # noqa: E731
    target = torch.randint(5, (6, 3, 2), generator=g)
    soft = torch.rand(6, 5, 3, 2, generator=g).softmax(1)
    for t in (target, soft):
        ours = run(F.linear_cross_entropy, x, w, t, {"label_smoothing": 0.1})
        theirs = run(lambda x, w, t, **o: TF.cross_entropy(logits(x, w), t, **o), x, w, t, {"label_smoothing": 0.1})
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    many = torch.randn(2, 3, 8, generator=g), torch.rand(2, 3, 5, generator=g)
    ours = F.linear_cross_entropy(many[0], w[:, 0, 0], many[1], reduction="none")
    theirs = TF.cross_entropy((many[0] @ w[:, 0, 0].t()).transpose(1, 2), many[1].transpose(1, 2), reduction="none")
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    shapes = [(6, 4), (5, 4), (5,)]
    target = torch.tensor([1, -100, 4, 0, 0, 2])

    def function(x, w, b):
        return F.linear_cross_entropy(
            x,
            w,
            target,
            linear_bias=b,
            reduction=reduction,
            label_smoothing=0.1,
            z_loss=0.01,
            weight=torch.arange(1.0, 6.0),
        )

    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(function, tensors)


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 4, requires_grad=True)
    loss = F.linear_cross_entropy(x, torch.randn(5, 4), torch.arange(3))
    (gradient,) = torch.autograd.grad(loss.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_repeats_bit_for_bit():
    x, w, target, options = problem((300, 33, 2049), torch.bfloat16, linear_bias=True)
    for a, b in zip(*(run(F.linear_cross_entropy, x, w, target, options) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("enabled", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_autocast_is_torchs(enabled):
    x, w, target, options = problem((70, 24, 300), torch.float32, linear_bias=True)

    def function(f):
        def call(*args, **kwargs):
            with torch.autocast("cpu", dtype=enabled):
                return f(*args, **kwargs)

        return call

    wanted = run(torchs, x, w, target, options, dtype=torch.float64)
    ours, same = (run(function(f), x, w, target, options) for f in (F.linear_cross_entropy, torchs))
    for i, (o, s, e) in enumerate(zip(ours, same, wanted, strict=True)):
        assert_close_to_fp64(f"result {i}", o, s, e)


def _operator_calls():
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((6, 4), (5, 4), (5,)))
    target, dloss, weight = torch.tensor([1, -100, 4, 0, 0, 2]), torch.randn(6), torch.rand(5)
    p, q, r = (t.detach() for t in (x, w, b))
    op, numbers = torch.ops.fastformer, (-100, 0.1, 0.01)
    yield op.linear_cross_entropy, (x, w, b, target, weight, *numbers)
    yield op.linear_cross_entropy, (x, w, None, target, None, -100, 0.0, 0.0)
    yield op.linear_cross_entropy_backward, (dloss, p, q, r, target, weight, *numbers, [True, True, True])
    yield op.linear_cross_entropy_backward, (dloss, p, q, None, target, None, *numbers, [True, False, False])
    yield op.linear_cross_entropy_reduced, (torch.tensor(5.0), x, w, b, target, weight, *numbers, [True, True, True])
    yield op.linear_cross_entropy_reduced, (torch.tensor(5.0), x, w, None, target, None, *numbers, [True, True, False])


def test_operators_pass_torchs_own_checks():
    from fastformer.functional import _doors

    tried = set()
    for operator, arguments in _operator_calls():
        torch.library.opcheck(operator.default, arguments)
        tried.add(operator.__name__)
    assert tried == {name for name in _doors.operators if name.startswith("linear_cross_entropy")}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
def test_compiles_to_one_graph(dtype, reduction, dynamic):
    x, w, target, options = problem((70, 24, 300), dtype, linear_bias=True)
    options |= {"reduction": reduction, "label_smoothing": 0.1}
    torch.compiler.reset()
    compiled = torch.compile(F.linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for a, b in zip(*(run(f, x, w, target, options) for f in (compiled, F.linear_cross_entropy)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, w, target), F.linear_cross_entropy(x, w, target))


def test_torch_func_transforms():
    x, w, target = torch.randn(3, 6, 4), torch.randn(5, 4), torch.randint(5, (3, 6))

    def transform(f):
        return torch.func.vmap(torch.func.grad(lambda x, t: f(x, w, t)), (0, 0))(x, target)

    torch.testing.assert_close(transform(F.linear_cross_entropy), transform(torchs))


X, W, T, B = torch.randn(4, 6), torch.randn(5, 6), torch.tensor([0, 1, 2, 3]), torch.randn(5)
BAD = {
    "input: expected a torch.Tensor, got list": lambda: F.linear_cross_entropy([1.0], W, T),
    "input: expected .* got a scalar": lambda: F.linear_cross_entropy(X[0, 0], W, T),
    "linear_weight: 3 input features are not input's 6": lambda: F.linear_cross_entropy(X, W[:, :3], T),
    "linear_weight: dtype torch.float64 differs from input's": lambda: F.linear_cross_entropy(X, W.double(), T),
    r"linear_weight: shape \(0, 6\) is not": lambda: F.linear_cross_entropy(X, W[:0], T),
    r"linear_weight: shape \(6,\) is not": lambda: F.linear_cross_entropy(X, W[0], T),
    r"input: shape \(2, 2, 6\) is not \(N, in_features\)": lambda: F.linear_cross_entropy(
        X.view(2, 2, 6), W[:, None], T
    ),
    r"linear_bias: shape \(4,\) is not \(5,\)": lambda: F.linear_cross_entropy(X, W, T, linear_bias=B[:4]),
    "linear_bias: dtype torch.bfloat16 differs": lambda: F.linear_cross_entropy(X, W, T, linear_bias=B.bfloat16()),
    r"weight: shape \(4,\) is not \(5,\)": lambda: F.linear_cross_entropy(X, W, T, weight=B[:4]),
    "target: expected a torch.Tensor, got int": lambda: F.linear_cross_entropy(X, W, 3),
    "target: dtype torch.int32 is not int64": lambda: F.linear_cross_entropy(X, W, T.int()),
    r"target: indices of shape \(3,\) are not \(4,\)": lambda: F.linear_cross_entropy(X, W, T[:3]),
    r"target: probabilities of shape \(4, 6\) are not": lambda: F.linear_cross_entropy(X, W, X),
    "ignore_index: 3 beside a target of probabilities": lambda: F.linear_cross_entropy(X, W, X[:, :5], ignore_index=3),
    "reduction: 'men' is not one of .* did you mean 'mean'": lambda: F.linear_cross_entropy(X, W, T, reduction="men"),
    r"label_smoothing: 2 is not in \[0, 1\]": lambda: F.linear_cross_entropy(X, W, T, label_smoothing=2),
    "z_loss: -1 is not a number from 0 on": lambda: F.linear_cross_entropy(X, W, T, z_loss=-1),
    "z_loss: nan is not": lambda: F.linear_cross_entropy(X, W, T, z_loss=float("nan")),
    "linear_weight: is on meta, but input is on cpu": lambda: F.linear_cross_entropy(X, W.to("meta"), T),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()


def test_explain():
    meta = [t.to("meta") for t in (X, W, T)]
    assert (
        fastformer.explain("linear_cross_entropy", X, W, T, weight=B, label_smoothing=0.1, z_loss=0.1).backend == "cpu"
    )
    assert fastformer.explain("linear_cross_entropy", *meta).backend == "reference"
