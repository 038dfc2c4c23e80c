"""Every instruction set's kernels, on every length of row from one element to past two of the widest vectors.

The AVX-512 kernels run as they are where the CPU can, and everywhere in ``fastformer._C_wide``, their 64-byte vectors
compiled to AVX2 instructions. Length matters most: whole vectors, the unrolled loop, the tail and none of them.
Attention's kernels with bfloat16 products, AVX-512-BF16's and AMX's, have tests of their own in test_attention_bf16.py.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as TF

import fastformer
from fastformer import functional as F
from fastformer.backends import registry
from tests.numerics import assert_close_to_fp64

KERNELS = [("_C", "generic"), ("_C", "avx2"), ("_C", "avx512"), ("_C_wide", "avx512")]
BF16_KERNELS = [(module, isa) for module in ("_C", "_C_wide") for isa in ("avx512_bf16", "amx")]  # attention's alone
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=KERNELS, ids=lambda k: f"{k[0]} {k[1]}")
def kernels(request, monkeypatch):
    """The extension module to call, with the instruction set selected; backends/cpu uses it for the test."""
    name, isa = request.param
    try:
        module = importlib.import_module(f"fastformer.{name}")
    except ImportError:
        pytest.skip(f"fastformer.{name} is not built (make test builds it)")
    before, threads = module.cpu_isa(), torch.get_num_threads()
    try:
        module.set_cpu_isa(isa)
    except NotImplementedError:
        pytest.skip(f"this CPU cannot run {isa}")
    for op in (*registry.OPS, "linear", "_call"):
        backend = importlib.import_module(f"fastformer.backends.cpu.{op}")
        if hasattr(backend, "_C"):  # linear_cross_entropy's kernels are cross_entropy's
            monkeypatch.setattr(backend, "_C", module)
    torch.set_num_threads(1)  # thousands of tiny calls
    with fastformer.backend("cpu"):
        yield module
    torch.set_num_threads(threads)
    module.set_cpu_isa(before)


def _target(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0]) * 7919 % x.shape[1]


def _some(w: Tensor) -> Tensor:
    return torch.arange(len(w)) % 3 != 1


def _sum_of_both(pair):
    return pair[0] + 2 * pair[1]


ROWS = torch.tensor([2, 0, 2])

# Ours and torch's, of x (3, n) and a row vector w (n).
OPS = {
    "layer_norm": (lambda x, w: F.layer_norm(x, x.shape[1:], w, w), lambda x, w: TF.layer_norm(x, x.shape[1:], w, w)),
    "add_layer_norm": (
        lambda x, w: _sum_of_both(F.add_layer_norm(x, x.detach().flip(0), x.shape[1:], w)),
        lambda x, w: _sum_of_both((TF.layer_norm(x + x.detach().flip(0), x.shape[1:], w), x + x.detach().flip(0))),
    ),
    "rms_norm": (
        lambda x, w: F.rms_norm(x, x.shape[1:], w, 1e-5, bias=w),
        lambda x, w: TF.rms_norm(x, x.shape[1:], w, 1e-5) + w,
    ),
    "add_rms_norm": (
        lambda x, w: _sum_of_both(F.add_rms_norm(x, x.detach().flip(0), x.shape[1:], w, 1e-5)),
        lambda x, w: _sum_of_both((TF.rms_norm(x + x.detach().flip(0), x.shape[1:], w, 1e-5), x + x.detach().flip(0))),
    ),
    "embedding": (
        lambda x, w: F.transformer_embedding(ROWS, x, None, w.detach()[None], scale=2.0, norm_weight=w, norm_eps=1e-5),
        lambda x, w: TF.layer_norm(2 * x[ROWS] + w.detach(), w.shape, w),
    ),
    "embedding, no norm": (lambda x, w: F.transformer_embedding(ROWS, x, x), lambda x, w: x[ROWS] + x),
    "softmax": (lambda x, w: F.softmax(x, 1), lambda x, w: TF.softmax(x, 1)),
    "log_softmax": (lambda x, w: F.log_softmax(x, 1), lambda x, w: TF.log_softmax(x, 1)),
    "softmax, scale and bias": (
        lambda x, w: F.softmax(x, 1, scale=0.5, mask=w),
        lambda x, w: TF.softmax(x * 0.5 + w, 1),
    ),
    "log_softmax, mask": (
        lambda x, w: F.log_softmax(x, 1, mask=_some(w)).masked_fill(~_some(w), 0.0),
        lambda x, w: TF.log_softmax(x.masked_fill(~_some(w), -torch.inf), 1).masked_fill(~_some(w), 0.0),
    ),
    "gelu": (F.bias_activation, lambda x, w: TF.gelu(x + w)),
    "gelu tanh": (
        lambda x, w: F.bias_activation(x, w, "gelu_tanh"),
        lambda x, w: TF.gelu(x + w, approximate="tanh"),
    ),
    "silu": (lambda x, w: F.bias_activation(x, w, "silu"), lambda x, w: TF.silu(x + w)),
    "relu": (lambda x, w: F.bias_activation(x, w, "relu"), lambda x, w: TF.relu(x + w)),
    "silu, gated": (
        lambda x, w: F.gated_activation(x, x.detach().flip(0), up_bias=w),
        lambda x, w: TF.silu(x) * (x.detach().flip(0) + w),
    ),
    "cross_entropy": (
        lambda x, w: F.cross_entropy(x, _target(x), reduction="none"),
        lambda x, w: TF.cross_entropy(x, _target(x), reduction="none"),
    ),
    "cross_entropy of probabilities": (
        lambda x, w: F.cross_entropy(x, x.detach().flip(0).abs() / 8, w.detach().abs(), reduction="none"),
        lambda x, w: TF.cross_entropy(x, x.detach().flip(0).abs() / 8, w.detach().abs(), reduction="none"),
    ),
    "cross_entropy, gradient in forward": (
        lambda x, w: F.cross_entropy(x, _target(x), reduction="sum").expand(3),
        lambda x, w: TF.cross_entropy(x, _target(x), reduction="sum").expand(3),
    ),
    "cross_entropy, smoothing": (
        lambda x, w: F.cross_entropy(x, _target(x), w.detach().abs(), reduction="none", label_smoothing=0.2),
        lambda x, w: TF.cross_entropy(x, _target(x), w.detach().abs(), reduction="none", label_smoothing=0.2),
    ),
}


def _terms(name: str, x: Tensor, w: Tensor) -> float:
    """Size of what cancels in the gradients, per unit of the upstream gradient."""
    if "cross_entropy" not in name:  # a row's only element has the gradient g - mean(g) or g - g p
        return max(t.double().abs().max().item() for t in (x, w)) ** 2 if x.shape[1] < 3 else 0.0
    # p - onehot, where p = exp(z - lse) and lse was rounded once: its error is p |lse| / 4 units of TINY
    return 1 + torch.logsumexp(x.double(), 1).abs().max().item() / 4


def _run(function, tensors, upstream):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, upstream.to(out.dtype), allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", OPS)
def test_every_length_of_row(name, dtype, kernels):
    ours, torchs = OPS[name]
    g = torch.Generator().manual_seed(1)
    # 1 .. 67: past four vectors of 16 floats; 130: an unrolled loop and a tail of the widest; 2060: a second chunk
    for n in [*range(1, 68), 130, 2060]:
        tensors = [(torch.randn(3, n, generator=g) * 2).to(dtype), torch.randn(n, generator=g).to(dtype)]
        upstream = torch.randn((3,) if "cross_entropy" in name else (3, n), generator=g).to(dtype)
        exact = _run(torchs, [t.double() for t in tensors], upstream)
        same, mine = _run(torchs, tensors, upstream), _run(ours, tensors, upstream)
        assert len(mine) == len(exact)
        for what, *results in zip(("output", "dx", "dw"), mine, same, exact):
            scale = _terms(name, *tensors) * upstream.abs().max().item() if what != "output" else 0.0
            assert_close_to_fp64(f"{name} {what}, {n} columns", *results, scale=scale)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_rotary_of_every_size(dtype, interleaved, kernels):
    g = torch.Generator().manual_seed(4)
    for rotated in [*range(2, 67, 2), 130]:
        x = torch.randn(1, 2, 3, rotated + rotated % 3, generator=g).to(dtype)
        angle = torch.randn(
            3, rotated // 2, generator=g, dtype=torch.float64 if dtype == torch.float64 else torch.float32
        )
        results = []
        for backend in ("cpu", "reference"):
            q = x.clone().requires_grad_()
            with fastformer.backend(backend):
                out = F.rotary_embedding(q, None, angle.cos(), angle.sin(), interleaved=interleaved)[0]
                results.append([out, *torch.autograd.grad(out, q, x.flip(-1))])
        for mine, wanted in zip(*results, strict=True):
            # Products added in one rounding or in two, and a rounding to the dtype that may then fall the other way.
            torch.testing.assert_close(mine, wanted, rtol=0, atol=2 * torch.finfo(dtype).eps * x.abs().max().item())


@pytest.mark.parametrize("start", ["none", "bias", "rows"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda d: str(d)[6:])
def test_linear_of_a_few_rows_of_every_size(dtype, transposed, start, kernels):
    from fastformer.backends.cpu import linear

    g = torch.Generator().manual_seed(6)
    # Groups of four rows and what is left of them; depths and widths as above; 1100: past a block of columns
    for rows in (1, 2, 3, 4, 7):
        for n in [*range(1, 36), 67, 130]:
            for depth, width in ((n, 11), (9, n), (33, 1100))[: 3 if n == 67 else 2]:
                a, b = (torch.randn(shape, generator=g).to(dtype) for shape in ((rows, depth), (depth, width)))
                b = b if transposed else b.t().contiguous().t()
                shapes = {"none": None, "bias": (width,), "rows": (rows, width)}
                added = None if start == "none" else torch.randn(shapes[start], generator=g).to(dtype)
                out = torch.full((rows, width + 3), 7.0, dtype=dtype)
                assert linear.product(a, b.t(), added, out[:, :width])
                assert (out[:, width:] == 7).all(), "nothing beside the result is written"
                same, exact = a @ b, a.double() @ b.double()
                if added is not None:
                    same, exact = same + added, exact + added.double()
                assert_close_to_fp64(f"{rows} x {depth} x {width}", out[:, :width], same, exact)


@pytest.mark.parametrize("kernels", KERNELS + BF16_KERNELS, indirect=True, ids=lambda k: f"{k[0]} {k[1]}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_attention_with_tails_in_every_direction(dtype, kernels):
    def inputs(q, k, v):
        return TF.scaled_dot_product_attention(q, k, v, is_causal=True)

    g = torch.Generator().manual_seed(2)
    for length, head_dim in ((1, 1), (5, 3), (17, 20), (70, 33), (129, 64)):
        tensors = [torch.randn(1, 2, length, head_dim, generator=g).to(dtype) for _ in range(3)]
        upstream = torch.randn(1, 2, length, head_dim, generator=g).to(dtype)
        exact, same = _run(inputs, [t.double() for t in tensors], upstream), _run(inputs, tensors, upstream)
        mine = _run(lambda q, k, v: F.attention(q, k, v, causal=True), tensors, upstream)
        for what, *results in zip(("output", "dq", "dk", "dv"), mine, same, exact, strict=True):
            # sums over up to 129 queries of terms that partly cancel
            assert_close_to_fp64(f"{what} at {length} x {head_dim}", *results, scale=8.0)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda d: str(d)[6:])
def test_nan_and_infinity_pass_through(dtype, kernels):
    for n in (1, 7, 40):  # a tail, and a whole vector with one
        x = torch.ones(4, n, dtype=dtype)
        x[0, n // 2] = float("nan")
        x[1, n // 2] = float("inf")
        x[2] = float("-inf")
        x[3, n // 2] = float("-inf")
        soft, log = F.softmax(x, 1), F.log_softmax(x, 1)
        assert soft[:2].isnan().all() and log[:2].isnan().all()
        assert (soft[2] == 0).all() and (log[2] == float("-inf")).all()
        assert torch.equal(soft[3:], torch.zeros(1, 1, dtype=dtype) if n == 1 else TF.softmax(x[3:], 1))
        assert F.gelu(x)[0, n // 2].isnan() and F.gelu(x)[1, n // 2] == float("inf")
        assert F.gelu(x, "tanh")[0, n // 2].isnan() and F.gelu(x, "tanh")[1, n // 2] == float("inf")
        for function in (F.silu, F.relu):
            assert function(x)[0, n // 2].isnan() and function(x)[1, n // 2] == float("inf")
        assert F.layer_norm(x, (n,))[:2].isnan().all()
        # the infinity is NaN, what is finite beside it is 0
        assert F.rms_norm(x, (n,))[0].isnan().all() and F.rms_norm(x, (n,))[1, n // 2].isnan()
        assert F.cross_entropy(x[:1], torch.tensor([0])).isnan()


def test_the_instruction_sets_agree_on_dropout():
    from fastformer import _C

    before, results = _C.cpu_isa(), []
    x, residual = torch.ones(37, 203), torch.zeros(37, 203)
    try:
        for isa in ("generic", "avx2"):
            _C.set_cpu_isa(isa)
            torch.manual_seed(3)
            with fastformer.backend("cpu"):
                results.append(F.add_layer_norm(x, residual, (203,), dropout_p=0.3)[1])
    finally:
        _C.set_cpu_isa(before)
    assert torch.equal(*results)


def test_selecting_an_instruction_set():
    from fastformer import _C

    assert _C.cpu_isa() in ("generic", "avx2", "avx512", "avx512_bf16", "amx")
    with pytest.raises(ValueError, match="name: 'sse9' is not one of generic, avx2, avx512, avx512_bf16, amx"):
        _C.set_cpu_isa("sse9")
