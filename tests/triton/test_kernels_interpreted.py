"""The row operations' kernels against the float64 reference: on a GPU, or in the interpreter (see conftest.py)."""

import importlib
from functools import partial

import pytest
import torch
import triton
import triton.language as tl

from fastformer.backends.layout import collapsed
from fastformer.backends.reference import philox
from fastformer.backends.triton import (
    activation,
    add_layer_norm,
    cross_entropy,
    interpreting,
    layer_norm,
    rms_norm,
    softmax,
)
from fastformer.backends.triton.dropout import dropout, keep_mask
from fastformer.backends.triton.launch import UNBOUNDED, RowTile, launch
from tests import op_checks

from .accuracy import check, check_all, double

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [
    (1, 1),  # one element: the variance is 0
    (5, 7),  # fewer columns than the smallest block
    (70, 64),  # exactly the block; rows end inside the third tile
    (9, 100),  # columns that are no multiple of a vector
    (3, 1000),  # one program per tile of two or four rows, the last one short
    (0, 16),  # no rows: nothing runs, parameter gradients are zero
]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


@pytest.fixture
def normal(device):
    """Returns a function that gives normally distributed tensors, the same in every run."""
    generator = torch.Generator().manual_seed(1234)
    return lambda dtype, *shape: torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


@pytest.fixture
def chunked(monkeypatch):
    """Makes every row longer than a block, so that short rows take the path of rows above 32k columns."""
    chunks = (RowTile(UNBOUNDED, 1, 1, block_cols=32),)
    for module, tables in (
        (layer_norm, ("FORWARD_TILES", "BACKWARD_TILES")),
        (softmax, ("FORWARD_TILES", "BACKWARD_TILES")),
        (cross_entropy, ("FORWARD_TILES", "BACKWARD_TILES")),
        (activation, ("TILES",)),
    ):
        for table in tables:
            monkeypatch.setattr(module, table, chunks)
    monkeypatch.setattr(layer_norm, "PARAMETER_TILE", RowTile(UNBOUNDED, 4, 1, block_cols=32))


# ---- layer_norm ------------------------------------------------------------------------------------------------------


def check_layer_norm(x, weight, bias, dout, needs=(True, True, True)):
    outputs = [op.forward(*a, 1e-5) for op, a in ours_theirs_exact("layer_norm", x, weight, bias)]
    check_all("out mean rstd", *outputs, mean=x)
    gradients = [
        op.backward(*a, *saved[1:], *needs, torch.float64 if a[1].dtype == torch.float64 else x.dtype)
        for (op, a), saved in zip(ours_theirs_exact("layer_norm", dout, x, weight), outputs)
    ]
    check_all("dx dweight dbias", *gradients)


def ours_theirs_exact(op, *arguments):
    """(kernels, arguments), (reference, arguments) and (reference, arguments in float64)."""
    ours, reference = (importlib.import_module(f"fastformer.backends.{b}.{op}") for b in ("triton", "reference"))
    return (ours, arguments), (reference, arguments), (reference, double(*arguments))


@every_dtype
@every_shape
def test_layer_norm(normal, dtype, shape, device):
    parameters = normal(dtype, 2, shape[1])
    check_layer_norm(normal(dtype, *shape), *parameters, normal(dtype, *shape))


@every_dtype
def test_layer_norm_of_rows_longer_than_a_block(normal, dtype, chunked, device):
    # 70 = two whole chunks and a short one, whose means Chan's formula merges; 9 rows are more than one strip.
    check_layer_norm(normal(dtype, 9, 70) + 3, *normal(dtype, 2, 70), normal(dtype, 9, 70))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("long", [False, True])
def test_layer_norm_computes_only_what_is_needed(normal, request, needs, long, device):
    if long:
        request.getfixturevalue("chunked")
    check_layer_norm(normal(torch.float32, 5, 40), None, None, normal(torch.float32, 5, 40), needs)


def test_layer_norm_variance_is_taken_from_centred_values(normal, device):
    # mean 1000, deviation 1: in float32 E[x^2] - E[x]^2 keeps no digit of this variance.
    x = normal(torch.float32, 4, 100) + 1000
    check_layer_norm(x, None, None, normal(torch.float32, 4, 100))


def test_layer_norm_strides(normal, device):
    # Rows cut out of wider rows, and gradients of a sum: one value, expanded to every row or to every element.
    wide = normal(torch.float32, 6, 90)
    for dout in (normal(torch.float32, 1, 50).expand(6, 50), normal(torch.float32, 1, 1).expand(6, 50)):
        check_layer_norm(wide[:, 10:60], *normal(torch.float32, 2, 50), dout)


def test_layer_norm_float32_parameters_beside_half_precision(normal, device):
    x, dout, weight = normal(torch.bfloat16, 5, 40), normal(torch.bfloat16, 5, 40), normal(torch.float32, 40)
    outputs = [op.forward(*a, 1e-5) for op, a in ours_theirs_exact("layer_norm", x, weight, weight)]
    check_all("out mean rstd", *outputs, mean=x)
    _, dweight, dbias = layer_norm.backward(dout, x, weight, *outputs[0][1:], True, True, True, torch.float32)
    assert dweight.dtype == dbias.dtype == torch.float32


def test_strides_beyond_32_bits(normal, device):
    # A single row may be any distance from the next. The interpreter checks every 32-bit product, also of masked lanes.
    row = normal(torch.float32, 1, 40).as_strided((1, 40), (2**33, 1))
    check_layer_norm(row, row[0], None, row)
    check_softmax(row, row, 1.0, False)
    check("out", *(op.forward(*a) for op, a in ours_theirs_exact("activation", row, None, row, None, "silu")))
    check_cross_entropy(row, torch.tensor([3], device=device), None, 0.0, normal(torch.float32, 1))


@pytest.mark.parametrize("cols", [5000, 40000])  # one row per program; rows above 32k columns
def test_layer_norm_large_rows(normal, cols, device):
    if interpreting() and cols > 10000:
        pytest.skip("minutes in the interpreter; the chunked kernels run there with small chunks")
    check_layer_norm(normal(torch.float32, 3, cols), *normal(torch.float32, 2, cols), normal(torch.float32, 3, cols))


def test_layer_norm_gradients_repeat_bit_for_bit(normal, device):
    x, dout, weight = normal(torch.float32, 100, 48), normal(torch.float32, 100, 48), normal(torch.float32, 48)
    _, mean, rstd = layer_norm.forward(x, weight, None, 1e-5)
    first, second = (
        layer_norm.backward(dout, x, weight, mean, rstd, True, True, True, torch.float32) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# ---- rms_norm --------------------------------------------------------------------------------------------------------


def check_rms_norm(x, weight, bias, dout, needs=(True, True, True)):
    outputs = [op.forward(*a, 1e-5) for op, a in ours_theirs_exact("rms_norm", x, weight, bias)]
    check_all("out rstd", *outputs)
    gradients = [
        op.backward(*a, rstd, *needs, torch.float64 if a[1].dtype == torch.float64 else x.dtype)
        for (op, a), (_, rstd) in zip(ours_theirs_exact("rms_norm", dout, x, weight), outputs)
    ]
    check_all("dx dweight dbias", *gradients)


@every_dtype
@every_shape
def test_rms_norm(normal, dtype, shape, device):
    parameters = normal(dtype, 2, shape[1])
    check_rms_norm(normal(dtype, *shape), *parameters, normal(dtype, *shape))


@every_dtype
def test_rms_norm_of_rows_longer_than_a_block(normal, dtype, chunked, device):
    # the mean of 3 must stay where it is
    check_rms_norm(normal(dtype, 9, 70) + 3, *normal(dtype, 2, 70), normal(dtype, 9, 70))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("long", [False, True])
def test_rms_norm_computes_only_what_is_needed(normal, request, needs, long, device):
    if long:
        request.getfixturevalue("chunked")
    check_rms_norm(normal(torch.float32, 5, 40), None, None, normal(torch.float32, 5, 40), needs)


def test_rms_norm_strides_and_float32_parameters(normal, device):
    # rows cut out of wider rows, a gradient expanded to every row, parameters in float32 beside bfloat16
    x, weight = normal(torch.bfloat16, 6, 90)[:, 10:60], normal(torch.float32, 50)
    check_rms_norm(x, weight.bfloat16(), None, normal(torch.bfloat16, 1, 50).expand(6, 50))
    (out, rstd), *others = (op.forward(*a, 1e-5) for op, a in ours_theirs_exact("rms_norm", x, weight, weight))
    check_all("out rstd", (out, rstd), *others)
    _, dweight, dbias = rms_norm.backward(x, x, weight, rstd, True, True, True, torch.float32)
    assert dweight.dtype == dbias.dtype == torch.float32


@pytest.mark.parametrize("cols", [5000, 40000])
def test_rms_norm_large_rows(normal, cols, device):
    if interpreting() and cols > 10000:
        pytest.skip("minutes in the interpreter; the chunked kernels run there with small chunks")
    check_rms_norm(normal(torch.float32, 3, cols), *normal(torch.float32, 2, cols), normal(torch.float32, 3, cols))


def test_rms_norm_gradients_repeat_bit_for_bit(normal, device):
    x, dout, weight = normal(torch.float32, 100, 48), normal(torch.float32, 100, 48), normal(torch.float32, 48)
    _, rstd = rms_norm.forward(x, weight, None, 1e-5)
    first, second = (rms_norm.backward(dout, x, weight, rstd, True, True, True, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# ---- norms behind a residual addition, and its dropout ---------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(("op", "names"), [("layer_norm", "mean rstd"), ("rms_norm", "rstd")])
def test_add_norm(normal, request, op, names, dtype, dropout_p, long, device):
    if long:
        request.getfixturevalue("chunked")
    seed, shape = 2**40 + 17, (9, 70)
    x, residual, dout, dsummed = normal(dtype, 4, *shape)
    weight, bias = normal(dtype, 2, shape[1])
    outputs = [
        backend.forward(*a, 1e-5, dropout_p, seed)
        for backend, a in ours_theirs_exact(f"add_{op}", x, residual, weight, bias)
    ]
    check_all(f"out summed {names}", *outputs, mean=x)
    summed = outputs[0][1]
    # in float64 of the sum as it was stored
    reference = importlib.import_module(f"fastformer.backends.reference.{op}")
    statistics = [outputs[0][2:], outputs[1][2:], reference.forward(summed.double(), None, None, 1e-5)[1:]]
    for upstream in (dsummed, None):
        gradients = [
            backend.backward(*a, weight_, *saved, dropout_p, seed, True, True, weight_.dtype)
            for (backend, a), weight_, saved in zip(
                ours_theirs_exact(f"add_{op}", dout, upstream, summed), (weight, weight, weight.double()), statistics
            )
        ]
        check_all("dx dresidual dweight dbias", *gradients)
    if dropout_p == 0:
        dx, dresidual, *_ = gradients[0]
        assert dx is dresidual


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 1])  # each half of the key used alone, and together
def test_dropout_mask_is_the_shared_one(p, seed, device):
    shape = (5, 150)
    ones, zeros = torch.ones(shape, device=device), torch.zeros(shape, device=device)
    _, summed, mean, rstd = add_layer_norm.forward(ones, zeros, None, None, 1e-5, p, seed)
    expected = philox.dropout_scales(seed, *shape, p, device, torch.float32)
    assert torch.equal(summed, expected)
    # The same mask in backward: with dout = 0 and dsummed = 1, dx is the mask times the scale.
    dx, *_ = add_layer_norm.backward(zeros, ones, summed, None, mean, rstd, p, seed, False, False, torch.float32)
    assert torch.equal(dx, expected)


@triton.jit
def _mask_kernel(out_ptr, first_row, start, seed: tl.uint64, threshold: tl.uint32):
    row = tl.cast(first_row, tl.int64) + tl.arange(0, 4)
    keep = keep_mask(seed, threshold, row, start, 4, 64)
    tl.store(out_ptr + tl.arange(0, 4)[:, None] * 64 + tl.arange(0, 64)[None, :], keep.to(tl.int32))


@pytest.mark.parametrize("first_row", [0, 2**32 - 2])  # the second crosses into the counter's high word
@pytest.mark.parametrize("start", [0, 4096])  # a later chunk of a long row
def test_dropout_mask_of_distant_elements(first_row, start, device):
    mask = torch.zeros(4, 64, dtype=torch.int32, device=device)
    arguments = dropout(0.4, 99)
    launch(_mask_kernel, (1,), device, mask, first_row, start, arguments.seed, arguments.threshold)
    rows = torch.arange(first_row, first_row + 4)
    bits = philox.random_bits(99, rows, start + 64)[:, start:]
    assert torch.equal(mask.cpu() != 0, bits >= arguments.threshold)


# ---- softmax ---------------------------------------------------------------------------------------------------------


def check_softmax(x, dout, scale, log):
    outputs = [op.forward(*a, scale, log) for op, a in ours_theirs_exact("softmax", x)]
    check("out", *outputs)
    out = outputs[1]  # each backward from the same stored output
    check("dx", *(op.backward(*a, scale, log) for op, a in ours_theirs_exact("softmax", dout, out)))


@every_dtype
@every_shape
@pytest.mark.parametrize("log", [False, True])
def test_softmax(normal, dtype, shape, log, device):
    check_softmax(normal(dtype, *shape) * 3, normal(dtype, *shape), -0.7 if log else 0.7, log)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("long", [False, True])
def test_softmax_of_infinities_and_strided_rows(normal, request, log, long, device):
    if long:
        request.getfixturevalue("chunked")
    x = normal(torch.float32, 6, 90)[:, 5:75]
    x[1] = float("-inf")  # a row of nothing: zeros, or -inf for the logarithm, and no gradient
    x[2, 40:] = float("-inf")  # whole chunks of nothing, after the maximum is known
    x[3, :40] = float("-inf")  # and before
    x[4] *= 1e4  # exponentials that would overflow
    check_softmax(x, normal(torch.float32, 1, 70).expand(6, 70), 0.5, log)


@pytest.mark.parametrize("log", [False, True])
def test_softmax_of_nan_is_nan(normal, log, device):
    x = normal(torch.float32, 2, 40)
    x[1, 3] = float("nan")
    out = softmax.forward(x, 1.0, log)
    assert out[1].isnan().all() and out[0].isfinite().all()


# What is added to scores (2, 3, 5, cols): the shapes of mask and bias, and whether causal.
ADDED = {
    "padding mask": ((2, 1, 1, 1), None, False),  # whole rows: the last stride is 0 as well
    "mask of each row": ((2, 3, 5, -1), None, False),
    "bias by head": (None, (1, 3, 5, -1), False),
    "bias that is a number per row": (None, (2, 1, 5, 1), True),
    "everything": ((2, 1, 1, -1), (3, 1, -1), True),
    "causal": (None, None, True),
}


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize(  # what is added is done before log and dtype matter, which meet in test_softmax
    "log, dtype, long",
    [
        (False, torch.float32, False),
        (True, torch.bfloat16, False),
        (False, torch.float32, True),
        (True, torch.float32, True),
    ],
)
def test_softmax_of_masked_and_biased_scores(normal, request, added, log, dtype, long, device):
    if long:
        request.getfixturevalue("chunked")
    cols = 70 if long else 3  # three: fewer keys than queries, so that the first queries see nothing
    shape = (2, 3, 5, cols)
    mask, bias, causal = ADDED[added]
    sizes = lambda s: (1,) * (4 - len(s)) + tuple(cols if n < 0 else n for n in s)  # noqa: E731
    mask = None if mask is None else normal(torch.float32, *sizes(mask)) > -0.3
    bias = None if bias is None else normal(dtype, *sizes(bias))
    (mask, bias), row_shape = collapsed((mask, bias), shape, causal)
    x, dout = normal(dtype, *shape), normal(dtype, *shape)
    outputs = [
        op.forward(x, 0.7, log, mask, bias, row_shape, causal)
        for op, (x, bias) in ours_theirs_exact("softmax", x, bias)
    ]
    check("out", *outputs)
    gradients = ours_theirs_exact("softmax", dout, outputs[1])
    check("dx", *(op.backward(*a, 0.7, log, mask, row_shape, causal) for op, a in gradients))


# ---- activation ------------------------------------------------------------------------------------------------------

KINDS = ("relu", "gelu", "gelu_tanh", "silu")


check_activation = partial(op_checks.check_activation, activation)


@every_dtype
@every_shape
@pytest.mark.parametrize("kind", KINDS)
def test_activation(normal, dtype, shape, kind, device):
    x, dout, bias = normal(dtype, *shape) * 2, normal(dtype, *shape), normal(dtype, shape[1])
    check_activation(x, bias, None, None, dout, kind)
    check_activation(x, None, None, None, dout, kind)


@every_dtype
@every_shape
@pytest.mark.parametrize("kind", ["gelu", "silu"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gated_activation(normal, dtype, shape, kind, dropout_p, device):
    x, up, dout = (normal(dtype, *shape) for _ in range(3))
    bias, up_bias = normal(dtype, shape[1]), normal(dtype, shape[1])
    check_activation(x, None, up, None, dout, kind, dropout_p, 2**40 + 3)
    check_activation(x, bias, up, up_bias, dout, kind, dropout_p, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_in_blocks_of_columns_and_far_from_zero(normal, kind, chunked, device):
    x = normal(torch.float32, 7, 70) * 30  # both tails: out = x and out = 0, with slopes 1 and 0
    x[0, :4] = torch.tensor([0.0, -0.0, 1e5, -1e5])
    dout = normal(torch.float32, 7, 70)
    check_activation(x, x[1], None, None, dout, kind, 0.3, 7)
    check_activation(x, None, None, None, dout, kind)


@every_dtype
def test_activation_in_place_on_halves_of_one_tensor(normal, dtype, device):
    """A gated feed-forward's first matmul gives both factors side by side; gradients replace them."""
    both, dout = normal(dtype, 9, 2 * 40), normal(dtype, 9, 40)
    wanted = activation.forward(both[:, :40].contiguous(), None, both[:, 40:].contiguous(), None, "silu")
    dx, dup, *_ = activation.backward(dout, both[:, :40].contiguous(), None, both[:, 40:].contiguous(), None, "silu")
    x, up = both[:, :40], both[:, 40:]
    again = torch.empty_like(wanted)
    assert activation.backward(dout, x, None, up, None, "silu", dx=x, dup=up, out=again)[0] is x
    assert torch.equal(both, torch.cat([dx, dup], 1)) and torch.equal(again, wanted)
    both = normal(dtype, 9, 2 * 40)
    wanted = activation.forward(both[:, :40].contiguous(), None, both[:, 40:].contiguous(), None, "silu")
    activation.forward(both[:, :40], None, both[:, 40:], None, "silu", out=both[:, :40])
    assert torch.equal(both[:, :40], wanted)


# ---- cross_entropy ---------------------------------------------------------------------------------------------------

LOSSES = {
    "bare": (False, 0.0),
    "weight": (True, 0.0),
    "smoothing": (False, 0.1),
    "weight and smoothing": (True, 0.1),
}


def check_cross_entropy(logits, target, weight, smoothing, dloss):
    outputs = [op.forward(*a, -100, smoothing) for op, a in ours_theirs_exact("cross_entropy", logits, target, weight)]
    check_all("loss lse", *outputs)
    for upstream in (dloss, dloss[:1].expand_as(dloss)):  # per row, and the gradient of a sum: one value for all
        arguments = ours_theirs_exact("cross_entropy", upstream, logits, target, weight)
        gradients = [op.backward(*a, saved[1], -100, smoothing) for (op, a), saved in zip(arguments, outputs)]
        check("dlogits", *gradients)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES[:5], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("loss", LOSSES)
def test_cross_entropy(normal, dtype, shape, loss, device):
    weighted, smoothing = LOSSES[loss]
    rows, cols = shape
    target = torch.randint(0, cols, (rows,), generator=torch.Generator().manual_seed(0)).to(device)
    target[rows // 2] = -100 if rows > 1 else 0  # an ignored row, loss and gradient exactly zero
    weight = normal(torch.float32, cols).abs() if weighted else None
    check_cross_entropy(normal(dtype, *shape) * 2, target, weight, smoothing, normal(torch.float32, rows))


def check_gradient_in_forward(logits, target, probabilities, weight, smoothing, z_loss):
    """The same losses as without the gradient, and the gradient backward would give."""
    results = []
    for op, (z, w, q) in ours_theirs_exact("cross_entropy", logits, weight, probabilities):
        acc = torch.float64 if z.dtype == torch.float64 else torch.float32
        dloss = torch.tensor(0.37, dtype=acc, device=z.device).expand(len(z))
        dlogits = torch.empty_like(z)
        results.append((*op.forward(z, target, w, -100, smoothing, z_loss, q, dloss, dlogits), dlogits))
    check_all("loss lse dlogits", *results)


@every_dtype
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("long", [False, True])
def test_cross_entropy_with_its_gradient_and_z_loss(normal, request, dtype, loss, long, device):
    if long:
        request.getfixturevalue("chunked")
    weighted, smoothing = LOSSES[loss]
    logits, weight = normal(dtype, 5, 90) * 2, normal(torch.float32, 90).abs() if weighted else None
    target = torch.tensor([0, 89, 64, -100, 31], device=device)
    for z_loss in (0.0, 0.01):
        check_gradient_in_forward(logits, target, None, weight, smoothing, z_loss)
        exact = ours_theirs_exact("cross_entropy", normal(torch.float32, 5), logits, weight)
        gradients = [
            op.backward(d, z, target, w, torch.logsumexp(z.to(d.dtype), 1), -100, smoothing, z_loss)
            for op, (d, z, w) in exact
        ]
        check("dlogits", *gradients)


@every_dtype
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("long", [False, True])
def test_cross_entropy_of_probabilities(normal, request, dtype, loss, long, device):
    if long:
        request.getfixturevalue("chunked")
    weighted, smoothing = LOSSES[loss]
    logits = normal(dtype, 5, 100)[:, 7:97] * 2
    probabilities = normal(torch.float32, 5, 95).softmax(1).to(dtype)[:, :90]  # another stride than the logits'
    weight, dloss = normal(torch.float32, 90).abs() if weighted else None, normal(torch.float32, 5)
    check_gradient_in_forward(logits, None, probabilities, weight, smoothing, 0.01)
    for need in (True, False):
        gradients = [
            op.backward_probabilities(*a, smoothing, 0.01, need)
            for op, a in ours_theirs_exact("cross_entropy", dloss, logits, probabilities, weight)
        ]
        check_all("dlogits dprobabilities", *gradients)


@every_dtype
def test_scaling_the_gradient_in_place(normal, dtype, device):
    gradient = normal(dtype, 3, 2000)
    for factor in (1.0, 0.3):
        factor, scaled = torch.tensor(factor, dtype=dtype, device=device), gradient.clone()
        cross_entropy.scale(scaled, factor)
        assert torch.equal(scaled, gradient * factor)


def test_cross_entropy_gradient_over_the_logits_themselves(normal, device):
    logits, target = normal(torch.float32, 5, 90), torch.tensor([0, 89, 64, -100, 31], device=device)
    apart, over = torch.empty_like(logits), logits.clone()
    dloss = torch.ones((), device=device).expand(5)
    cross_entropy.forward(logits, target, None, -100, 0.1, dloss=dloss, dlogits=apart)
    cross_entropy.forward(over, target, None, -100, 0.1, dloss=dloss, dlogits=over)
    assert torch.equal(over, apart)


@pytest.mark.parametrize("loss", LOSSES)
def test_cross_entropy_in_chunks_of_strided_rows(normal, loss, chunked, device):
    weighted, smoothing = LOSSES[loss]
    logits = normal(torch.float32, 5, 100)[:, 7:97]
    logits[1] *= 1e3  # exponentials that would overflow
    if not smoothing:
        logits[2, :40] = float("-inf")  # forbidden classes, a whole chunk of them
    target = torch.tensor([0, 89, 64, -100, 31], device=device)  # the ends of the row and of chunks
    weight = normal(torch.float32, 90).abs() if weighted else None
    check_cross_entropy(logits, target, weight, smoothing, normal(torch.float32, 5))


def test_cross_entropy_of_a_target_out_of_range_is_nan(normal, device):
    logits, target = normal(torch.float32, 4, 10), torch.tensor([1, 10, -1, 3], device=device)
    loss, lse = cross_entropy.forward(logits, target, None, -100, 0.0)
    dlogits = cross_entropy.backward(torch.ones(4, device=device), logits, target, None, lse, -100, 0.0)
    assert loss.isnan().tolist() == [False, True, True, False]
    assert dlogits.isnan().all(1).tolist() == [False, True, True, False]
    cross_entropy.forward(logits, target, None, -100, 0.0, dloss=torch.ones(4, device=device), dlogits=dlogits)
    assert dlogits.isnan().all(1).tolist() == [False, True, True, False]
