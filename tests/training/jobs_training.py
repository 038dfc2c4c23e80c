"""The same training at different numbers of ranks, stopped and resumed at others; see jobs.py."""

import contextlib
import dataclasses
import os
import signal

import torch
import torch.distributed as dist

from fastformer.data import Windows
from fastformer.models import GPT2LMHeadModel
from fastformer.training import BadLossError, OptimizerConfig, Parallel, ParallelConfig, Trainer
from fastformer.training.distributed import Distributed, connect
from tests.training.jobs import Traffic, fails, launch
from tests.training.jobs_state import float16, full_disk, measured, read_again, state_of, stopped_and_resumed
from tests.training.runs import TOKENS, losses, make_config, make_model, make_trainer, resumed, scored_by

STEPS, SAVED, STOPPED = 10, 4, 6
RESULTS = ("ddp 2", "ddp 2 x tp 2", "fsdp 2 x tp 2", "ddp 2 to 1", "fsdp 4 to 2", "1 to tp 2")


def configure(out, strategy="none", tensor=0, dropout=0.0, **changes):
    optimizer = OptimizerConfig(learning_rate=1e-2, clip_norm=0.3, accumulate=2, ema_decay=0.9)
    changes = {"max_steps": STEPS, "save_every": SAVED, "eval_every": 5, "eval_windows": 6, **changes}
    config = make_config(out, dropout=dropout, optimizer=optimizer, **changes)
    return dataclasses.replace(config, parallel=ParallelConfig(strategy, tensor))


def train(out, strategy, tensor=0, resume=False, stop=None, recompute=False):
    """Trains to the end, or to where ``stop`` is called on the last rank."""
    config = configure(out, strategy, tensor, recompute=recompute)
    with connect(config.parallel, "cpu") as parallel:
        trainer = resumed(config, out, parallel=parallel) if resume else make_trainer(config, parallel=parallel)
        if stop is not None and dist.get_rank() == dist.get_world_size() - 1:
            step = trainer.train_step
            trainer.train_step = lambda: stop() if trainer.step == STOPPED else step()
        result = trainer.fit()
        parameters = sum(
            p.numel() if not hasattr(p, "to_local") else p.to_local().numel() for p in trainer.model.parameters()
        )
        found = {"result": dataclasses.asdict(result), "losses": losses(out), "parameters": parameters}
        return found | {"state": state_of(trainer)}


def raise_an_error():
    raise RuntimeError("the disk with the corpus is gone")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class HalfScored(Windows):
    """Only every second window is scored: at two ranks, all of the first's and none of the second's."""

    def next_batch(self):
        batch = super().next_batch()
        odd = torch.tensor(batch["_ids"]) % 2 == 1
        batch["shift_labels"][odd] = -100
        return batch


def extras(out, strategy):
    """Smaller things, with one connection: losses with uneven targets and with dropout, what a step sends, an error."""
    result = {}
    config = configure(out, strategy)
    with connect(config.parallel, "cpu") as parallel:
        result["uneven"] = uneven(config, parallel)
        result["traffic"] = traffic(dataclasses.replace(config, optimizer=OptimizerConfig()), parallel)
        if strategy == "fsdp":
            rounded = Distributed(ParallelConfig("fsdp", gather_dtype="bfloat16"), "cpu")
            result["bfloat16"] = traffic(dataclasses.replace(config, optimizer=OptimizerConfig()), rounded)
        torch.manual_seed(0)
        make_trainer(configure(out / "dropout", strategy, dropout=0.5), parallel=parallel).fit()
        result["dropout"] = losses(out / "dropout"), float(torch.rand(()))
        result["bad"] = bad_loss(out / "bad", parallel)
        result["measured"] = {samples: measured(parallel, samples) for samples in (9, 11)}
        result["read"] = {strategy: read_again(config, out.parent / "fsdp 2 x tp 2", parallel)}
        if strategy == "fsdp":
            tensor = Distributed(ParallelConfig("tp"), "cpu")
            result["read"]["tp"] = read_again(config, out.parent / "fsdp 2 x tp 2", tensor)
            for name, ranks in (("fsdp", parallel), ("tp", tensor)):
                result[f"resumed {name}"] = stopped_and_resumed(configure(out / f"re {name}", dropout=0.5), ranks)
                result[f"float16 {name}"] = float16(configure(out / f"float16 {name}", dtype="float16"), ranks)
            result["full disk"] = full_disk(configure(out / "full"), parallel)
    return result


def uneven(config, parallel):
    loader = HalfScored(TOKENS, 8, 4, rank=parallel.rank, world_size=parallel.world_size)
    Trainer(make_model(config), loader, config, parallel=parallel, quiet=True).fit()
    return losses(config.run.out)


def bad_loss(out, parallel):
    """The message when the third step's loss is not a number."""
    trainer = make_trainer(configure(out), parallel=parallel)
    loss = trainer.objective.loss
    trainer.objective = scored_by(lambda model, batch: loss(model, batch) * (float("nan") if trainer.step == 2 else 1))
    try:
        trainer.fit()
    except BadLossError as error:
        return str(error)


def traffic(config, parallel):
    """Bytes that a step sends, by operation, bytes of the parameters, and the step's loss."""
    model = make_model(config)
    size = sum(p.nbytes for p in model.parameters())
    trainer = make_trainer(config, model, parallel=parallel)
    trainer.model.train()
    trainer.train_step()
    with Traffic() as seen:
        step = trainer.train_step()
    sent = {}
    for name, count in seen.calls:
        sent[name] = sent.get(name, 0) + count
    return {"parameters": size, "sent": sent, "loss": float(step.loss)}


def run(out):
    results = {"whole": train(out / "whole", "none")}
    for name, ranks, *how in (("ddp 2", 2, "ddp"), ("ddp 2 x tp 2", 4, "ddp", 2), ("fsdp 2 x tp 2", 4, "fsdp", 2)):
        results[name] = launch(ranks, train, out / name, *how)

    results["ddp 2 killed"] = fails(2, train, out / "ddp 2 to 1", "ddp", 0, False, kill)
    results["ddp 2 to 1"] = [train(out / "ddp 2 to 1", "none", resume=True)]
    results["fsdp 4 error"] = fails(4, train, out / "fsdp 4 to 2", "fsdp", 0, False, raise_an_error)
    results["fsdp 4 to 2"] = launch(2, train, out / "fsdp 4 to 2", "fsdp", 0, True, None, True)
    trainer = make_trainer(configure(out / "1 to tp 2"))
    step = trainer.train_step
    trainer.train_step = lambda: raise_an_error() if trainer.step == STOPPED else step()
    with contextlib.suppress(RuntimeError):
        trainer.fit()
    results["1 to tp 2"] = launch(2, train, out / "1 to tp 2", "tp", 0, True)

    results["uneven"] = uneven(configure(out / "uneven"), Parallel())
    for strategy in ("ddp", "fsdp"):
        results[strategy] = launch(2, extras, out / strategy, strategy)
    results["float16"] = float16(configure(out / "float16", dtype="float16"))
    results["measured"] = {samples: measured(Parallel(), samples) for samples in (9, 11)}
    for name in RESULTS:
        results[name][0]["read"] = read_again(configure(out / name), out / name)
    whole = {name: GPT2LMHeadModel.from_pretrained(out / "whole" / name).state_dict() for name in ("checkpoint", "ema")}
    jobs = {name: value[0] for name, value in results.items() if name in RESULTS}
    for job, first in jobs.items():
        for name, state in whole.items():
            theirs = GPT2LMHeadModel.from_pretrained(out / job / name).state_dict()
            first[name] = max(float((theirs[key] - state[key]).abs().max()) for key in state)
    return results
