"""PyTorch's own sample inputs (its ``op_db``) through the functions that replace its own: same values and gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastformer
from fastformer import functional as F
from tests.numerics import assert_close_to_fp64

pytest.importorskip("expecttest", reason="torch's op_db imports expecttest (pip install expecttest)")

# torch's name of the operation (and variant), and ours
OPS = {
    ("nn.functional.layer_norm", ""): F.layer_norm,
    ("nn.functional.rms_norm", ""): F.rms_norm,
    ("softmax", ""): F.softmax,
    ("softmax", "with_dtype"): F.softmax,
    ("log_softmax", ""): F.log_softmax,
    ("log_softmax", "with_dtype"): F.log_softmax,
    ("nn.functional.gelu", ""): F.gelu,
    ("nn.functional.relu", ""): F.relu,
    ("nn.functional.silu", ""): F.silu,
    ("nn.functional.cross_entropy", ""): F.cross_entropy,
    ("nn.functional.embedding", ""): lambda weight, ids, **options: F.embedding(ids, weight, **options),
    ("nn.functional.linear_cross_entropy", ""): F.linear_cross_entropy,
    ("nn.functional.linear_cross_entropy", "chunked"): F.linear_cross_entropy,
    ("nn.functional.linear_cross_entropy", "chunked_none"): F.linear_cross_entropy,
    ("nn.functional.scaled_dot_product_attention", ""): F.scaled_dot_product_attention,
}


@pytest.fixture(scope="module")
def op_db():
    from torch.testing._internal.common_methods_invocations import op_db

    return {(op.name, op.variant_test_name): op for op in op_db}


def _run(function, sample, dtype):
    """Output and gradients; ``dtype`` converts the tensors first."""
    arguments = tree_map(
        lambda t: t.detach().to(dtype).requires_grad_(t.requires_grad) if _is_float(t) else t,
        (sample.input, sample.args, sample.kwargs),
    )
    leaves = [t for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.requires_grad]
    torch.manual_seed(42)
    out = function(arguments[0], *arguments[1], **arguments[2])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype), allow_unused=True)]


def _is_float(t: object) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _cancelling(name: str, sample, out: Tensor) -> float:
    """Size of the terms that gradients are sums of, where the sum may be small."""
    if name == "nn.functional.linear_cross_entropy":  # (p - onehot) of each class times w, of each row times x
        terms = 2 * max(t.abs().max().item() for t in (sample.input, sample.args[0]))  # 2: the upstream gradient
        rows = sample.input.numel() // sample.input.shape[-1]
        return terms / (rows if sample.kwargs.get("reduction", "mean") == "mean" else 1)
    if "attention" not in name:
        return 1.0
    # scale * k * (dP - delta)
    q, (k, v) = sample.input, sample.args
    dp = out.shape[-1] * v.abs().max()  # the upstream gradient is about 1
    return (torch.maximum(q.abs().max(), k.abs().max()) * dp).item() * q.shape[-1] ** -0.5


def _on_reference(function):
    """``function`` on plain PyTorch operations: what a sample with dropout is compared with, because torch's own draws
    other masks from the same seed."""

    def call(*args, **kwargs):
        with fastformer.backend("reference"):
            return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", OPS, ids=lambda n: " ".join(n).strip())
def test_samples(name, dtype, op_db):
    torch.manual_seed(0)
    if name not in op_db:
        pytest.skip(f"torch {torch.__version__} has no {name[0]}")
    op, tried = op_db[name], 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        if sample.kwargs.get("eps", 0) < 0:  # torch computes NaN; here it is an error
            with pytest.raises(ValueError, match=r"eps: .* is negative"):
                _run(OPS[name], sample, dtype)
            continue
        peer = _on_reference(OPS[name]) if sample.kwargs.get("dropout_p") else op.op
        with fastformer.strict():
            ours = _run(OPS[name], sample, dtype)
        # Torch's chunks of half precision hold float32 logits; what is replaced is the function without options.
        sample.kwargs.pop("options", None)
        theirs, exact = _run(peer, sample, dtype), _run(peer, sample, torch.float64)
        for i, (o, t, e) in enumerate(zip(ours, theirs, exact, strict=True)):
            if t is None:
                assert o is None or not o.any(), sample
            else:
                scale = _cancelling(op.name, sample, ours[0]) if i > 0 else 1.0
                assert_close_to_fp64(f"result {i} of {sample.kwargs}", o, t, e, scale=scale)
        tried += 1
    assert tried >= 3


def test_embedding_samples_without_gradients(op_db):
    tried = 0
    for sample in op_db["nn.functional.embedding", ""].sample_inputs("cpu", torch.float32, requires_grad=False):
        unfused = {"max_norm", "scale_grad_by_freq", "sparse"} & set(sample.kwargs)
        ours, theirs = sample.input.clone(), sample.input.clone()  # max_norm writes to the table
        with fastformer.strict(not unfused), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fastformer.embedding: no fused kernel")
            out = F.embedding(sample.args[0], ours, **sample.kwargs)
        assert torch.equal(out, torch.nn.functional.embedding(sample.args[0], theirs, **sample.kwargs))
        assert torch.equal(ours, theirs)
        tried += 1
    assert tried >= 10
