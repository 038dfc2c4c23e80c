"""The same fine-tuning in one process and in two, with adapters, frozen parameters and metrics; see jobs.py."""

import dataclasses

from fastformer.models import from_pretrained
from fastformer.task_metrics import task_metrics
from fastformer.training import LoraConfig, ParallelConfig, Trainer
from fastformer.training.finetune import finetune
from fastformer.training.logs import read_metrics
from tests.training.jobs import fails, launch
from tests.training.tuning import WORDS, config_for, reviews, save_base

STEPS, SAVED, STOPPED = 12, 5, 8
PAIRS = [{"source": f"{a} {b}", "target": b} for a in WORDS[:6] for b in WORDS[6:12]]
RUN = {"log_every": 1, "eval_every": 6, "save_every": SAVED, "keep_best": True}
JOBS = {  # name -> task, model, strategy, further settings
    "adapters": ("classification", "bert", "ddp", {"lora": LoraConfig(rank=2, targets=("all",))}),
    "frozen": ("classification", "bert", "fsdp", {"freeze": ("bert.embeddings",)}),
    "split": ("seq2seq", "t5", "tp", {"dropout": 0.0}),
}


def configure(job, base, out, strategy="none", **run):
    task, kind, _, more = JOBS[job]
    config = config_for(task, base / kind, out, steps=STEPS, run={**RUN, **run}, **{"dropout": 0.0, **more})
    return dataclasses.replace(config, parallel=ParallelConfig(strategy))


def tune(config, stop=None):
    train = reviews() if config.task == "classification" else PAIRS
    if stop is not None:  # in a process of its own
        step = Trainer.train_step
        Trainer.train_step = lambda self: stop() if self.step == STOPPED else step(self)
    result = finetune(config, train=train, metrics=task_metrics, quiet=True)
    records = read_metrics(config.run.out)
    kept = from_pretrained(f"{config.run.out}/{'merged' if config.lora.rank else 'best'}")
    return {
        "losses": [record["loss"] for record in records if "loss" in record],
        "metrics": [record for record in records if "validation_loss" in record],
        "result": dataclasses.asdict(result),
        "weights": {name: tensor.clone() for name, tensor in kept.state_dict().items()},
    }


def raise_an_error():
    raise RuntimeError("the lights went out")


def run(out):
    base, results = out / "bases", {}
    for kind in ("bert", "t5"):
        save_base(kind, base / kind)
    for job, (*_, strategy, _) in JOBS.items():
        results[f"{job}, one"] = [tune(configure(job, base, out / f"{job} 1"))]
        results[job] = launch(2, tune, configure(job, base, out / f"{job} 2", strategy))
    stopped = configure("adapters", base, out / "stopped", "ddp")
    results["stopped"] = fails(2, tune, stopped, raise_an_error)
    results["resumed"] = [tune(configure("adapters", base, out / "stopped", resume=True))]
    return results
