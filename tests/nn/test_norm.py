"""fastformer.nn.LayerNorm and RMSNorm beside torch.nn's."""

import pytest
import torch

from fastformer import nn
from tests.nn.comparison import assert_drop_in, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SHAPES = [
    ((4, 7, 48), 48),  # a transformer's activations
    ((5, 33), 33),  # no multiple of any vector width
    ((2, 3, 4, 5), (4, 5)),  # normalises over two dimensions
    ((6, 1), 1),  # a single column: variance zero
    ((0, 16), 16),  # no rows
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "normalized"), SHAPES)
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "none"])
def test_matches_torch(shape, normalized, affine, dtype):
    arguments = {"elementwise_affine": affine != "none", "bias": affine == "weight and bias", "dtype": dtype}
    torch.manual_seed(0)
    theirs = torch.nn.LayerNorm(normalized, **arguments)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    compare(nn.LayerNorm(normalized, **arguments), theirs, [torch.randn(shape, dtype=dtype)])


@pytest.mark.parametrize("arguments", [{}, {"eps": 1e-3}, {"elementwise_affine": False}, {"bias": False}], ids=str)
def test_is_a_drop_in(arguments):
    assert_drop_in(lambda: nn.LayerNorm(12, **arguments), lambda: torch.nn.LayerNorm(12, **arguments))
    assert isinstance(nn.LayerNorm(12), torch.nn.LayerNorm)  # code that looks for norm layers finds it


def test_reads_strided_input():
    x = torch.randn(6, 5, 16)
    module, peer = nn.LayerNorm(16), torch.nn.LayerNorm(16)
    torch.testing.assert_close(module(x.transpose(0, 1)), peer(x.transpose(0, 1)))
    torch.testing.assert_close(module(x[..., ::1][::2]), peer(x[::2]))


def test_names_the_shape_that_does_not_fit():
    with pytest.raises(ValueError, match="normalized_shape"):
        nn.LayerNorm(16)(torch.randn(3, 15))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "normalized"), SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm_matches_torch(shape, normalized, affine, dtype):
    # eps is given: torch's own default depends on the dtype, and the comparison is with float64
    arguments = {"eps": 1e-5, "elementwise_affine": affine, "dtype": dtype}
    torch.manual_seed(0)
    theirs = torch.nn.RMSNorm(normalized, **arguments)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    compare(nn.RMSNorm(normalized, **arguments), theirs, [torch.randn(shape, dtype=dtype)])


@pytest.mark.parametrize("arguments", [{}, {"eps": 1e-3}, {"elementwise_affine": False}], ids=str)
def test_rms_norm_is_a_drop_in(arguments):
    assert_drop_in(lambda: nn.RMSNorm(12, **arguments), lambda: torch.nn.RMSNorm(12, **arguments))
    assert isinstance(nn.RMSNorm(12), torch.nn.RMSNorm)


def test_rms_norm_names_the_shape_that_does_not_fit():
    with pytest.raises(ValueError, match="normalized_shape"):
        nn.RMSNorm((2, 16))(torch.randn(3, 16))
