"""torch's scaled_dot_product_attention on fastformer's kernels: same numbers, undone without a trace."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as TF

from fastformer.functional import _attention
from fastformer.integrations import sdpa
from tests.numerics import assert_close_to_fp64

OPERATOR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@pytest.fixture
def calls(monkeypatch):
    """While registered: one entry per forward and backward that fastformer ran."""
    made = []
    for name in ("forward", "backward"):
        function = getattr(_attention, name)
        monkeypatch.setattr(sdpa, name, lambda *a, f=function, n=name: made.append(n) or f(*a))
    sdpa.register()
    yield made
    sdpa.unregister()


def run(tensors: list[Tensor], upstream: Tensor, **options) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = TF.scaled_dot_product_attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def inputs(batch, heads, heads_kv, sq, sk, d, dtype):
    g = torch.Generator().manual_seed(3)
    q = torch.randn(batch, sq, heads, d, generator=g).transpose(1, 2)  # as a projection leaves it
    k, v = torch.randn(batch, heads_kv, sk, d, generator=g), torch.randn(batch, heads_kv, sk, d, generator=g)
    return [t.to(dtype) for t in (q, k, v)], torch.randn(batch, heads, sq, d, generator=g)


MASK = torch.rand(2, 1, 30, 40, generator=torch.Generator().manual_seed(0)) < 0.7
MASK[1, 0, 4] = False  # this query sees nothing
# (B, Hq, Hkv, Sq, Sk, D), options
CASES = {
    "plain": ((2, 4, 4, 30, 40, 32), {}),
    "causal": ((2, 4, 4, 30, 30, 32), {"is_causal": True}),
    "causal, aligned at the top left": ((2, 4, 4, 30, 40, 32), {"is_causal": True}),
    "scale": ((2, 4, 4, 30, 40, 24), {"scale": 0.4}),
    "grouped heads": ((2, 4, 2, 30, 40, 32), {"enable_gqa": True}),
    "boolean mask": ((2, 4, 4, 30, 40, 32), {"attn_mask": MASK}),
    "mask of two dimensions": ((2, 4, 4, 30, 40, 32), {"attn_mask": MASK[0, 0]}),
    "transposed mask": ((2, 4, 4, 30, 40, 32), {"attn_mask": MASK[0, 0].t().contiguous().t()}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CASES)
def test_numbers_and_gradients(name, dtype, calls):
    shape, options = CASES[name]
    tensors, upstream = inputs(*shape, dtype)
    ours = run(tensors, upstream, **options)
    assert calls == ["forward", "backward"]
    sdpa.unregister()
    same, exact = run(tensors, upstream, **options), run([t.double() for t in tensors], upstream, **options)
    assert len(calls) == 2, "torch's own call ran here"
    for what, o, s, e in zip(("out", "dq", "dk", "dv"), ours, same, exact, strict=True):
        # a gradient is a sum over all queries or keys, of terms that partly cancel
        assert_close_to_fp64(what, o, s, e, scale=0.0 if what == "out" else 8.0)
    assert ours[0].stride() == same[0].stride()


def test_an_added_mask_of_numbers(calls):
    tensors, upstream = inputs(2, 4, 4, 30, 40, 32, torch.float32)
    mask = torch.randn(4, 30, 40, generator=torch.Generator().manual_seed(1))[None]
    ours = run(tensors, upstream, attn_mask=mask)
    assert calls == ["forward", "backward"]
    sdpa.unregister()
    for o, w in zip(ours, run(tensors, upstream, attn_mask=mask), strict=True):
        torch.testing.assert_close(o, w)


def test_what_torch_computes_otherwise_is_left_alone(calls):
    tensors, upstream = inputs(1, 2, 2, 9, 9, 16, torch.float32)
    run(tensors, upstream, dropout_p=0.5)
    run(tensors, upstream, attn_mask=torch.zeros(9, 9, requires_grad=True))
    assert calls == []
    wide, upstream = inputs(1, 2, 2, 9, 9, 300, torch.float32)  # a head size no kernel of ours has
    results = run(wide, upstream)
    assert calls == []
    sdpa.unregister()
    assert all(torch.equal(a, b) for a, b in zip(results, run(wide, upstream), strict=True))


def test_registering_and_unregistering_leave_no_trace():
    tensors, upstream = inputs(1, 2, 2, 70, 70, 16, torch.float32)
    kernel = lambda: repr(torch.library.get_kernel("aten::_scaled_dot_product_flash_attention_for_cpu", "CPU"))  # noqa: E731
    before, was = run(tensors, upstream), kernel()
    sdpa.unregister()  # nothing to undo
    for _ in range(2):
        sdpa.register()
        sdpa.register()
        assert kernel() != was and torch.nn.attention.current_flash_attention_impl() == "fastformer"
        assert "fastformer" in torch.nn.attention.list_flash_attention_impls()
        sdpa.unregister()
        assert kernel() == was and torch.nn.attention.current_flash_attention_impl() is None
    assert all(torch.equal(a, b) for a, b in zip(before, run(tensors, upstream), strict=True))


@pytest.mark.parametrize("name", ["causal, aligned at the top left", "boolean mask"])
def test_a_graph_may_begin_under_one_and_end_under_the_other(name, calls):
    shape, options = CASES[name]
    tensors, upstream = inputs(*shape, torch.float32)
    exact = run([t.double() for t in tensors], upstream, **options)
    for first, second in ((sdpa.register, sdpa.unregister), (sdpa.unregister, sdpa.register)):
        leaves = [t.detach().requires_grad_() for t in tensors]
        first()
        out = TF.scaled_dot_product_attention(*leaves, **options)
        second()
        for g, w in zip(torch.autograd.grad(out, leaves, upstream), exact[1:], strict=True):
            torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)
    assert calls.count("forward") == 2 and calls.count("backward") == 2  # one each beside the exact ones


def test_another_implementation_takes_its_place():
    class Handle:
        def remove(self):
            pass

    sdpa.register()
    try:
        torch.nn.attention.register_flash_attention_impl("another", register_fn=Handle)
        torch.nn.attention.activate_flash_attention_impl("another")
        sdpa.unregister()
        assert torch.nn.attention.current_flash_attention_impl() == "another"
    finally:
        sdpa.unregister()
        torch.nn.attention.restore_flash_attention_impl()


def test_outputs_are_what_the_compiler_expects(calls):
    """Strides and dtypes of torch's shape-only kernels, for both layouts of q."""
    for q in (torch.randn(2, 4, 5, 8), torch.randn(2, 5, 4, 8).transpose(1, 2)):
        real, fake = OPERATOR(q, q, q), OPERATOR(*(q.to("meta"),) * 3)
        assert [(t.shape, t.stride(), t.dtype) for t in real] == [(t.shape, t.stride(), t.dtype) for t in fake]
    compiled = torch.compile(lambda q: TF.scaled_dot_product_attention(q, q, q).sin(), backend="aot_eager")
    q = torch.randn(2, 4, 5, 8, requires_grad=True)
    (ours,) = torch.autograd.grad(compiled(q).sum(), q)
    sdpa.unregister()
    (wanted,) = torch.autograd.grad(TF.scaled_dot_product_attention(q, q, q).sin().sum(), q)
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_cuda_kernels_return_what_torchs_operators_do(dropout_p):
    """Called as torch's dispatcher calls them, on CPU tensors: the kernels below them are chosen by device."""
    (q, k, v), upstream = inputs(2, 4, 2, 30, 30, 16, torch.float32)
    torch.manual_seed(0)
    saved = sdpa._cuda_forward(None, q, k, v, dropout_p, True, False, scale=0.3)
    fake = torch.ops.aten._scaled_dot_product_flash_attention(
        *(t.to("meta") for t in (q, k, v)), dropout_p, True, False, scale=0.3
    )
    assert len(saved) == len(fake)
    for mine, theirs in zip(saved, fake, strict=True):
        if isinstance(theirs, Tensor) and mine is not None:
            assert (mine.shape, mine.stride(), mine.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        elif not isinstance(theirs, Tensor):
            assert mine == theirs
    grads = sdpa._cuda_backward(None, upstream, q, k, v, *saved[:6], dropout_p, True, *saved[6:8], scale=0.3)
    assert [g.stride() for g in grads] == [torch.empty_like(t).stride() for t in (q, k, v)]

    options = sdpa._options(q, 0.3, True, dropout_p=dropout_p, seed=int(saved[6][0]))
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    exact = _attention.run(*leaves, options._replace(dropout_p=0.0)) if dropout_p == 0 else None
    if exact is not None:
        torch.testing.assert_close(saved[0].double(), exact, rtol=1e-5, atol=1e-5)
        for g, w in zip(grads, torch.autograd.grad(exact, leaves, upstream.double()), strict=True):
            torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)
    else:  # dropout: the output is linear in v, so <dv, v> = <dout, out> holds only if backward repeats the mask
        torch.testing.assert_close((grads[2] * v).sum(), (upstream * saved[0]).sum(), rtol=1e-4, atol=1e-3)


def test_importing_changes_nothing_and_registering_prints_nothing():
    program = (
        "import torch, warnings; warnings.simplefilter('error')\n"
        "name = 'aten::_scaled_dot_product_flash_attention_for_cpu'\n"
        "kernel = lambda: repr(torch.library.get_kernel(name, 'CPU'))\n"
        "before = kernel()\n"
        "from fastformer.integrations import sdpa\n"
        "assert kernel() == before\n"
        "sdpa.register()\n"
        "assert kernel() != before\n"
        "q = torch.ones(1, 1, 2, 8)\n"
        "assert (torch.nn.functional.scaled_dot_product_attention(q, q, q) == 1).all()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stdout + done.stderr
