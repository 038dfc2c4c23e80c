"""A feed-forward's first matmul with its epilogue, and the backward pass of both, each one kernel, against float64:
under the emulator or on a GPU of compute capability 9.0."""

import pytest
import torch

import fastformer
from fastformer import functional as F
from fastformer.backends import linear_activation as choice
from fastformer.backends.cuda import emulation, linear_activation
from fastformer.backends.reference import activation as reference
from fastformer.backends.reference.philox import dropout_scales
from tests.cuda.orders import MODES, guarded_outputs, running
from tests.numerics import assert_close_to_fp64

BF16, F16 = torch.bfloat16, torch.float16
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


@pytest.fixture(autouse=True)
def hopper(device, monkeypatch):
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("made for Hopper")
    monkeypatch.setenv("FASTFORMER_CUDA_FAMILY", "sm90")
    with guarded_outputs(monkeypatch, linear_activation):
        yield
    if device == "cpu":
        emulation.load().set_multiprocessors(3)


def tensors(shape, dtype, device, gated=True, biases=True, gpt2=False):
    """x, w1, b1, w_up, b_up, dout, w2 for (rows, K, F), K the width of x and of dout; GPT-2 keeps (in, out) weights."""
    rows, inner, cols = shape
    g = torch.Generator().manual_seed(2)

    def make(*shape):
        return (torch.randn(shape, generator=g) / (shape[-1] ** 0.5 if len(shape) == 2 else 2)).to(device, dtype)

    x, w1, b1, w_up, b_up, w2 = (make(rows, inner) * inner**0.5, make(cols, inner), make(cols), make(cols, inner),
                                 make(cols), make(inner, cols))  # fmt: skip
    if gpt2:
        w1, w_up, w2 = (w.t().contiguous().t() for w in (w1, w_up, w2))
    b1, b_up = (b1, b_up) if biases else (None, None)
    return [x, w1, b1, w_up if gated else None, b_up if gated else None, make(rows, inner), w2]


def run(given, activation, p=0.0, seed=0):
    """{name: result} of forward and backward by our kernels; dgate and dup as halves of one tensor."""
    x, w1, b1, w_up, b_up, dout, w2 = given
    out, gate, up = linear_activation.forward(x, w1, b1, w_up, b_up, activation, p, seed, True)
    both = linear_activation.empty(x, len(x), 2 * len(w1))
    dgate, dup = both[:, : len(w1)], both[:, len(w1) :] if up is not None else None
    db1, db_up = linear_activation.backward(
        dout, w2, gate, b1, up, b_up, activation, p, seed, b1 is not None, b_up is not None, dgate, dup
    )
    results = {"out": out, "gate": gate, "up": up, "dgate": dgate, "dup": dup, "db1": db1, "db_up": db_up}
    return {name: t for name, t in results.items() if t is not None}


def expected(given, activation, p=0.0, seed=0):
    """The same by the reference, in the dtype of ``given``."""
    x, w1, b1, w_up, b_up, dout, w2 = given
    gate, up = x @ w1.t(), None if w_up is None else x @ w_up.t()
    out = reference.forward(gate, b1, up, b_up, activation, p, seed)
    dgate, dup, db1, db_up = reference.backward(
        dout @ w2, gate, b1, up, b_up, activation, p, seed, b1 is not None, b_up is not None
    )
    results = {"out": out, "gate": gate, "up": up, "dgate": dgate, "dup": dup, "db1": db1, "db_up": db_up}
    return {name: t for name, t in results.items() if t is not None}


def doubled(given):
    return [None if t is None else t.double() for t in given]


def check(given, activation, p=0.0, seed=0):
    ours, same, exact = (
        f(g, activation, p, seed) for f, g in ((run, given), (expected, given), (expected, doubled(given)))
    )
    assert ours.keys() == same.keys()
    for name in exact:
        assert_close_to_fp64(name, ours[name], same[name], exact[name])


# (rows, K, F), gated, GPT-2's layout of the weights, biases
CASES = {
    "one row": ((1, 8, 8), False, False, True),
    "one row, gated": ((1, 8, 8), True, True, True),
    "whole tiles": ((128, 64, 256), False, True, True),
    "tails everywhere": ((70, 40, 296), False, False, True),
    "more tiles than programs": ((300, 24, 520), False, False, True),
    "more tiles than programs, gated": ((130, 24, 296), True, False, True),
    "more slices than stages": ((33, 328, 40), False, True, True),
    "more slices than stages, gated": ((140, 360, 72), True, True, False),
    "a width that is no multiple of 4": ((66, 72, 37), True, None, True),  # w1 as nn.Linear has it, w2 as GPT-2
    "no biases": ((66, 16, 264), False, False, False),
}


@pytest.mark.parametrize(
    "dtype, activation, p", [(BF16, "gelu", 0.0), (F16, "silu", 0.3)], ids=["bf16", "fp16 dropout"]
)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, dtype, activation, p, device):
    shape, gated, gpt2, biases = CASES[name]
    given = tensors(shape, dtype, device, gated, biases, bool(gpt2))
    if gpt2 is None:
        given[-1] = given[-1].t().contiguous().t()
    check(given, activation, p, seed=11)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, gated, device):
    """Arguments up to 8 either way, where tails cancel or saturate."""
    given = tensors((40, 16, 72), BF16, device, gated)
    given[0] = given[0] * 3
    check(given, activation)


def test_the_mask_is_the_references(device):
    x, w1, b1, *_ = tensors((70, 16, 264), BF16, device, False)
    out, _, _ = linear_activation.forward(x * 0, w1, b1.fill_(1.0), None, None, "gelu", 0.25, 77, False)
    kept = dropout_scales(77, 70, 264, 0.25, x.device, torch.float32) > 0
    assert torch.equal(out != 0, kept)
    assert 0.7 < kept.float().mean() < 0.8


def test_everything_dropped(device):
    given = tensors((20, 16, 40), BF16, device)
    ours = run(given, "silu", 1.0, 3)
    for name in ("out", "dgate", "dup", "db1", "db_up"):
        assert torch.equal(ours[name], torch.zeros_like(ours[name])), name


def test_nan_stays_in_its_row(device):
    given = tensors((70, 24, 40), BF16, device)
    clean = run(given, "gelu")
    given[0][65] = given[5][65] = float("nan")
    for name, t in run(given, "gelu").items():
        if t.dim() == 2:
            assert t[65].isnan().all() and torch.equal(t[:65], clean[name][:65]), name
            assert torch.equal(t[66:], clean[name][66:]), name


def test_an_infinite_bias(device):
    """Its column alone is infinite: the rows that fill up a tile, 0 times infinity there, do not count."""
    given = tensors((1, 16, 40), BF16, device)
    given[4][7] = float("inf")
    check(given, "silu")


def test_no_rows(device):
    given = tensors((5, 16, 40), BF16, device)
    given[0], given[5] = given[0][:0], given[5][:0]
    ours = run(given, "gelu")
    assert ours["out"].shape == (0, 40)
    assert torch.equal(ours["db1"], torch.zeros_like(ours["db1"]))
    assert torch.equal(ours["db_up"], torch.zeros_like(ours["db_up"]))


def test_some_sums(device):
    """Either bias gradient alone."""
    given = tensors((70, 16, 40), BF16, device)
    x, w1, b1, w_up, b_up, dout, w2 = given
    wanted = run(given, "silu")
    _, gate, up = linear_activation.forward(x, w1, b1, w_up, b_up, "silu", 0.0, 0, True)
    for needs in ((True, False), (False, True), (False, False)):
        dgate, dup = (torch.empty_like(gate) for _ in range(2))
        sums = linear_activation.backward(dout, w2, gate, b1, up, b_up, "silu", 0.0, 0, *needs, dgate, dup)
        assert torch.equal(dgate, wanted["dgate"]) and torch.equal(dup, wanted["dup"])
        for need, ours, name in zip(needs, sums, ("db1", "db_up"), strict=True):
            assert torch.equal(ours, wanted[name]) if need else ours is None


def test_operands_anywhere(device):
    """Rows apart, rows that start nowhere, one row for all: read as they are, or copied."""
    given = tensors((9, 24, 40), BF16, device)
    wanted = run(given, "gelu")
    x, dout = given[0], given[5]
    wide = torch.full((9, 64), float("nan"), dtype=BF16, device=device)
    wide[:, 8:32] = x
    odd = torch.full((9 * 24 + 1,), float("nan"), dtype=BF16, device=device)
    odd[1:] = dout.flatten()
    moved = [wide[:, 8:32], *given[1:5], odd[1:].view(9, 24), given[6]]
    assert all(torch.equal(t, wanted[name]) for name, t in run(moved, "gelu").items())
    given[5] = dout[:1].expand(9, 24)
    moved[5] = given[5].contiguous()
    assert all(torch.equal(t, s) for t, s in zip(run(given, "gelu").values(), run(moved, "gelu").values(), strict=True))


@pytest.mark.parametrize("order, completion", MODES, ids=["-".join(mode) for mode in MODES])
def test_any_order_of_threads(order, completion, device):
    """Bit for bit what the first order gave, whenever copies land and products finish, and however tiles are dealt."""
    if device != "cpu":
        pytest.skip("a GPU chooses its own order")
    gated = order in ("forward", "warps", "warps_shuffled")
    given = tensors((70, 136, 264), F16, device, gated, gpt2=completion == "mixed")
    wanted = run(given, "silu", 0.2, 5)
    emulation.load().set_multiprocessors(2 if order == "reversed" else 1)
    with running(order, completion):
        ours = run(given, "silu", 0.2, 5)
    for name in wanted:
        assert torch.equal(ours[name], wanted[name]), name


# ---- feed_forward ----------------------------------------------------------------------------------------------------


def gradients(block, leaves, backend):
    leaves = [t.detach().requires_grad_() for t in leaves]
    torch.manual_seed(3)
    with fastformer.backend(backend), torch.autograd.set_multithreading_enabled(False):
        out = block(*leaves)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out))]


@pytest.mark.parametrize("form", ["gelu", "relu", "swiglu", "joined swiglu"])
def test_feed_forward(form, device, monkeypatch):
    x, w1, b1, w_up, _, _, w2 = tensors((20, 24, 40), BF16, device)
    leaves, block = [x, w1, b1, w2], lambda x, w1, b1, w2: F.feed_forward(x, w1, b1, w2, None, form, dropout_p=0.2)
    if "swiglu" in form:
        leaves = [x, w1, w_up, w2]

        def block(x, w1, w_up, w2):
            if form == "joined swiglu":
                w1, w_up = torch.cat([w1, w_up]).chunk(2)
            return F.gated_feed_forward(x, w1, w_up, w2, residual=x, dropout_p=0.2)

    calls = []
    for name in ("forward", "backward"):
        kernel = getattr(linear_activation, name)
        monkeypatch.setattr(linear_activation, name, lambda *a, k=kernel, n=name: calls.append(n) or k(*a))
    ours = gradients(block, leaves, "cuda")
    assert calls == ["forward", "backward"]
    same, exact = gradients(block, leaves, "reference"), gradients(block, [t.double() for t in leaves], "reference")
    assert len(calls) == 2
    for i, results in enumerate(zip(ours, same, exact, strict=True)):
        assert_close_to_fp64(f"result {i}", *results)


def test_what_is_refused(device, monkeypatch):
    x, w1, b1, w_up, _, _, w2 = tensors((20, 24, 40), BF16, device)
    w2_odd = tensors((20, 24, 37), BF16, device)[-1]
    reasons = {
        None: choice.refusal("cuda", x, w1, w_up, w2),
        "x's rows do not start at multiples of 16 bytes": choice.refusal("cuda", x[:, 1:], w1, None, w2),
        "w1's rows do not start at multiples of 16 bytes": choice.refusal("cuda", x, w1[:, 3:], None, None),
        "w2's rows do not start at multiples of 16 bytes": choice.refusal("cuda", x, w1, None, w2_odd),
        "x is empty": choice.refusal("cuda", x[:0], w1, None, None),
        "dtype float32 is not one of bfloat16, float16": choice.refusal("cuda", x.float(), w1, None, None),
    }
    for wanted, reason in reasons.items():
        assert reason == wanted
    assert choice.select(x, w1, w_up, w2) is None, "the library's matmul is the default"
    with fastformer.backend("cuda"):
        assert choice.select(x, w1, w_up, w2) is linear_activation
        assert choice.select(x[:, 1:], w1, None, w2) is None
        assert fastformer.explain("gated_feed_forward", x, w1, w_up, w2).backend == "cuda"
        explained = str(fastformer.explain("feed_forward", x, w1[:, 3:], b1, w2, None))
    assert "the library's matmul: w1's rows do not start at multiples of 16 bytes" in explained
    monkeypatch.setitem(choice.DEFAULT, device, "cuda")
    assert choice.select(x, w1, w_up, w2) is linear_activation
    with fastformer.backend("reference"):
        assert choice.select(x, w1, w_up, w2) is None
    if device == "cpu":
        monkeypatch.setenv("FASTFORMER_CUDA_FAMILY", "sm80")
        assert choice.refusal("cuda", x, w1, w_up, w2) == "the kernel is made for compute capability 9.0"
        with pytest.raises(NotImplementedError, match="compute capability is not 9"):
            linear_activation.forward(x, w1, b1, None, None, "gelu", 0.0, 0, False)


def test_the_c_function_checks_too(device):
    x, w1, *_ = tensors((20, 24, 40), BF16, device)
    with pytest.raises(NotImplementedError, match="w1: rows must start at multiples of 16 bytes"):
        linear_activation.forward(x[:, :16], w1[:, 3:19], None, None, None, "gelu", 0.0, 0, False)
    with pytest.raises(NotImplementedError, match="dtype: float32"):
        linear_activation.forward(x.float(), w1.float(), None, None, None, "gelu", 0.0, 0, False)
    with pytest.raises(ValueError, match="inner: 0"):
        linear_activation.forward(x[:, :0].contiguous(), w1[:, :0], None, None, None, "gelu", 0.0, 0, False)
