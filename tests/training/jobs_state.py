"""What ranks that share a model write, read, scale and measure together; parts of the jobs in jobs_training.py."""

import contextlib
import dataclasses
import resource

import torch
import torch.distributed as dist

from fastformer.data import EvaluationLoader
from fastformer.data.collators import Classification
from fastformer.evaluation import Classification as Accuracy
from fastformer.evaluation import evaluate as score
from fastformer.models import BertConfig, BertForSequenceClassification
from fastformer.training import CheckpointError, Objective, evaluate, sequence_classification
from fastformer.training.checkpoint import find_checkpoint, find_damage, load_state
from tests.training.runs import losses, make_trainer, resumed


def state_of(trainer):
    """The optimizer's tensors and the average, put together on the first rank."""
    state = {
        f"{key}/{name}": trainer.parallel.whole(name, value)
        for name, p in trainer.model.named_parameters()
        for key, value in trainer.optimizer.state[p].items()
        if value.dim()
    }
    return state | {f"ema/{name}": trainer.parallel.whole(name, v) for name, v in trainer.ema.average.items()}


def read_again(config, out, parallel=None):
    """The state that a run's last checkpoint gives to ``parallel``."""
    return state_of(resumed(config, out, parallel=parallel))


def stopped_and_resumed(config, parallel):
    """Losses of a run, and of one that is stopped after six steps and resumed from its fourth, with dropout."""
    whole, part = (
        dataclasses.replace(config, run=dataclasses.replace(config.run, out=f"{config.run.out}/{name}"))
        for name in ("whole", "part")
    )
    make_trainer(whole, parallel=parallel).fit()
    trainer = make_trainer(part, parallel=parallel)
    step = trainer.train_step
    trainer.train_step = lambda: step() if trainer.step < 6 else 1 / 0
    with contextlib.suppress(ZeroDivisionError):
        trainer.fit()
    torch.manual_seed(12345)  # what a new process would have
    trainer = resumed(part, part.run.out, parallel=parallel)
    begun = trainer.step
    trainer.fit()
    return {"losses": [losses(run.run.out) for run in (whole, part)], "begun": begun}


def full_disk(config, parallel):
    """The error of each rank where the disk of the last is full, and what is there after; and what is said of the last
    one's file when it is damaged later."""
    trainer = make_trainer(config, parallel=parallel)
    trainer.model.train()
    trainer.out.mkdir(parents=True, exist_ok=True)
    trainer.train_step()
    trainer.save()
    trainer.train_step()
    before, largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, largest))
    try:
        trainer.save()
    except CheckpointError as error:
        said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, largest))
    left = sorted(path.name for path in trainer.out.iterdir() if "checkpoint" in path.name)
    step = load_state(find_checkpoint(trainer.out))["step"]
    parallel.each(lambda: None)
    parts = sorted((trainer.out / "checkpoint" / "training_state").glob("*.distcp"))
    if parallel.writes:
        data = bytearray(parts[-1].read_bytes())
        data[len(data) // 2] ^= 1
        parts[-1].write_bytes(data)
    damage = parallel.first(lambda: find_damage(trainer.out / "checkpoint"))
    return {"error": said, "left": left, "step": step, "files": [path.name for path in parts], "damage": damage}


def float16(config, parallel=None):
    """Steps in float16 with a scale that grows every three, the fourth with a part of the gradient that is infinite on
    the last rank alone: their losses, the scale after each, and which of them changed the weights."""
    trainer = make_trainer(config, parallel=parallel)
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"growth_interval": 3})
    scale = trainer.scaler.unscale_

    def unscale(optimizer):
        if trainer.step == 3 and (parallel is None or dist.get_rank() == dist.get_world_size() - 1):
            grad = next(iter(trainer.model.parameters())).grad
            getattr(grad, "to_local", lambda: grad)().view(-1)[0] = torch.inf
        scale(optimizer)

    trainer.scaler.unscale_ = unscale
    trainer.model.train()
    found = {"losses": [], "scales": [], "changed": []}
    for _ in range(8):
        before = [p.detach().clone() for p in trainer.model.parameters()]
        found["losses"].append(float(trainer.train_step().loss))
        found["scales"].append(trainer.scaler.get_scale())
        changed = [not local(a).equal(local(b)) for a, b in zip(before, trainer.model.parameters()) if local(a).numel()]
        assert len(set(changed)) == 1  # all of it or nothing
        found["changed"].append(changed[0])
    return found


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def measured(parallel, samples):
    """Validation loss and metrics of a classifier, and how often this rank ran it."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=17,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=3,
    )
    with torch.random.fork_rng():
        called = parallel.prepare(BertForSequenceClassification(config), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    dataset = [
        {"input_ids": torch.randint(1, 17, (3 + i % 5,), generator=generator).tolist(), "labels": i % 3}
        for i in range(samples)
    ]
    batches = EvaluationLoader(dataset, Classification(0), 4, rank=parallel.rank, world_size=parallel.world_size)
    rows = []

    def loss(model, batch):
        rows.append(len(batch["labels"]))
        return sequence_classification.loss(model, batch)

    objective = Objective(loss, sequence_classification.count)
    value = evaluate(called, batches, objective=objective, parallel=parallel)
    found = score(called, batches, Accuracy(["a", "b", "c"]), gather=parallel.gather)
    confidences = [line["confidence"] for line in found.worst]
    return {"loss": value, "scores": found.scores(), "references": found.references, "rows": rows, "worst": confidences}
