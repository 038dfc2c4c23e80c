"""Trains in processes that are killed (SIGKILL) again and again, some of them while they write a checkpoint.

    python -m tests.training.kills OUT SEED

In each precision, whole/ is trained by this process, without a stop. Then killed/: each life is forked from this
process, which on one thread has nothing that a fork would lose, and goes on from what the one before it left. After
some kills the next life may run to its end. Prints how many there were, and how many in a save.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from fastformer.training import OptimizerConfig
from fastformer.training.checkpoint import has_checkpoint
from fastformer.training.logs import read_metrics
from tests.training.runs import make_config, make_trainer, resumed

STEPS = 32


def configure(out, dtype, **run):
    return make_config(
        out,
        dropout=0.2,
        optimizer=OptimizerConfig(learning_rate=3e-3, accumulate=2, ema_decay=0.9),
        max_steps=STEPS,
        save_every=3,
        eval_every=4,
        keep_best=True,
        eval_windows=8,
        dtype=dtype,
        **run,
    )


def live(out, dtype):
    """Trains from what is there to the end."""
    config = configure(out, dtype)
    started = has_checkpoint(out)
    torch.manual_seed(time.monotonic_ns() % 2**31)  # nothing may depend on what a new process has
    trainer = resumed(config, out) if started else make_trainer(config)
    if trainer.scaler.is_enabled() and not started:
        # A scale that overflows at first and grows within the run: its changes have to be resumed as well.
        trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**28, "growth_interval": 7})
    trainer.fit()


def kill(out, dtype, kills, draw):
    """Lives until ``kills`` of them were killed and one was not; returns how many were, and how many in a save."""
    killed = in_save = 0
    while True:
        born = time.time_ns()
        child = os.fork()
        if not child:
            try:
                live(out, dtype)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if killed < kills or (not in_save and killed < 3 * kills):
            if killed % 2 == 0 or killed >= kills:
                wait_for_save(out, child, born, draw)
            elif killed % 4 == 1:
                wait_for_step(out, child, born, draw)
            else:
                time.sleep(draw.uniform(0, 0.1))  # while it starts
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            if os.waitstatus_to_exitcode(status):
                sys.exit("a life ended with an error")
            break
        killed += 1
        in_save += writing(out, born)
    return killed, in_save


def wait_for_save(out, child, born, draw):
    """Until the child is somewhere in the first or second of its saves, or has ended."""
    saves = draw.randrange(1, 3)
    while not ended(child):
        if writing(out, born):
            saves -= 1
            if not saves:
                time.sleep(draw.uniform(0, 0.003))
                return
            while writing(out, born):
                time.sleep(0.0002)
        time.sleep(0.0002)


def wait_for_step(out, child, born, draw):
    """Until the child has logged a few steps, or has ended."""
    log, first, more = out / "metrics.jsonl", None, draw.randrange(1, 7)
    while not ended(child):
        if log.exists() and log.stat().st_mtime_ns > born:  # rewritten by this child, up to its checkpoint's step
            steps = [record["step"] for record in read_metrics(out)]
            first = (steps or [0])[-1] if first is None else first
            if steps and steps[-1] >= first + more:
                break
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.02))


def ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def writing(out, since):
    """Whether a checkpoint begun after ``since`` (ns) is not finished."""
    try:
        return (out / "checkpoint.writing").stat().st_ctime_ns > since
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, seed = Path(sys.argv[1]), int(sys.argv[2])
    for kind, count in (("float32", 4), ("float16", 4)):
        live(place / kind / "whole", kind)
        print(*kill(place / kind / "killed", kind, count, random.Random(seed)))
