"""PyTorch's own sample inputs (its ``op_db``) through the functions that replace its own: same values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastformer import functional as F
from tests.numerics import assert_close_to_fp64

pytest.importorskip("expecttest", reason="torch's op_db imports expecttest (pip install expecttest)")

# torch's name of the operation (and variant), and ours
OPS = {
    ("nn.functional.layer_norm", ""): F.layer_norm,
    ("softmax", ""): F.softmax,
    ("softmax", "with_dtype"): F.softmax,
    ("log_softmax", ""): F.log_softmax,
    ("log_softmax", "with_dtype"): F.log_softmax,
    ("nn.functional.gelu", ""): F.gelu,
    ("nn.functional.cross_entropy", ""): F.cross_entropy,
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
    torch.manual_seed(42)  # as op_db's own wrapper of attention does: its samples have dropout
    out = function(arguments[0], *arguments[1], **arguments[2])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype), allow_unused=True)]


def _is_float(t: object) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


@pytest.mark.filterwarnings("ignore:fastformer")  # samples no kernel covers run PyTorch's own, and say so
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", OPS, ids=lambda n: " ".join(n).strip())
def test_samples(name, dtype, op_db):
    op, tried = op_db[name], 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        if sample.kwargs.get("eps", 0) < 0:  # torch computes NaN; here it is an error
            with pytest.raises(ValueError, match=r"eps: .* is negative"):
                _run(OPS[name], sample, dtype)
            continue
        ours, theirs = _run(OPS[name], sample, dtype), _run(op.op, sample, dtype)
        # another dtype draws other dropout masks
        exact = [t if t is None else t.double() for t in theirs]
        if not sample.kwargs.get("dropout_p"):
            exact = _run(op.op, sample, torch.float64)
        for i, (o, t, e) in enumerate(zip(ours, theirs, exact, strict=True)):
            if t is None:
                assert o is None or not o.any(), sample
            else:
                assert_close_to_fp64(f"result {i} of {sample.kwargs}", o, t, e, scale=1.0)
        tried += 1
    assert tried >= 5
