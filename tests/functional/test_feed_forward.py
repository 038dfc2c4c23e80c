"""feed_forward and gated_feed_forward: values and every gradient against float64, however it is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as TF

import fastformer
from fastformer import functional as F
from fastformer.functional._joined import joined
from tests.nn.comparison import assert_as_accurate

ACTIVATIONS = {
    "relu": TF.relu,
    "gelu": TF.gelu,
    "gelu_tanh": lambda z: TF.gelu(z, approximate="tanh"),
    "silu": TF.silu,
}
NAMES = ("x", "w1", "b1", "w_up", "b_up", "w2", "b2", "residual")


def make(dtype: torch.dtype, lead: tuple[int, ...] = (2, 9), gated=True, biases=True, residual=True) -> dict:
    """Leaves by name; w1 and w_up are halves of one tensor where ``gated`` is "joined"."""
    g = torch.Generator().manual_seed(8)
    shapes = {"x": (*lead, 24), "w1": (50, 24), "b1": (50,), "w_up": (50, 24), "b_up": (50,), "w2": (20, 50)}
    shapes |= {"b2": (20,), "residual": (*lead, 20)}
    tensors = {n: (torch.randn(s, generator=g) / s[-1] ** 0.5).to(dtype) for n, s in shapes.items()}
    if gated == "joined":
        tensors["w1"], tensors["w_up"] = torch.cat([tensors["w1"], tensors["w_up"]]).chunk(2)
    absent = set() if gated else {"w_up", "b_up"}
    absent |= set() if biases else {"b1", "b_up", "b2"}
    absent |= set() if residual else {"residual"}
    return {n: t for n, t in tensors.items() if n not in absent}


def plain(t: dict, activation: str) -> Tensor:
    """The block in torch's own operations."""
    hidden = ACTIVATIONS[activation](TF.linear(t["x"], t["w1"], t.get("b1")))
    if "w_up" in t:
        hidden = hidden * TF.linear(t["x"], t["w_up"], t.get("b_up"))
    out = TF.linear(hidden, t["w2"], t.get("b2"))
    return t["residual"] + out if "residual" in t else out


def fused(t: dict, activation: str, **options) -> Tensor:
    if "w_up" not in t:
        return F.feed_forward(
            t["x"], t["w1"], t.get("b1"), t["w2"], t.get("b2"), activation, residual=t.get("residual"), **options
        )
    biases = {"b_gate": t.get("b1"), "b_up": t.get("b_up"), "b_down": t.get("b2")}
    return F.gated_feed_forward(
        t["x"], t["w1"], t["w_up"], t["w2"], activation, residual=t.get("residual"), **biases, **options
    )


def run(function, tensors: dict, dtype: torch.dtype | None = None) -> dict:
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}
    if "w_up" in leaves and joined(tensors["w1"], tensors["w_up"]) is not None:
        leaves["w1"], leaves["w_up"] = (
            t.detach().requires_grad_() for t in torch.cat([leaves["w1"], leaves["w_up"]]).chunk(2)
        )
    out = function(leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("gated", [False, True, "joined"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients(activation, gated, recompute, dtype):
    for biases, residual in ((True, False), (False, True), (True, True)):
        tensors = make(dtype, gated=gated, biases=biases, residual=residual)
        wanted = run(lambda t: plain(t, activation), tensors, torch.float64)
        same = run(lambda t: plain(t, activation), tensors)
        ours = run(lambda t: fused(t, activation, recompute=recompute), tensors)
        for name in wanted:
            assert_as_accurate(f"{name} {biases=} {residual=}", ours[name], same[name], wanted[name])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "lead",
    [
        (),  # one token
        (0,),  # none
        (3, 0, 2),  # none, in several dimensions
        (1000,),  # enough for several threads
    ],
)
def test_leading_shapes(lead, gated):
    tensors = make(torch.float32, lead, gated)
    ours, theirs = run(lambda t: fused(t, "silu"), tensors), run(lambda t: plain(t, "silu"), tensors)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_results_of_several_megabytes(biases, recompute):
    """Their memory is asked for here, not by the library."""
    g = torch.Generator().manual_seed(4)
    make = lambda *shape: torch.randn(shape, generator=g) / shape[-1] ** 0.5  # noqa: E731
    tensors = {"x": make(1500, 768), "w1": make(1024, 768), "w2": make(768, 1024), "residual": make(1500, 768)}
    tensors |= {"b1": make(1024), "b2": make(768)} if biases else {}
    ours = run(lambda t: fused(t, "silu", recompute=recompute), tensors)
    theirs = run(lambda t: plain(t, "silu"), tensors)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated", [False, "joined"])
def test_without_gradients(gated):
    tensors = make(torch.float32, gated=gated)
    torch.testing.assert_close(fused(tensors, "gelu"), plain(tensors, "gelu"))
    kept = {n: t.clone() for n, t in tensors.items()}
    fused(tensors, "gelu")
    assert all(torch.equal(t, kept[n]) for n, t in tensors.items()), "no input is written to"


@pytest.mark.parametrize("wanted", [["x"], ["w2"], ["b1"], ["w_up"], ["b_up", "w1"], ["residual"], ["b2"]], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_some_gradients(wanted, recompute):
    tensors = make(torch.float32, gated="joined")
    everything = run(lambda t: fused(t, "silu"), tensors)
    for name in wanted:
        tensors[name].requires_grad_()
    out = fused(tensors, "silu", recompute=recompute)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).float()
    for name, grad in zip(wanted, torch.autograd.grad(out, [tensors[n] for n in wanted], upstream), strict=True):
        torch.testing.assert_close(grad, everything[name])


@pytest.mark.parametrize("gated", [False, True, "joined"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_recomputation_gives_the_same_bits_and_keeps_only_x(activation, gated):
    tensors = make(torch.float32, (64,), gated)
    first, second = (run(lambda t, r=r: fused(t, activation, recompute=r), tensors) for r in (False, True))
    assert all(torch.equal(first[n], second[n]) for n in first)
    tensors["x"].requires_grad_()
    saved = {}
    for recompute in (False, True):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            fused(tensors, activation, recompute=recompute)
        inputs = {t.untyped_storage().data_ptr() for t in tensors.values()}
        saved[recompute] = sum(t.nbytes for t in kept if t.untyped_storage().data_ptr() not in inputs)
    hidden = 64 * 50 * 4
    expected = {False: 1, True: 3, "joined": 3}[gated] if activation == "relu" or gated else 2
    assert saved == {True: 0, False: expected * hidden}


def test_backward_twice_over_one_graph():
    for gated in (False, True, "joined"):
        tensors = make(torch.float32, gated=gated)
        for t in tensors.values():
            t.requires_grad_()
        for activation in ("relu", "gelu"):
            for recompute in (False, True):
                out = fused(tensors, activation, recompute=recompute).square().sum()
                first = torch.autograd.grad(out, list(tensors.values()), retain_graph=True)
                second = torch.autograd.grad(out, list(tensors.values()))
                assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_follows_the_activation(activation, gated, recompute):
    """With the mask read off the block itself (second matmul = identity), torch's own operations give the gradients."""
    tensors = make(torch.float64, (30,), gated, residual=False)
    tensors["w2"], tensors["b2"] = torch.eye(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)

    def dropped(t, **options):
        torch.manual_seed(7)
        return fused(t, activation, dropout_p=0.25, **options)

    mask = dropped(tensors) / plain(tensors, activation)
    assert 0.2 < (mask[~mask.isnan()] == 0).double().mean() < 0.3
    mask = torch.where(mask.isnan(), 1.0, mask)  # relu's zeros say nothing, and have no gradient
    ours = run(lambda t: dropped(t, recompute=recompute), tensors)
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}

    def masked(t):
        hidden = plain(t | {"w2": tensors["w2"], "b2": tensors["b2"]}, activation)
        return TF.linear(hidden * mask, t["w2"], t["b2"])

    theirs = run(masked, leaves)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name])
    torch.testing.assert_close(fused(tensors, activation, dropout_p=0.25, training=False), plain(tensors, activation))


def test_gpt2s_layout_gives_gradients_in_that_layout():
    tensors = make(torch.float32, gated=False, residual=False)
    transposed = {n: t.t().contiguous() if n in ("w1", "w2") else t for n, t in tensors.items()}
    back = lambda t: t | {"w1": t["w1"].t(), "w2": t["w2"].t()}  # noqa: E731
    ours = run(lambda t: fused(back(t), "gelu_tanh"), transposed)
    theirs = run(lambda t: plain(back(t), "gelu_tanh"), transposed)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name])
    assert ours["w1"].is_contiguous() and ours["w2"].is_contiguous()


GRADCHECKS = {
    "feed_forward": F.feed_forward,
    "feed_forward, relu, recomputed": lambda *t: F.feed_forward(*t, "relu", recompute=True),
    "feed_forward, GPT-2's layout": lambda x, w1, b1, w2, b2: F.feed_forward(
        x, w1.t().contiguous().t(), b1, w2.t().contiguous().t(), b2, "gelu_tanh"
    ),
    "gated_feed_forward": lambda x, w1, b1, w2, b2: F.gated_feed_forward(
        x, w1, w1.flip(0), w2, b_gate=b1, b_down=b2, residual=x
    ),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name):
    shapes = [(2, 3, 4), (6, 4), (6,), (4, 6), (4,)]
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(GRADCHECKS[name], tensors)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiles_to_one_graph(gated, recompute):
    tensors = make(torch.float32, gated=gated)
    function = lambda t: fused(t, "silu", recompute=recompute)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, wanted = run(compiled, tensors), run(function, tensors)
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name])


@pytest.mark.parametrize("gated", [False, True])
def test_torch_func_transforms(gated):
    tensors = make(torch.float32, (3, 4), gated)
    gradient = lambda function: torch.func.vmap(  # noqa: E731
        torch.func.grad(lambda x, r: function(tensors | {"x": x, "residual": r}, "gelu").square().sum())
    )(tensors["x"], tensors["residual"])
    torch.testing.assert_close(gradient(lambda t, a: fused(t, a, recompute=True)), gradient(plain))


@pytest.mark.parametrize("gated", [False, True])
def test_autocast(gated):
    tensors = make(torch.float32, gated=gated)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run(lambda t: fused(t, "silu"), tensors), run(lambda t: plain(t, "silu"), tensors)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.05, atol=0.05)


def test_the_reference_runs_it_too():
    tensors = make(torch.bfloat16)
    with fastformer.backend("reference"):
        assert_as_accurate(
            "reference", fused(tensors, "gelu"), plain(tensors, "gelu"),
            plain({n: t.double() for n, t in tensors.items()}, "gelu"),
        )  # fmt: skip


def test_explain_says_whose_matmul_it_is():
    t = make(torch.bfloat16)
    explained = fastformer.explain("feed_forward", t["x"], t["w1"], t["b1"], t["w2"], t["b2"], dropout_p=0.1)
    assert explained.backend == "cpu" and explained.op == "feed_forward"
    assert fastformer.explain("gated_feed_forward", t["x"], t["w1"], t["w_up"], t["w2"]).reasons["cpu"] == "chosen"
    meta = [t[name].to("meta") for name in ("x", "w1", "w_up", "w2")]
    explained = fastformer.explain("gated_feed_forward", *meta)
    assert explained.backend == "reference" and "not meta" in explained.reasons["cuda"]


X, W = torch.randn(4, 6), torch.randn(6)
BAD = {
    "activation: 'gelu_tan' is not one of .* did you mean 'gelu_tanh'": lambda: F.feed_forward(
        X, W[None], None, W[:, None], None, "gelu_tan"
    ),
    "activation: 'swish' is not one of 'relu', 'gelu', 'gelu_tanh', 'silu'": lambda: F.gated_feed_forward(
        X, X, X, X.t(), "swish"
    ),
    "w1: 5 input features are not x's": lambda: F.feed_forward(X, X[:, :5], None, X, None),
    "w2: 6 input features are not w1's 4": lambda: F.feed_forward(X, X, None, X, None),
    r"b1: shape \(6,\) is not \(4,\)": lambda: F.feed_forward(X, X, W, X.t(), None),
    "b1: dtype torch.float64 differs from x's": lambda: F.feed_forward(X, X, W[:4].double(), X.t(), None),
    "w2: dtype torch.bfloat16 differs from x's": lambda: F.feed_forward(X, X, None, X.t().bfloat16(), None),
    r"b2: shape \(4,\) is not \(6,\)": lambda: F.feed_forward(X, X, None, X.t(), W[:4]),
    r"w1: shape \(6,\) is not \(out_features, in_features\)": lambda: F.feed_forward(X, W, None, X, None),
    "w1: expected a torch.Tensor, got NoneType": lambda: F.feed_forward(X, None, None, X, None),
    "dropout_p: 1.5 is not in": lambda: F.feed_forward(X, X, None, X.t(), None, dropout_p=1.5),
    r"residual: shape \(4, 5\) is not the result's \(4, 6\)": lambda: F.feed_forward(
        X, X, None, X.t(), None, residual=X[:, :5]
    ),
    "residual: dtype torch.float64": lambda: F.feed_forward(X, X, None, X.t(), None, residual=X.double()),
    r"w_up: shape \(3, 6\) is not w_gate's \(4, 6\)": lambda: F.gated_feed_forward(X, X, X[:3], X.t()),
    "w_down: 6 input features are not w_gate's 4": lambda: F.gated_feed_forward(X, X, X, X),
    r"b_up: shape \(6,\) is not \(4,\)": lambda: F.gated_feed_forward(X, X, X, X.t(), b_up=W),
    "w_up: expected a torch.Tensor, got NoneType": lambda: F.gated_feed_forward(X, X, None, X.t()),
    "w1: is on meta, but x is on cpu": lambda: F.feed_forward(X, X.to("meta"), None, X.t(), None),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
