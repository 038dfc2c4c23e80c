"""linear: PyTorch's own, through float32, or the kernel of a few rows; values and every gradient against float64."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch
from torch import Tensor
from torch.nn import functional as TF

import fastformer
from fastformer import functional as F
from fastformer import nn
from fastformer.backends import matmul
from fastformer.models.conv1d import Conv1D
from tests.nn.comparison import assert_as_accurate
from tests.numerics import assert_close_to_fp64

# What torch imports to compile and to check operators says so, once a process.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=["converted", "native"])
def cpu(request, monkeypatch):
    """A CPU without instructions for half precision, and one with them, whichever this is."""
    monkeypatch.setattr(matmul, "CONVERTED", frozenset(HALF if request.param == "converted" else []))
    return request.param


@pytest.fixture
def converted(cpu):
    if cpu == "native":
        pytest.skip("of the way through float32")


@pytest.fixture
def any_weight(monkeypatch):
    """float32's kernel of a few rows takes small weights too."""
    monkeypatch.setattr(matmul, "FEW_ROWS_FLOAT32_WEIGHT", 0)


def make(shape, dtype, transposed=False, bias=True, features=33):
    """Leaves input ``shape``, weight ``(features, shape[-1])``, bias."""
    g = torch.Generator().manual_seed(2)
    randn = lambda *s: torch.randn(s, generator=g)  # noqa: E731
    w = randn(shape[-1], features).t() if transposed else randn(features, shape[-1])
    return [randn(*shape).to(dtype), (w / max(shape[-1], 1) ** 0.5).to(dtype), *([randn(features).to(dtype)] * bias)]


def run(function, tensors, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    g = torch.Generator().manual_seed(3)
    upstream = torch.randn(out.shape, generator=g, dtype=torch.float64).to(tensors[0].dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def check(tensors, ours=F.linear):
    exact, same, mine = run(TF.linear, tensors, torch.float64), run(TF.linear, tensors), run(ours, tensors)
    for name, t, *results in zip(("out", "dinput", "dweight", "dbias"), [None, *tensors], mine, same, exact):
        assert_close_to_fp64(name, *results)
        if t is not None:
            same_order = results[0].stride() == t.stride() or min(t.shape) <= 1
            assert same_order, f"{name} lies as its tensor does"


SHAPES = [
    (70, 130),  # no multiple of any block or vector
    (2, 3, 20),  # a few rows, the kernel's; their gradients are not
    (16, 24),  # the most rows the kernel takes
    (17, 24),  # one more
    (50,),  # one row without a dimension
    (1, 1),
    (0, 24),  # no rows
    (4, 0, 24),
    (5, 0),  # nothing to add up
]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, transposed, bias, dtype, any_weight):
    tensors = make(shape, dtype, transposed, bias)
    check(tensors)
    with torch.no_grad():  # the kernel of a few rows on a CPU of either kind
        out, same = F.linear(*tensors), TF.linear(*tensors)
        assert_close_to_fp64("out without a gradient", out, same, TF.linear(*(t.double() for t in tensors)))


@pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_many_pieces_in_every_direction(transposed, dtype, converted, monkeypatch):
    monkeypatch.setattr(matmul, "PIECE", 300)
    monkeypatch.setattr(matmul, "DEPTH", 13)
    check(make((40, 70), dtype, transposed))


def test_the_pieces_are_bounded(converted):
    """And kept: a second product of the same sizes takes no new memory."""
    a, b = torch.ones(2000, 3000, dtype=torch.bfloat16), torch.ones(3000, 2500, dtype=torch.bfloat16)
    assert (matmul.mm(a, b) == 3000.0).all()
    buffers = dict(matmul._kept.buffers)
    assert all(0 < t.numel() <= matmul.PIECE for t in buffers.values())
    matmul.mm(a, b)
    assert all(matmul._kept.buffers[n] is t for n, t in buffers.items())


@pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d)[6:])
def test_any_strides(dtype):
    g = torch.Generator().manual_seed(1)
    whole = torch.randn(40, 60, generator=g).to(dtype)
    inputs = [whole[:, ::2], whole.t()[:, 5:35], whole[::3, 30:], whole[:1, :30].expand(20, 30), whole[:3, ::2]]
    weights = [whole[:, :30], whole.t()[:50:7, 10:], whole[:1, :1].expand(9, 30), whole[:21, ::2]]
    for x in inputs:
        for w in weights:
            exact = TF.linear(x.double(), w.double())
            assert_close_to_fp64(f"{x.stride()} {w.stride()}", F.linear(x, w), TF.linear(x, w), exact)
    # what a sum's gradient is: one element in place of all
    x, w = (t.clone().requires_grad_() for t in (inputs[0], weights[0]))
    F.linear(x, w).sum().backward()
    assert_close_to_fp64("dinput", x.grad, x.grad, weights[0].double().sum(0).expand(40, 30))


@pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d)[6:])
def test_products_into_memory_that_is_given(dtype):
    g = torch.Generator().manual_seed(1)
    for rows in (5, 40):
        a, b, start = (torch.randn(s, generator=g).to(dtype) for s in ((rows, 30), (30, 21), (rows, 21)))
        exact = a.double() @ b.double()
        for out in (torch.empty(rows, 21, dtype=dtype), torch.empty(21, rows, dtype=dtype).t()):
            assert matmul.mm(a, b, out) is out
            assert_close_to_fp64("mm", out, a @ b, exact)
            for bias in (start, start[0], start[:1], start[:, :1]):
                assert matmul.addmm(bias, a, b, out) is out
                assert_close_to_fp64(f"addmm {bias.shape}", out, torch.addmm(bias, a, b), exact + bias.double())
        total = start.clone()
        matmul.addmm(total, a, b, total)
        assert_close_to_fp64("in place", total, torch.addmm(start, a, b), exact + start.double())


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_a_row_alone_and_among_others(transposed, dtype, any_weight):
    """A prompt gives the same text alone and in a batch: few rows have the same bits, however many they are."""
    x, w, b = make((8, 100), dtype, transposed)
    together = F.linear(x, w, b)
    for rows in (1, 2, 3, 5):
        assert torch.equal(F.linear(x[:rows], w, b), together[:rows])


@pytest.mark.parametrize("wanted", range(3), ids=["input", "weight", "bias"])
def test_one_gradient_alone(wanted, converted):
    tensors = make((20, 24), torch.bfloat16)
    all_of_them = run(F.linear, tensors)[1:]
    tensors[wanted].requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = F.linear(*tensors)
    needed = [[tensors[1]], [tensors[0]], []][wanted]
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in needed], "what no gradient needs is not kept"
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    (gradient,) = torch.autograd.grad(out, tensors[wanted], upstream)
    assert torch.equal(gradient, all_of_them[wanted])


def test_second_derivatives(converted):
    def penalty(x, w, b):
        (dx,) = torch.autograd.grad(F.linear(x, w, b).square().sum(), x, create_graph=True)
        return dx.square().sum()

    def torchs(x, w, b):
        (dx,) = torch.autograd.grad(TF.linear(x, w, b).square().sum(), x, create_graph=True)
        return dx.square().sum()

    tensors = make((20, 24), torch.bfloat16)
    results = [run(torchs, tensors, torch.float64), run(torchs, tensors), run(penalty, tensors)]
    for exact, same, mine in zip(*results, strict=True):
        assert_as_accurate("second derivative", mine, same, exact)


def test_inference_mode_then_training(converted):
    """What is kept from call to call is usable in either."""
    matmul._kept.buffers.clear()
    tensors = make((40, 24), torch.bfloat16)
    with torch.inference_mode():
        F.linear(*tensors)
    check(tensors)


def test_threads_have_pieces_of_their_own(converted):
    problems = [make((60, 40 + i), torch.bfloat16, bias=False) for i in range(4)]
    expected = [F.linear(*p) for p in problems]
    wrong = []

    def work(i):
        for _ in range(30):
            if not torch.equal(F.linear(*problems[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rows", [3, 40])
def test_autocast(rows, dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["fastformer.functional.linear"], "CAST_ROWS", 1)
    monkeypatch.setattr(sys.modules["fastformer.functional.linear"], "CAST_PRODUCTS", 0)
    tensors = [t.requires_grad_() for t in make((rows, 24), torch.float32)]
    with torch.autocast("cpu", dtype=dtype):
        out = F.linear(*tensors)
    assert out.dtype == dtype
    halves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    same = F.linear(*halves)
    assert torch.equal(out, same)
    for gradient, wanted in zip(*(torch.autograd.grad(o.sum(), ts) for o, ts in ((out, tensors), (same, halves)))):
        assert gradient.dtype == torch.float32 and torch.equal(gradient, wanted.float())
    with torch.autocast("cpu", dtype=dtype):
        assert F.linear(*(t.double() for t in tensors)).dtype == torch.float64, "as torch's autocast"


@pytest.mark.parametrize(("rows", "pays"), [(3, False), (4, True), (64, True)])
def test_autocast_of_a_float32_weight_where_that_is_faster(rows, pays, converted, monkeypatch):
    """A few rows would pay for the cast of the whole weight, which PyTorch does once."""
    seen = []
    product = matmul.addmm
    monkeypatch.setattr(matmul, "addmm", lambda *a, **k: seen.append(1) or product(*a, **k))
    x, w, b = make((rows, 512), torch.float32, features=512)
    tiny = make((32, 24), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out, theirs = F.linear(x, w, b), TF.linear(x, w, b)
        assert len(seen) == pays
        assert torch.equal(F.linear(*tiny), TF.linear(*tiny)) and len(seen) == pays
    exact = TF.linear(*(t.bfloat16().double() for t in (x, w, b)))
    assert_close_to_fp64("out", out, theirs, exact)


ROWS_OF_FLOAT32 = [
    (1, 768),
    (2, 24),
    (3, 37),  # a group of three; no multiple of a vector
    (2, 2, 100),
    (5, 130),  # a group of four and one
    (8, 65),  # the most
    (9, 65),  # PyTorch's
]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", ROWS_OF_FLOAT32, ids=str)
def test_a_few_rows_of_float32(shape, transposed, bias, any_weight, monkeypatch):
    x, w, *b = make(shape, torch.float32, transposed, bias, features=131)
    b = b[0] if bias else None
    exact = TF.linear(x.double(), w.double(), None if b is None else b.double())
    same = TF.linear(x, w, b)
    few = x.shape[:-1].numel() <= 8
    assert fastformer.explain("linear", x, w, b).backend == ("cpu" if few else "torch")
    with monkeypatch.context() as without:
        if few:  # so that nothing here can be PyTorch's
            without.setattr(TF, "linear", None)
        assert_close_to_fp64("out", F.linear(x, w, b), same, exact)
    apart = torch.stack([x, x], -2).flatten(-2)[..., : x.shape[-1]]  # rows that do not follow each other
    assert not apart.is_contiguous() or x.shape[:-1].numel() == 1
    doubles = (apart.double(), w.double(), None if b is None else b.double())
    assert_close_to_fp64("strided rows", F.linear(apart, w, b), TF.linear(apart, w, b), TF.linear(*doubles))


def test_a_small_weight_of_float32_is_torchs():
    for features, backend in ((511, "torch"), (512, "cpu")):
        tensors = make((2, 512), torch.float32, features=features)
        explanation = fastformer.explain("linear", *tensors)
        assert explanation.backend == backend
        assert (backend == "cpu") != ("so small" in explanation.reasons["cpu"])


@pytest.mark.parametrize("wanted", range(3), ids=["input", "weight", "bias"])
def test_float32_with_a_gradient_is_torchs(wanted, any_weight):
    tensors = make((6, 24), torch.float32)
    assert fastformer.explain("linear", *tensors).backend == "cpu"
    tensors[wanted].requires_grad_()
    out = F.linear(*tensors)
    assert torch.equal(out, TF.linear(*tensors)) and "Addmm" in type(out.grad_fn).__name__
    assert fastformer.explain("linear", *tensors).backend == "torch"


def test_compile_and_export(converted):
    x, w, b = make((2, 20, 24), torch.bfloat16)
    torch._dynamo.reset()
    for function in (F.linear, torch.compile(F.linear, fullgraph=True)):
        results = run(function, (x, w, b))
        if function is F.linear:
            expected = results
    assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))
    module = nn.Linear(24, 33, dtype=torch.bfloat16)
    program = torch.export.export(module, (x,))
    assert torch.ops.fastformer.linear.default in [n.target for n in program.graph.nodes]
    assert torch.equal(program.module()(x), module(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(F.linear, fullgraph=True, backend="aot_eager")(*(t.float() for t in (x, w, b)))
    assert torch.equal(compiled, expected[0])


def test_what_is_compiled_on_a_cpu_with_instructions_is_torchs(cpu):
    if cpu == "converted":
        pytest.skip("of the other")
    module = nn.Linear(24, 33, dtype=torch.bfloat16)
    program = torch.export.export(module, (torch.randn(2, 24).bfloat16(),))
    assert torch.ops.fastformer.linear.default not in [n.target for n in program.graph.nodes]


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_opcheck(bias, transposed, converted):
    x, w, *b = (t.requires_grad_() for t in make((2, 20, 24), torch.bfloat16, transposed, bias))
    torch.library.opcheck(torch.ops.fastformer.linear.default, (x, w, *(b or [None])))


def test_transforms_of_torch_func(converted):
    x, w, b = make((5, 20, 24), torch.bfloat16)
    exact = [t.double() for t in (x, w, b)]
    per_sample = torch.func.vmap(torch.func.grad(lambda w, x: F.linear(x, w, b).float().square().sum()), (None, 0))
    torchs = torch.func.vmap(torch.func.grad(lambda w, x, b: TF.linear(x, w, b).square().sum()), (None, 0, None))
    assert_as_accurate("per sample", per_sample(w, x), torchs(w, x, b), torchs(exact[1], exact[0], exact[2]))
    out, tangent = torch.func.jvp(lambda x: F.linear(x, w, b), (x,), (x,))
    assert_as_accurate("value", out, TF.linear(x, w, b), TF.linear(*exact))
    assert_as_accurate("tangent", tangent, TF.linear(x, w), TF.linear(*exact[:2]))


def test_a_dispatch_mode_sees_the_operator(converted):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    tensors = make((20, 24), torch.bfloat16)
    with Watch():
        out = F.linear(*tensors)
    assert torch.ops.fastformer.linear.default in seen and torch.equal(out, F.linear(*tensors))


def test_what_is_not_ordinary_is_torchs():
    x, w, b = make((6, 24), torch.bfloat16)
    assert torch.equal(F.linear(x, w[0]), TF.linear(x, w[0])), "a weight of one dimension"
    assert torch.equal(F.linear(x, w, b[0]), TF.linear(x, w, b[0])), "a bias of one number"
    nested = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
    assert torch.equal(F.linear(nested, w, b).values(), TF.linear(nested, w, b).values())

    class Own(Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.calls += function is TF.linear
            return super().__torch_function__(function, types, args, kwargs or {})

    assert type(F.linear(x, w.as_subclass(Own), b)) is Own and Own.calls == 1
    meta = F.linear(x.to("meta"), w.to("meta"), b.to("meta"))
    assert meta.device.type == "meta" and meta.shape == (6, 33)
    with fastformer.backend("reference"):
        assert torch.equal(F.linear(x, w, b), TF.linear(x, w, b))
        assert fastformer.explain("linear", x, w, b).backend == "torch"


def test_explain(cpu, monkeypatch):
    x, w, b = make((40, 24), torch.bfloat16)
    few = fastformer.explain("linear", x[:2], w, b)
    assert few.backend == "cpu" and "a few rows" in few.reasons["cpu"]
    many = fastformer.explain("linear", x, w, b)
    trained = fastformer.explain("linear", x[:4].requires_grad_(), w, b)
    if cpu == "converted":
        assert many.backend == trained.backend == "cpu" and "no instructions for bfloat16" in many.reasons["cpu"]
    else:
        assert many.backend == trained.backend == "torch" and "more than a few rows" in many.reasons["cpu"]
        # Where the CPU multiplies bfloat16 itself, four rows are the kernel's only if the weight is out of the cache.
        assert fastformer.explain("linear", x[:4], w, b).backend == "torch"
        monkeypatch.setattr(matmul, "CACHED", 0)
        assert fastformer.explain("linear", x[:4], w, b).backend == "cpu"


LAYERS = {
    "FeedForward": (lambda: nn.FeedForward(24, 40), lambda m, x: m(x, residual=x)),
    "GatedFeedForward": (lambda: nn.GatedFeedForward(24, 40), lambda m, x: m(x)),
    "Linear": (lambda: nn.Linear(24, 33), lambda m, x: m(x)),
    "Conv1D": (lambda: Conv1D(33, 24), lambda m, x: m(x)),
    "attention": (lambda: nn.MultiheadAttention(24, 2), lambda m, x: m(x, x, x, need_weights=False)[0]),
    "attention with weights": (lambda: nn.MultiheadAttention(24, 2), lambda m, x: torch.cat(m(x, x, x), -1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_whose_matmuls_are_these(name, converted, monkeypatch):
    build, call = LAYERS[name]
    torch.manual_seed(5)
    ours = build().bfloat16()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(9, 9, 24).bfloat16()

    def results(module):
        names, parameters = zip(*module.named_parameters())
        like = next(module.parameters()).dtype
        found = run(
            lambda x, *p: call(lambda *a, **k: torch.func.functional_call(module, dict(zip(names, p)), a, k), x),
            [x.to(like), *(p.detach() for p in parameters)],
        )
        return dict(zip(("output", "input", *names), found, strict=True))

    monkeypatch.setattr(matmul, "CONVERTED", frozenset())
    exact, same = results(copy.deepcopy(ours).double()), results(ours)
    monkeypatch.setattr(matmul, "CONVERTED", frozenset(HALF))
    mine = results(ours)
    for what, wanted in exact.items():
        assert_as_accurate(f"{name}: {what}", mine[what], same[what], wanted)


X, W, B = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4)
BAD = {
    "input: expected a torch.Tensor, got list": ([1.0], W),
    "weight: expected a torch.Tensor, got float": (X, 1.0),
    "bias: expected a torch.Tensor, got int": (X, W, 1),
    r"input: shape \(2, 3\) does not end in weight's 4 input features": (X, W.t()),
    r"weight: shape \(1, 4, 3\) is not \(out_features, in_features\)": (X, W[None]),
    r"bias: shape \(3,\) is not \(4,\)": (X, W, B[:3]),
    "weight: dtype torch.bfloat16 differs from input's torch.float32": (X, W.bfloat16()),
    "weight: dtype torch.float16 differs from input's torch.bfloat16": (X.bfloat16(), W.half()),
    "bias: dtype torch.float32 differs from input's torch.float16": (X.half(), W.half(), B),
    r"bias: shape \(3,\) is not \(4,\)$": (X.half(), W.half(), B[:3].half()),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((TypeError, ValueError), match=message):
        F.linear(*BAD[message])
