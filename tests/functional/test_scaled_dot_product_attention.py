"""scaled_dot_product_attention beside torch's own: shapes, masks and conventions. PyTorch's own samples of it are in
test_torch_samples.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as TF

import fastformer
from fastformer import functional as F
from tests.numerics import assert_close_to_fp64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# name -> shapes of query, key, value
SHAPES = {
    "four dimensions": ((2, 4, 9, 8), (2, 4, 13, 8), (2, 4, 13, 5)),
    "three": ((3, 9, 8), (3, 13, 8), (3, 13, 8)),
    "two": ((9, 8), (13, 8), (13, 8)),
    "five": ((2, 3, 4, 9, 8), (2, 3, 4, 13, 8), (2, 3, 4, 13, 8)),
    "batch broadcast": ((2, 4, 9, 8), (1, 4, 13, 8), (1, 4, 13, 8)),
    "heads broadcast": ((2, 4, 9, 8), (2, 1, 13, 8), (2, 1, 13, 8)),
    "keys without a batch": ((2, 4, 9, 8), (4, 13, 8), (4, 13, 8)),
    "values broadcast": ((2, 4, 9, 8), (2, 4, 13, 8), (2, 1, 13, 8)),
    "queries broadcast": ((1, 1, 9, 8), (2, 4, 13, 8), (2, 4, 13, 8)),
}


def results(function, tensors, **kwargs):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, **kwargs)
    upstream = normal(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def compare(tensors, dtype=torch.float32, **kwargs):
    tensors = [t.to(dtype) for t in tensors]
    double = {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in kwargs.items()}
    exact = results(TF.scaled_dot_product_attention, [t.double() for t in tensors], **double)
    theirs = results(TF.scaled_dot_product_attention, tensors, **kwargs)
    with fastformer.strict():
        ours = results(F.scaled_dot_product_attention, tensors, **kwargs)
    for name, o, t, e in zip(("out", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        assert_close_to_fp64(name, o, t, e, scale=4.0)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_every_shape_torch_takes(shapes, causal):
    compare([normal(*s, seed=i) for i, s in enumerate(shapes)], is_causal=causal)  # causal at the top left: L != S


@pytest.mark.parametrize("shape", [(9, 13), (4, 9, 13), (2, 1, 9, 13), (1, 4, 1, 13), (9, 1), (2, 4, 9, 13)])
@pytest.mark.parametrize("kind", ["bool", "float32", "bfloat16"])
def test_masks_of_every_broadcastable_shape(shape, kind):
    tensors = [normal(*s, seed=i) for i, s in enumerate(SHAPES["four dimensions"])]
    mask = normal(*shape, seed=5)
    if kind == "bool":
        mask = mask > -1
        mask[..., 0] = True  # every query sees a key: torch's own differ where none is seen
        compare(tensors, attn_mask=mask)
    else:
        dtype = getattr(torch, kind)
        compare(tensors, dtype, attn_mask=mask.to(dtype))


def test_mask_with_more_leading_dimensions():
    tensors = [normal(*s, seed=i) for i, s in enumerate(SHAPES["five"])]
    for shape in ((9, 13), (3, 1, 9, 13), (2, 1, 1, 9, 13)):
        compare(tensors, attn_mask=normal(*shape, seed=5))
    compare([normal(*s, seed=i) for i, s in enumerate(SHAPES["three"])], attn_mask=normal(3, 9, 13))
    compare([normal(*s, seed=i) for i, s in enumerate(SHAPES["two"])], attn_mask=normal(9, 13))


@pytest.mark.parametrize("shape", [(1, 4, 9, 13), (9, 13), (2, 1, 9, 1)])
def test_gradient_of_a_floating_point_mask(shape):
    tensors = [normal(*s, seed=i) for i, s in enumerate(SHAPES["four dimensions"])]
    grads = []
    for function, dtype in ((F, torch.float32), (TF, torch.float32), (TF, torch.double)):
        mask = normal(*shape, seed=5).to(dtype).requires_grad_()
        out = function.scaled_dot_product_attention(*(t.to(dtype) for t in tensors), attn_mask=mask)
        grads.append(torch.autograd.grad(out.square().sum(), mask)[0])
    assert_close_to_fp64("dmask", *grads, scale=4.0)


@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads_and_scale(causal):
    tensors = [normal(2, 6, 9, 8), normal(2, 2, 13, 8, seed=1), normal(2, 2, 13, 8, seed=2)]
    compare(tensors, is_causal=causal, enable_gqa=True, scale=0.3)


def test_rows_that_see_nothing_are_zero():
    q, k = normal(1, 2, 5, 8).requires_grad_(), normal(1, 2, 6, 8)
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[2] = False
    for given in (mask, torch.zeros(5, 6).masked_fill(~mask, float("-inf"))):
        out = F.scaled_dot_product_attention(q, k, k, attn_mask=given)
        assert (out[:, :, 2] == 0).all() and (torch.autograd.grad(out.sum(), q)[0][:, :, 2] == 0).all()


def test_heads_too_large_for_the_kernels_run_torch_with_a_warning():
    from fastformer.backends import registry

    q = normal(1, 2, 5, 300)
    registry._warned.clear()
    with pytest.warns(UserWarning, match=r"fastformer\.attention: no fused kernel for head_dim outside \[1, 256\]"):
        ours = F.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(ours, TF.scaled_dot_product_attention(q, q, q))
    with fastformer.strict(), pytest.raises(fastformer.UnsupportedError, match="head_dim"):
        F.scaled_dot_product_attention(q, q, q)


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8)
BAD = {
    "query: expected a torch.Tensor": ((None, K, K), {}),
    r"query: shape \(8,\)": ((Q[0, 0, 0], K, K), {}),
    "key: dtype": ((Q, K.double(), K), {}),
    "key: last dimension 7 is not query's 8": ((Q, K[..., :7], K), {}),
    "value: length 5 is not key's 6": ((Q, K, K[:, :, :5]), {}),
    "key, value: leading dimensions": ((Q, K, K), {}),
    "key: its heads": ((Q, torch.zeros(2, 3, 6, 8), torch.zeros(2, 3, 6, 8)), {"enable_gqa": True}),
    "is_causal: cannot be set together": ((Q, Q, Q), {"is_causal": True, "attn_mask": torch.zeros(5, 5)}),
    "attn_mask: dtype torch.int64": ((Q, Q, Q), {"attn_mask": torch.zeros(5, 5, dtype=torch.long)}),
    "attn_mask: dtype torch.float64": ((Q, Q, Q), {"attn_mask": torch.zeros(5, 5, dtype=torch.double)}),
    "attn_mask: shape": ((Q, Q, Q), {"attn_mask": torch.zeros(3, 5)}),
    "attn_mask: expected": ((Q, Q, Q), {"attn_mask": 0.0}),
    "dropout_p: 2": ((Q, Q, Q), {"dropout_p": 2}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    arguments, options = BAD[message]
    with pytest.raises((TypeError, ValueError), match=message):
        F.scaled_dot_product_attention(*arguments, **options)
