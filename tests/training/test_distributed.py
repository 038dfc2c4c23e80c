"""Training on 2 and 4 processes gives the losses of one; ranks that die; resuming at another number of them."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch

from fastformer.data import EvaluationWindows
from fastformer.models import GPT2LMHeadModel
from fastformer.training import ParallelConfig
from fastformer.training.checkpoint import load_state
from fastformer.training.distributed import Distributed, connect
from fastformer.training.logs import read_metrics
from tests.training.jobs import ROOT, results_of

JOBS = ["ddp 2", "ddp 2 x tp 2", "fsdp 2 x tp 2", "ddp 2 to 1", "fsdp 4 to 2", "1 to tp 2"]
SAME = {"rel_tol": 0, "abs_tol": 3e-6}  # float32 roundings of a loss of 2.4, and of ten steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of("training", tmp_path_factory)


@pytest.mark.parametrize("job", JOBS)
def test_losses_and_weights_do_not_depend_on_the_ranks(results, job):
    """Ten steps with clipping, accumulation, an average; the last three jobs were stopped and resumed elsewhere."""
    whole = results["whole"]
    for rank in results[job]:
        assert len(rank["losses"]) == len(whole["losses"]) == 10
        assert all(math.isclose(a, b, **SAME) for a, b in zip(rank["losses"], whole["losses"]))
        for name in ("validation_loss", "best", "train_loss"):
            assert math.isclose(rank["result"][name], whole["result"][name], **SAME)
        assert rank["result"]["tokens"] == whole["result"]["tokens"] == 10 * 2 * 4 * 8
    first = results[job][0]
    assert first["checkpoint"] < 2e-5 and first["ema"] < 2e-5  # steps of 1e-2
    assert len(set(whole["losses"])) == 10


@pytest.mark.parametrize("job, share", [("ddp 2", 1), ("ddp 2 x tp 2", 2), ("fsdp 2 x tp 2", 4), ("fsdp 4 to 2", 2)])
def test_what_a_rank_has_of_the_model(results, job, share):
    all_of_it = results["whole"]["parameters"]
    for rank in results[job]:
        assert rank["parameters"] >= all_of_it / share * 0.95
        assert rank["parameters"] <= all_of_it / share * 1.07  # norms and biases after sums are not split


def test_a_killed_rank_ends_the_job_and_is_named(results):
    message, seconds = results["ddp 2 killed"]
    assert "rank      : 1" in message and "Signal 9 (SIGKILL)" in message
    assert seconds < 60  # with the start and six steps; waiting for a timeout would take 30 minutes


def test_an_error_on_a_rank_ends_the_job_and_is_its_reason(results):
    message, seconds = results["fsdp 4 error"]
    reason = message[message.index("Root Cause") :]
    assert "rank      : 3" in reason and "the disk with the corpus is gone" in reason
    assert seconds < 60


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_with_targets_and_without(results, strategy):
    for rank in results[strategy]:
        assert all(math.isclose(a, b, **SAME) for a, b in zip(rank["uneven"], results["uneven"], strict=True))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_drop_other_elements(results, strategy):
    (losses, a), (same, b) = (rank["dropout"] for rank in results[strategy])
    assert losses == same and all(map(math.isfinite, losses)) and a != b


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_bad_loss_names_the_samples_of_all_ranks(results, strategy):
    for rank in results[strategy]:
        # The third step's two batches of four windows, which two ranks share.
        named = re.findall(r"(\d+) \(from token", rank["bad"])
        assert "at step 3" in rank["bad"] and sorted(map(int, named)) == list(range(16, 24))


def test_bytes_that_a_step_sends(results):
    """Once the gradients with ddp; with fsdp the weights twice and the gradients once; docs/scaling.md."""
    small = 200  # losses, counts and norms; and what fsdp pads
    ddp, fsdp, rounded = (results[a][0][b] for a, b in (("ddp", "traffic"), ("fsdp", "traffic"), ("fsdp", "bfloat16")))
    size = ddp["parameters"]
    assert size <= ddp["sent"]["allreduce_"] < size + small
    assert not ddp["sent"].keys() & {"_allgather_base_", "_reduce_scatter_base_"}
    assert 2 * size <= fsdp["sent"]["_allgather_base_"] < 2 * (size + small)
    assert size <= fsdp["sent"]["_reduce_scatter_base_"] < size + small
    assert fsdp["sent"]["allreduce_"] < small
    assert rounded["sent"]["_allgather_base_"] * 2 == fsdp["sent"]["_allgather_base_"]
    assert rounded["sent"]["_reduce_scatter_base_"] == fsdp["sent"]["_reduce_scatter_base_"]
    assert 0 < abs(rounded["loss"] - fsdp["loss"]) < 0.02


@pytest.mark.parametrize("job", JOBS)
def test_one_process_reads_what_ranks_have_written(results, job):
    """Moments and averages of q, k and v side by side, of rows of them, of a vocabulary that is not shared equally."""
    first = results[job][0]
    assert len(first["state"]) > 60 and first["state"].keys() == first["read"].keys()
    different = [name for name, tensor in first["state"].items() if not tensor.equal(first["read"][name])]
    assert not different


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tp"])
def test_other_ranks_read_what_ranks_have_written(results, strategy):
    """Two ranks what four had."""
    written = results["fsdp 2 x tp 2"][0]["state"]
    read = results["fsdp" if strategy == "tp" else strategy][0]["read"][strategy]
    assert written.keys() == read.keys() and all(tensor.equal(read[name]) for name, tensor in written.items())


@pytest.mark.parametrize("strategy", ["fsdp", "tp"])
def test_a_run_of_several_ranks_resumes_to_the_bit(results, strategy):
    for rank in results["fsdp"]:
        whole, part = rank[f"resumed {strategy}"]["losses"]
        assert rank[f"resumed {strategy}"]["begun"] == 4
        assert len(whole) == 10 and whole == part


def test_a_full_disk_of_one_rank_is_an_error_of_all_and_leaves_the_checkpoint_before(results):
    for rank in results["fsdp"]:
        assert re.search("could not write the checkpoint .*rank 1: .*; .* as it was", rank["full disk"]["error"])
        assert rank["full disk"]["left"] == ["checkpoint"] and rank["full disk"]["step"] == 1


def test_every_rank_has_written_a_file_and_each_is_checked(results):
    for rank in results["fsdp"]:
        assert rank["full disk"]["files"] == ["__0_0.distcp", "__1_0.distcp"]
        assert rank["full disk"]["damage"] == "training_state/__1_0.distcp has other contents than were written"


@pytest.mark.parametrize("strategy", ["fsdp", "tp"])
def test_an_infinite_gradient_on_one_rank_skips_the_step_on_all(results, strategy):
    whole, ranks = results["float16"], [rank[f"float16 {strategy}"] for rank in results["fsdp"]]
    assert not whole["changed"][3] and whole["changed"].count(True) >= 4
    for rank in ranks:
        assert rank["changed"] == whole["changed"] and rank["scales"] == whole["scales"]
        assert rank["losses"] == ranks[0]["losses"]
        assert all(math.isclose(a, b, abs_tol=2e-3) for a, b in zip(rank["losses"], whole["losses"], strict=True))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("samples, rows", [(9, ([2, 2, 1], [2, 2, 1])), (11, ([2, 2, 2], [2, 2, 1]))])
def test_ranks_share_the_samples_that_are_measured(results, strategy, samples, rows):
    """In batches of four. The ninth sample is the first rank's; the other runs it as well and drops what it said."""
    whole = results["measured"][samples]
    assert whole["rows"] == [4, 4, samples - 8]
    for rank, mine in zip(results[strategy], rows):
        found = rank["measured"][samples]
        assert found["rows"] == mine
        assert math.isclose(found["loss"], whole["loss"], rel_tol=1e-6)
        assert found["scores"] == whole["scores"] and found["references"] == whole["references"]
        assert found["worst"] == pytest.approx(whole["worst"], abs=2e-4)  # in the same order


def test_torchrun_and_the_command(tmp_path):
    """``fastformer pretrain`` under ``torchrun``, resumed without it."""
    (tmp_path / "text.txt").write_text("to be or not to be that is the question " * 40)
    out = tmp_path / "run"
    options = {
        "data.path": tmp_path / "text.txt",
        "data.block-size": 8,
        "data.batch-size": 4,
        "model.n-layer": 1,
        "model.n-head": 2,
        "model.n-embd": 8,
        "run.out": out,
        "run.device": "cpu",
        "run.eval-windows": 4,
        "run.log-every": 1,
    }
    command = ["-m", "fastformer", "pretrain", "--run.no-tensorboard"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [*torchrun, *command, "--run.max-steps", "2", "--parallel.strategy", "fsdp"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("2 steps, 64 tokens") == 1  # the first rank speaks
    assert load_state(out / "checkpoint")["step"] == 2 and (out / "loss.png").is_file()
    GPT2LMHeadModel.from_pretrained(out / "checkpoint")
    assert [r["step"] for r in read_metrics(out) if "loss" in r] == [1, 2]


def test_strategies_and_the_launcher_go_together(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"parallel.strategy: ddp needs several processes; start them with `torchrun"):
        with connect(ParallelConfig("ddp")):
            pass
    with connect(ParallelConfig()) as alone:
        assert (alone.rank, alone.world_size, alone.writes) == (0, 1, True)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"parallel.strategy: none, but there are 4 processes"):
        with connect(ParallelConfig()):
            pass
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(ValueError, match=r"parallel.tensor: 3 does not divide the 4 processes"):
        Distributed(ParallelConfig("ddp", tensor=3), "cpu")


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"strategy": "zero"}, r"parallel.strategy: got 'zero', expected none, ddp, fsdp or tp"),
        ({"tensor": -1}, r"parallel.tensor: got -1, expected at least 0"),
        ({"gather_dtype": "float16"}, r"parallel.gather_dtype: got 'float16', expected float32 or bfloat16"),
        ({"timeout_minutes": 0}, r"parallel.timeout_minutes: got 0, expected above 0"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**setting)


def test_ranks_share_the_evaluation_windows():
    """Five windows in batches of four: the last has one, and the second rank a batch that is not scored."""
    tokens = torch.arange(41)
    whole = list(EvaluationWindows(tokens, 8, 4))
    ranks = [list(EvaluationWindows(tokens, 8, 4, rank=rank, world_size=2)) for rank in range(2)]
    for batch, a, b in zip(whole, *ranks, strict=True):
        rows = torch.cat([a["shift_labels"], b["shift_labels"]])
        scored = rows[(rows != -100).all(1)]
        assert sorted(scored[:, 0].tolist()) == batch["shift_labels"][:, 0].tolist()
        assert torch.equal(a["shift_labels"], batch["shift_labels"][::2])
    assert (ranks[1][1]["shift_labels"] == -100).all() and len(ranks[1][1]["input_ids"]) == 1
