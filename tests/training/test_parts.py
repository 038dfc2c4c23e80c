"""Boxes of tensors, written and read by other boxes; what does not fit, and an index that is not one."""

import os
import pickle

import pytest
import torch
import torch.distributed as dist

from fastformer.training.parallel import Part, read_missing
from fastformer.training.parts import INDEX, read_parts, write_parts

WHOLE = torch.arange(35.0).view(5, 7)
BFLOAT16 = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)


def part(*boxes, of=WHOLE):
    """What has ``of`` in the ``boxes`` (first row, first column, rows, columns)."""
    return Part(of.shape, [((r, c), of[r : r + rows, c : c + columns].clone()) for r, c, rows, columns in boxes])


@pytest.fixture
def written(tmp_path):
    """A tensor in three boxes and one in another type, of the only rank there is."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parts = {"a": part((0, 0, 2, 7), (2, 0, 3, 3), (2, 3, 3, 4)), "b": Part(torch.Size([3]), [((0,), BFLOAT16)])}
        assert [path.name for path in write_parts(tmp_path / "parts", parts)] == ["__0_0.distcp"]
        yield tmp_path / "parts"
    finally:
        dist.destroy_process_group()


def test_other_boxes_are_read(written):
    """Across the boxes that were written, into views, and nothing at all."""
    target = torch.full((5, 7), -1.0)
    boxes = [((1, 2), target[1:4, 2:6]), ((4, 0), target[4:, :1])]
    vector = torch.zeros(2, dtype=torch.bfloat16)
    read_parts(written, {"a": Part(WHOLE.shape, boxes), "b": Part(torch.Size([3]), [((1,), vector)])})
    expected = torch.full((5, 7), -1.0)
    expected[1:4, 2:6], expected[4:, :1] = WHOLE[1:4, 2:6], WHOLE[4:, :1]
    assert target.equal(expected) and vector.tolist() == [2.0, 3.0]
    read_parts(written, {"a": Part(WHOLE.shape, [])})


def test_what_is_not_there_is_named(written):
    with pytest.raises(ValueError, match=r"cannot resume: .*parts has no c"):
        read_parts(written, {"c": part((0, 0, 5, 7))})
    with pytest.raises(ValueError, match=r"cannot resume: a is \(5, 7\) in .*parts, \(4, 7\) here"):
        read_parts(written, {"a": part((0, 0, 4, 7), of=WHOLE[:4])})
    with pytest.raises(ValueError, match="state: has no exp_avg/w, which is in files of its own"):
        read_missing({"exp_avg/w": part((0, 0, 5, 7))}, None)


def test_boxes_have_to_be_the_whole_tensor(written):
    with pytest.raises(OSError, match="rank 0: Failed to validate global plan"):
        write_parts(written.with_name("twice"), {"a": part((0, 0, 3, 7), (2, 0, 3, 7))})
    write_parts(written.with_name("half"), {"a": part((0, 0, 2, 7))})
    read_parts(written.with_name("half"), {"a": part((1, 3, 1, 2))})
    with pytest.raises(ValueError, match=r"cannot resume: .*half has not all of a"):
        read_parts(written.with_name("half"), {"a": part((1, 3, 2, 2))})


class Command:
    def __reduce__(self):
        return os.system, ("true",)


def test_an_index_runs_nothing(written):
    (written / INDEX).write_bytes(pickle.dumps(Command()))
    with pytest.raises(pickle.UnpicklingError, match=r"system does not belong in the index of a checkpoint"):
        read_parts(written, {"a": part((0, 0, 5, 7))})
