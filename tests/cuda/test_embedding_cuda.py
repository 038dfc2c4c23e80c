"""embedding and rotary of csrc/cuda against float64, under the emulator or on a GPU."""

from functools import partial

import pytest
import torch

from fastformer.backends.cuda import _call, embedding, emulation, rotary
from fastformer.backends.embedding_table import Table
from tests import op_checks
from tests.cuda.orders import guarded_outputs, running

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
check_embedding = partial(op_checks.check_embedding, embedding)
check_rotary = partial(op_checks.check_rotary, rotary)


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    with guarded_outputs(monkeypatch, _call, embedding, rotary):
        assert embedding.empty(torch.zeros(1), 2).isnan().all()
        yield


@pytest.fixture
def draw(device):
    """Returns functions that give normally distributed tensors and indices, the same in every run."""
    g = torch.Generator().manual_seed(1234)
    return (
        lambda dtype, *shape: torch.randn(shape, generator=g).to(device=device, dtype=dtype),
        lambda n, *shape: torch.randint(n, shape, generator=g).to(device),
    )


def gradient(table, dout, scale=1.0):
    (result,), *_ = embedding.backward(
        dout, (table,), scale, False, None, None, None, 0.0, 0, (True,), False, False, dout.dtype
    )
    return result


# A single column, several rows to a warp, one element at a time over several warps, several packs of a thread.
@every_dtype
@pytest.mark.parametrize("cols", [1, 40, 301, 520])
def test_one_table(draw, dtype, cols, device):
    normal, integers = draw
    table = Table(normal(dtype, 11, cols), integers(11, 14), 14, 0, 3, "input_ids")
    check_embedding((table,), 14, normal(dtype, 14, cols))
    check_embedding((table,), 14, normal(dtype, 14, cols), scale=3.0, dropout_p=0.3)


@every_dtype
@pytest.mark.parametrize("norm", ["", "same dtype", "float32"])
def test_three_tables(draw, dtype, norm, device):
    normal, integers = draw
    tables = (
        Table(normal(dtype, 30, 88)[:, :72], integers(30, 24), 24, 0, -1, ""),  # rows at a distance
        Table(normal(dtype, 9, 72), None, 6, 2, -1, ""),  # the same positions in each of four sequences
        Table(normal(dtype, 2, 72), None, 1, 1, -1, ""),  # one segment for all: 24 takers of one row
    )
    param_dtype = torch.float32 if norm == "float32" else dtype
    parameters = (normal(param_dtype, 72), normal(param_dtype, 72)) if norm else None
    check_embedding(tables, 24, normal(dtype, 24, 72), scale=2.0, norm=parameters, dropout_p=0.25)
    if not norm:
        check_embedding(tables, 24, normal(dtype, 24, 90)[:, 9:81], needs=(False, True, False))


# One element at a time, in packs, and their first width that no block's registers hold; with and without a norm.
@pytest.mark.parametrize(("cols", "dtype"), [(4099, torch.bfloat16), (16392, torch.float16)], ids=str)
def test_rows_longer_than_a_block(draw, cols, dtype, device):
    normal, integers = draw
    table = Table(normal(dtype, 3, cols), integers(3, 2), 2, 0, -1, "")
    parameters = (normal(dtype, cols), normal(dtype, cols))
    check_embedding((table,), 2, normal(dtype, 2, cols), norm=parameters, dropout_p=0.3)
    check_embedding((table,), 2, normal(dtype, 2, cols))


@pytest.mark.parametrize("order", emulation.ORDERS)
def test_rows_with_many_takers_are_summed_in_groups(draw, order, device):
    """Runs that hold whole groups, with and without takers beside them, of ids and of positions; in every order of
    threads, bit for bit."""
    normal, integers = draw
    ids = torch.sort(integers(3, 300)).values
    ids[:64] = 0  # ends with a group
    cases = [Table(normal(torch.float32, 5, 12), ids[torch.randperm(300)].contiguous(), 300, 0, 2, "")]
    cases.append(Table(normal(torch.float32, 7, 12), None, 4, 2, -1, ""))  # each of four positions 75 times
    cases.append(Table(normal(torch.float32, 2, 12), None, 1, 0, -1, ""))
    dout = normal(torch.float32, 300, 12)
    firsts = [gradient(table, dout) for table in cases]
    with running(order, "at_once"):
        for table, first in zip(cases, firsts, strict=True):
            check_embedding((table,), 300, dout, scale=2.0)
            assert torch.equal(gradient(table, dout), first)


def test_a_large_vocabulary_is_sorted_in_order(draw, device):
    """Three digits, more indices than one block's share: short runs are summed in the order of the rows, exactly."""
    normal, integers = draw
    ids = integers(66000, 1500)
    ids[integers(1500, 60)] = 65999
    ids[integers(1500, 9)] = 256
    ids[1400:1410] = ids[7]
    dout = normal(torch.float32, 1500, 4)
    table = Table(normal(torch.float32, 66000, 4), ids, 1500, 0, -1, "")
    wanted = torch.zeros(66000, 4).index_add_(0, ids.cpu(), dout.cpu())
    result = gradient(table, dout).cpu()
    short = torch.ones(66000, dtype=torch.bool)
    short[65999] = False  # there may be a group in it
    assert torch.equal(result[short], wanted[short])
    torch.testing.assert_close(result[65999], wanted[65999])


@pytest.mark.parametrize("order", emulation.ORDERS)
def test_any_order_of_threads(draw, order, device):
    """The norm over several warps: bit for bit what the first order gave."""
    normal, integers = draw
    table = Table(normal(torch.bfloat16, 5, 1100), integers(5, 3), 3, 0, -1, "")
    weight, bias, dout = normal(torch.bfloat16, 1100), normal(torch.bfloat16, 1100), normal(torch.bfloat16, 3, 1100)

    def run():
        out, mean, rstd = embedding.forward((table,), (3,), 1.0, True, weight, bias, 1e-5, 0.2, 7)
        (gradient,), dweight, dbias = embedding.backward(
            dout, (table,), 1.0, True, weight, mean, rstd, 0.2, 7, (True,), True, True, torch.bfloat16
        )
        return out, mean, rstd, gradient, dweight, dbias

    first = run()
    with running(order, "at_once"):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_no_rows(draw, device):
    normal, integers = draw
    tables = (
        Table(normal(torch.float32, 4, 8), integers(4, 0), 0, 0, -1, ""),
        Table(normal(torch.float32, 4, 8), None, 3, 0, -1, ""),
    )
    check_embedding(tables, 0, normal(torch.float32, 0, 8), norm=(normal(torch.float32, 8), normal(torch.float32, 8)))


def test_an_index_out_of_range_gives_nan_and_no_gradient(draw, device):
    normal, _ = draw
    table = Table(normal(torch.float32, 4, 8), torch.tensor([1, 4, -1, 2**40, 3], device=device), 5, 0, -1, "")
    out, *_ = embedding.forward((table,), (5,), 1.0, False, None, None, 0.0, 0.0, 0)
    assert out[1:4].isnan().all() and torch.equal(out[[0, 4]], table.weight[[1, 3]])
    taken = gradient(table, torch.ones(5, 8, device=device))
    assert torch.equal(taken[:, 0], torch.tensor([0.0, 1, 0, 1], device=device))
    normed, *_ = embedding.forward((table,), (5,), 1.0, True, None, None, 1e-5, 0.0, 0)
    assert normed[1:4].isnan().all() and not normed[[0, 4]].isnan().any()
    positions = table._replace(ids=None, offset=-2)  # from -2 to 2
    assert embedding.forward((positions,), (5,), 1.0, False, None, None, 0.0, 0.0, 0)[0].isnan()[:, 0].sum() == 2
    taken = gradient(positions, torch.ones(70, 8, device=device))  # groups of what is out of range among them
    assert torch.equal(taken[:, 0], torch.tensor([14.0, 14, 14, 0], device=device))
    empty = Table(normal(torch.float32, 0, 8), torch.zeros(1, dtype=torch.int64, device=device), 1, 0, -1, "")
    assert embedding.forward((empty,), (3,), 1.0, False, None, None, 0.0, 0.0, 0)[0].isnan().all()
    assert gradient(empty, torch.ones(3, 8, device=device)).shape == (0, 8)


def test_strides(draw, device):
    """Rows that start on packs and do not end on them; rows further apart than 32 bits can say."""
    normal, integers = draw
    table = Table(normal(torch.float16, 5, 48)[:, :41], integers(5, 7), 7, 0, -1, "")
    check_embedding((table,), 7, normal(torch.float16, 7, 41), norm=(normal(torch.float16, 41), None))
    row = normal(torch.float32, 1, 40).as_strided((1, 40), (2**33, 1))
    table = Table(row, torch.zeros(1, dtype=torch.int64, device=device), 1, 0, -1, "")
    check_embedding((table,), 1, row)


def test_embedding_errors_name_the_argument(draw, device):
    normal, integers = draw
    table = Table(normal(torch.float32, 4, 8), integers(4, 6), 6, 0, -1, "")
    out = torch.zeros(6, 8, device=device)

    def call(tables=(table,), out=out, normalize=False, p=0.0):
        _call.library().embedding_forward(tables, out, 1.0, normalize, 1e-5, p, 0, None, None, None, None, 0)

    with pytest.raises(ValueError, match=r"tables\[0\].period: 4 does not divide 6 rows"):
        call((table._replace(period=4),))
    with pytest.raises(ValueError, match="mean, rstd: must not be NULL"):
        call(normalize=True)
    with pytest.raises(ValueError, match=r"dropout_p: -1 is not in \[0, 1\]"):
        call(p=-1.0)
    with pytest.raises(NotImplementedError, match="float64 has no CUDA kernel"):
        call((table._replace(weight=table.weight.double()),), out.double())
    backward = _call.library().embedding_backward
    with pytest.raises(ValueError, match="dsummed: must not be NULL"):
        backward(out, (table,), 1.0, False, 0.5, 0, (None, None, None), None, (table.weight,), None, None, None, 0)
    with pytest.raises(ValueError, match="workspace: must not be NULL"):
        backward(out, (table,), 1.0, False, 0.0, 0, (None, None, None), None, (table.weight,), None, None, None, 0)


# ---- rotary ----------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotated"),
    [
        (32, 32),  # packs
        (48, 16),  # packs, and packs behind them that are copied
        (18, 10),  # one element at a time, likewise
        (2, 2),  # one pair
    ],
)
def test_rotary(draw, dtype, interleaved, head_dim, rotated, device):
    normal, _ = draw
    q, k = normal(dtype, 2, 5, 7, head_dim), normal(dtype, 2, 2, 7, head_dim)  # more heads than are in flight
    cos, sin = normal(torch.float32, 2, 12, rotated // 2)
    check_rotary(q, k, cos, sin, offset=3, interleaved=interleaved)
    check_rotary(q, None, cos.to(dtype), sin.to(dtype), interleaved=interleaved, inplace=True)


@pytest.mark.parametrize("count", [0, 40], ids=["all heads in a block", "shares of them"])
def test_rotary_positions_and_strides(draw, count, device):
    normal, integers = draw
    if device == "cpu":
        _call.library().set_multiprocessors(count)
    try:
        q = normal(torch.float32, 2, 7, 9, 16).transpose(1, 2)
        k = normal(torch.float32, 2, 7, 3, 3, 16)[:, :, 1].transpose(1, 2)
        cos, sin = (normal(torch.float32, 20, 12)[:, :8] for _ in range(2))
        check_rotary(q, k, cos, sin, integers(20, 2, 7))
        check_rotary(q, k, cos, sin, integers(20, 1, 7).expand(2, 7))
        check_rotary(q, k, cos, sin, integers(20, 2, 1).expand(2, 7), inplace=True)
        check_rotary(q, k, cos, sin, batch_offset=7, interleaved=True)
        check_rotary(q[:, ::2], k[:, ::2], cos, sin, offset=2)  # heads further apart than those of the result
        out, _ = rotary.forward(q, None, cos, sin, None, 0, 0, False, False, False)
        assert out.stride() == q.stride()
    finally:
        if device == "cpu":
            _call.library().set_multiprocessors(3)


def test_a_position_out_of_range_gives_nan(draw, device):
    normal, _ = draw
    q, (cos, sin) = normal(torch.float32, 1, 2, 4, 12), normal(torch.float32, 2, 5, 4)
    ids = torch.tensor([[4, 5, -1, 2**40]], device=device)
    out, _ = rotary.forward(q, None, cos, sin, ids, 0, 0, False, False, False)
    assert not out[:, :, 0].isnan().any() and out[:, :, 1:, :8].isnan().all()
    assert torch.equal(out[..., 8:], q[..., 8:])


def test_rotary_errors_name_the_argument(draw, device):
    normal, _ = draw
    q, (cos, sin) = normal(torch.float32, 1, 2, 4, 12), normal(torch.float32, 2, 5, 4)

    def call(q=q, q_out=q, k=None, k_out=None, cos=cos):
        _call.library().rotary(q, q_out, k, k_out, cos, sin, None, 0, 0, False, False, 0)

    with pytest.raises(ValueError, match=r"rotary_dim: 14 is odd, or not in \[2, 12\]"):
        call(cos=normal(torch.float32, 5, 7))
    with pytest.raises(ValueError, match="q, q_out, k, k_out, cos, sin: one is NULL"):
        call(k=q)
    with pytest.raises(NotImplementedError, match="float64 has no CUDA kernel"):
        call(q.double(), q.double())
