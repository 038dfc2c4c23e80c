"""Jobs of several processes for the tests of distributed training.

    python -m tests.training.jobs SUITE OUT

Runs every job of a suite and leaves what they return, by name, in OUT/results.pt: for each job the list of what its
ranks return, or (the message, seconds) of a job that failed. This process imports torch once, and its ranks are forked
from it, as ``torchrun`` would start them; on one thread there is nothing that a fork would lose.
"""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]


class Traffic(TorchDispatchMode):
    """The collectives called inside: (name, bytes of the largest tensor given)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.calls.append((function.__name__.split(".")[0], max(t.nbytes for t in tensors)))
        return function(*args, **(kwargs or {}))


def launch(ranks, function, *arguments):
    """What ``function(*arguments)`` returns on each of ``ranks`` processes."""
    config = LaunchConfig(
        1,
        1,
        ranks,
        run_id="test",
        start_method="fork",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        monitor_interval=0.05,
        max_restarts=0,
    )
    results = elastic_launch(config, function)(*arguments)
    return [results[rank] for rank in range(ranks)]


def fails(ranks, function, *arguments):
    """The message and the seconds of a job that has to fail."""
    begin = time.monotonic()
    try:
        launch(ranks, function, *arguments)
    except ChildFailedError as error:
        return str(error), time.monotonic() - begin
    raise AssertionError("the job did not fail")


def results_of(suite, tmp_path_factory):
    """What the jobs of ``suite`` return, which are run once, however many processes pytest has."""
    out = tmp_path_factory.getbasetemp()
    out = (out.parent if "PYTEST_XDIST_WORKER" in os.environ else out) / f"jobs-{suite}"
    out.mkdir(exist_ok=True)
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "results.pt").is_file():
            script = [sys.executable, "-m", "tests.training.jobs", suite, str(out)]
            done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, timeout=900)
            assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(out / "results.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    suite, out = sys.argv[1:]
    from tests.training import jobs_models, jobs_training, jobs_tuning

    run = {"training": jobs_training.run, "models": jobs_models.run, "tuning": jobs_tuning.run}[suite]
    torch.save(run(Path(out)), Path(out) / "results.pt")
