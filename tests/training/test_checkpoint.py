"""Checkpoints: killed, cut off, damaged or without room on the disk, a whole one is left, and what happened is said."""

import os
import resource

import pytest
import torch

from fastformer.models import GPT2LMHeadModel
from fastformer.training import checkpoint as checkpoints
from fastformer.training.checkpoint import (
    CheckpointError,
    find_checkpoint,
    has_checkpoint,
    load_state,
    restore_checkpoint,
    save_checkpoint,
)
from fastformer.training.logs import read_metrics
from tests.training.runs import TOKENIZER, make_config, make_model, make_trainer, resumed


@pytest.fixture
def model():
    return make_model(make_config("unused"))


def save(out, model, step, **options):
    return save_checkpoint(out / "checkpoint", model, TOKENIZER, {"step": step}, **options)


def names(out):
    return sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize("moment", ["writing", "first rename", "second rename"])
def test_a_save_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, model, moment):
    save(tmp_path, model, 4)

    def killed(*_):
        raise KeyboardInterrupt

    renames = iter(range(10))
    rename = os.rename

    def dies(source, target):
        if next(renames) == {"first rename": 0, "second rename": 1}[moment]:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        if moment == "writing":
            patch.setattr(checkpoints.torch, "save", killed)
        else:
            patch.setattr(checkpoints.os, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, model, 99)
    found = find_checkpoint(tmp_path)
    assert load_state(found)["step"] == 4
    GPT2LMHeadModel.from_pretrained(found)
    # And the next save works, leaving nothing else behind.
    save(tmp_path, model, 99)
    assert load_state(find_checkpoint(tmp_path))["step"] == 99
    assert names(tmp_path) == ["checkpoint"]


def test_rotation_keeps_the_newest(tmp_path, model):
    for step in (5, 10, 15, 200):
        save(tmp_path, model, step, keep=3)
    assert names(tmp_path) == ["checkpoint", "checkpoint-10", "checkpoint-15"]
    assert [load_state(tmp_path / name)["step"] for name in names(tmp_path)] == [200, 10, 15]
    save(tmp_path, model, 205, keep=2)
    assert names(tmp_path) == ["checkpoint", "checkpoint-200"]


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "file, harm, message",
    [
        ("model.safetensors", cut, r"model.safetensors has \d+ bytes of \d+"),
        ("training_state.pt", cut, r"training_state.pt has \d+ bytes of \d+"),
        ("model.safetensors", flip, "model.safetensors has other contents than were written"),
        ("training_state.pt", os.unlink, "training_state.pt is missing"),
        ("manifest.json", cut, "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, model, file, harm, message):
    for step in (5, 10):
        save(tmp_path, model, step, keep=2)
    harm(tmp_path / "checkpoint" / file)
    with pytest.warns(UserWarning, match=rf"checkpoint is damaged: {message}; going back to .*checkpoint-5"):
        found = find_checkpoint(tmp_path)
    assert load_state(found)["step"] == 5
    with pytest.warns(UserWarning, match=message):
        assert restore_checkpoint(tmp_path) == tmp_path / "checkpoint"
    assert names(tmp_path) == ["checkpoint"] and find_checkpoint(tmp_path) == tmp_path / "checkpoint"
    harm(tmp_path / "checkpoint" / file)
    with pytest.raises(ValueError, match=f"{message}; there is no whole one before it"):
        find_checkpoint(tmp_path)


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(tmp_path):
    whole = make_config(tmp_path / "whole", dropout=0.1)
    make_trainer(whole).fit()
    part = make_config(tmp_path / "part", dropout=0.1, save_every=4)
    make_trainer(part).fit()
    cut(tmp_path / "part" / "checkpoint" / "training_state.pt")
    with pytest.warns(UserWarning, match="going back to .*checkpoint-8"):
        trainer = resumed(part, tmp_path / "part")
    assert trainer.step == 8
    trainer.fit()
    ends = [GPT2LMHeadModel.from_pretrained(tmp_path / name / "checkpoint").state_dict() for name in ("whole", "part")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_directory_written_elsewhere_is_taken_as_it_is(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model-2").mkdir()  # not an older "model"
    assert find_checkpoint(tmp_path / "model") == tmp_path / "model"
    with pytest.raises(FileNotFoundError, match=r"cannot resume: .* holds weights only"):
        load_state(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        find_checkpoint(tmp_path / "model-2")


@pytest.mark.parametrize("room", [10_000, 40_000], ids=["no weights", "weights but no state"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, room):
    """No file may grow beyond the room there is: what a full disk does to a write, this limit does."""
    trainer = make_trainer(make_config(tmp_path, max_steps=4, save_every=2))
    save, (before, largest) = trainer.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills_up():
        if trainer.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, largest))
        return save()

    trainer.save = fills_up
    try:
        with pytest.raises(
            CheckpointError, match=r"could not write the checkpoint .* MiB are free there; .* as it was"
        ):
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, largest))
    assert [name for name in names(tmp_path) if "checkpoint" in name] == ["checkpoint"]
    assert load_state(find_checkpoint(tmp_path))["step"] == 2


def test_a_disk_too_full_for_the_log(tmp_path):
    trainer = make_trainer(make_config(tmp_path, max_steps=400, save_every=1))
    before, largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer.save = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, largest))
    try:
        with pytest.raises(OSError, match=r"could not write the log: File too large: .*metrics.jsonl"):
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, largest))
    assert [record["step"] for record in read_metrics(tmp_path)][:3] == [1, 2, 3]  # whole lines, as far as they go


def test_a_run_that_has_not_saved_yet_has_no_checkpoint(tmp_path, model):
    assert not has_checkpoint(tmp_path)
    (tmp_path / "checkpoint.writing").mkdir()  # killed in its first save
    (tmp_path / "checkpoint.writing" / "config.json").write_text("{}")
    assert not has_checkpoint(tmp_path)
    save(tmp_path, model, 3)
    assert has_checkpoint(tmp_path)
