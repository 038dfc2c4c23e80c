"""The kernels of embedding and rotary against the float64 reference: on a GPU, or in the interpreter (conftest.py)."""

from functools import partial

import pytest
import torch

from fastformer.backends.embedding_table import Table
from fastformer.backends.triton import embedding, layer_norm, rotary
from fastformer.backends.triton.launch import UNBOUNDED, RowTile
from tests import op_checks

check_embedding = partial(op_checks.check_embedding, embedding)
check_rotary = partial(op_checks.check_rotary, rotary)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.fixture
def draw(device):
    """Returns functions that give normally distributed tensors and indices, the same in every run."""
    g = torch.Generator().manual_seed(1234)
    return (
        lambda dtype, *shape: torch.randn(shape, generator=g).to(device=device, dtype=dtype),
        lambda n, *shape: torch.randint(n, shape, generator=g).to(device),
    )


@every_dtype
@pytest.mark.parametrize("cols", [1, 40, 300])
def test_one_table(draw, dtype, cols, device):
    normal, integers = draw
    table = Table(normal(dtype, 11, cols), integers(11, 14), 14, 0, 3, "input_ids")
    check_embedding((table,), 14, normal(dtype, 14, cols))
    check_embedding((table,), 14, normal(dtype, 14, cols), scale=3.0, dropout_p=0.3)


@every_dtype
@pytest.mark.parametrize("norm", [True, False])
def test_three_tables(draw, dtype, norm, device):
    normal, integers = draw
    tables = (
        Table(normal(dtype, 30, 70)[:, :50], integers(30, 24), 24, 0, -1, ""),  # rows at a distance
        Table(normal(dtype, 9, 50), None, 6, 2, -1, ""),  # the same positions in each of four sequences
        Table(normal(dtype, 2, 50), None, 1, 1, -1, ""),  # one segment for all: 24 takers of one row
    )
    parameters = (normal(dtype, 50), normal(dtype, 50)) if norm else None
    check_embedding(tables, 24, normal(dtype, 24, 50), scale=2.0, norm=parameters, dropout_p=0.25)
    check_embedding(tables, 24, normal(dtype, 24, 50), norm=parameters, needs=(False, True, False))


def test_few_rows_with_many_takers_are_summed_in_parts(draw, device, monkeypatch):
    normal, integers = draw
    monkeypatch.setattr(embedding, "program_limit", lambda device: 6)
    table = Table(normal(torch.float32, 2, 40), integers(2, 200), 200, 0, -1, "")
    check_embedding((table,), 200, normal(torch.float32, 200, 40))
    dout = normal(torch.float32, 200, 40)
    assert torch.equal(*(embedding._table_gradient(table, dout, 1.0) for _ in range(2)))


def test_rows_longer_than_a_block(draw, device, monkeypatch):
    normal, integers = draw
    chunks = (RowTile(UNBOUNDED, 1, 1, block_cols=32),)
    monkeypatch.setattr(embedding, "TILES", chunks)
    for name in ("FORWARD_TILES", "BACKWARD_TILES"):
        monkeypatch.setattr(layer_norm, name, chunks)
    table = Table(normal(torch.float32, 9, 70), integers(9, 5), 5, 0, -1, "")
    check_embedding((table,), 5, normal(torch.float32, 5, 70))
    parameters = (normal(torch.float32, 70), normal(torch.float32, 70))
    check_embedding((table,), 5, normal(torch.float32, 5, 70), norm=parameters, dropout_p=0.3)


def test_no_rows(draw, device):
    normal, integers = draw
    tables = (
        Table(normal(torch.float32, 4, 8), integers(4, 0), 0, 0, -1, ""),
        Table(normal(torch.float32, 4, 8), None, 3, 0, -1, ""),
    )
    check_embedding(tables, 0, normal(torch.float32, 0, 8), norm=(None, None))


def test_an_index_out_of_range_gives_nan_and_no_gradient(draw, device):
    normal, _ = draw
    table = Table(normal(torch.float32, 4, 8), torch.tensor([1, 4, -1, 2**40, 3], device=device), 5, 0, -1, "")
    out, *_ = embedding.forward((table,), (5,), 1.0, False, None, None, 0.0, 0.0, 0)
    assert out[1:4].isnan().all() and torch.equal(out[[0, 4]], table.weight[[1, 3]])
    dout = torch.ones(5, 8, device=device)
    (gradient,), *_ = embedding.backward(
        dout, (table,), 1.0, False, None, None, None, 0.0, 0, (True,), False, False, dout.dtype
    )
    assert torch.equal(gradient[:, 0], torch.tensor([0.0, 1, 0, 1], device=device))
    normed, *_ = embedding.forward((table,), (5,), 1.0, True, None, None, 1e-5, 0.0, 0)
    assert normed[1:4].isnan().all() and not normed[[0, 4]].isnan().any()


def test_strides_beyond_32_bits(draw, device):
    normal, _ = draw
    row = normal(torch.float32, 1, 40).as_strided((1, 40), (2**33, 1))
    table = Table(row, torch.zeros(1, dtype=torch.int64, device=device), 1, 0, -1, "")
    check_embedding((table,), 1, row)


# ---- rotary ----------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim, rotated", [(16, 16), (18, 10), (2, 2), (40, 8)])
def test_rotary(draw, dtype, interleaved, head_dim, rotated, device):
    normal, _ = draw
    q, k = normal(dtype, 2, 3, 7, head_dim), normal(dtype, 2, 2, 7, head_dim)
    cos, sin = normal(torch.float32, 2, 12, rotated // 2)
    check_rotary(q, k, cos, sin, offset=3, interleaved=interleaved)
    check_rotary(q, None, cos.to(dtype), sin.to(dtype), interleaved=interleaved, inplace=True)


def test_rotary_positions_and_strides(draw, device, monkeypatch):
    normal, integers = draw
    monkeypatch.setattr(rotary, "TILE", 32)  # four positions a program, and two programs along them
    q = normal(torch.float32, 2, 7, 5, 16).transpose(1, 2)
    k = normal(torch.float32, 2, 7, 3, 3, 16)[:, :, 1].transpose(1, 2)
    cos, sin = (normal(torch.float32, 20, 12)[:, :8] for _ in range(2))
    check_rotary(q, k, cos, sin, integers(20, 2, 7))
    check_rotary(q, k, cos, sin, integers(20, 1, 7).expand(2, 7))
    check_rotary(q, k, cos, sin, integers(20, 2, 1).expand(2, 7), inplace=True)
    check_rotary(q, k, cos, sin, batch_offset=7, interleaved=True)
    out, _ = rotary.forward(q, None, cos, sin, None, 0, 0, False, False, False)
    assert out.stride() == q.stride()


def test_a_position_out_of_range_gives_nan(draw, device):
    normal, _ = draw
    q, (cos, sin) = normal(torch.float32, 1, 2, 4, 12), normal(torch.float32, 2, 5, 4)
    ids = torch.tensor([[4, 5, -1, 2**40]], device=device)
    out, _ = rotary.forward(q, None, cos, sin, ids, 0, 0, False, False, False)
    assert not out[:, :, 0].isnan().any() and out[:, :, 1:, :8].isnan().all()
    assert torch.equal(out[..., 8:], q[..., 8:])
