"""Peak memory of fine-tuning, fastformer's trainer beside transformers' Trainer.

    python -m benchmarks.finetune_memory            --keep writes the table to benchmarks/results/<machine>/
    python -m benchmarks.finetune_memory --jobs gpt2 --steps 5

MiniLM's shape (22.7 M parameters) as a classifier of two classes, GPT-2 124M on the next token; float32, dropout 0.1,
AdamW fused, gradients clipped, the same batches. Weights are random: what they are takes no other memory. Each provider
runs in a process of its own, and what counts is the largest resident size of the whole process (Linux's VmHWM), with
the packages it imports; beside it, how far that rises above the size with the model in place.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import keep
from benchmarks.memory import AVAILABLE, _largest

GOAL = 0.7


@dataclass(frozen=True)
class Job:
    """A model, how it is trained, and the shape of a batch."""

    model: str
    config: str
    fields: dict[str, Any]
    objective: str
    batch: int
    length: int


MINILM = {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
JOBS = {
    "minilm": Job(
        "BertForSequenceClassification",
        "BertConfig",
        {**MINILM, "intermediate_size": 1536, "max_position_embeddings": 512},
        "sequence_classification",
        32,
        128,
    ),
    "gpt2": Job("GPT2LMHeadModel", "GPT2Config", {}, "causal_lm", 4, 512),
}


def samples_of(job: Job, steps: int) -> list[dict[str, Any]]:
    """Rows of full length, so that there is no padding to save."""
    import torch

    ids = torch.randint(30000, (job.batch * steps, job.length), generator=torch.Generator().manual_seed(0)).tolist()
    if job.objective == "causal_lm":
        return [{"input_ids": row, "labels": row} for row in ids]
    return [{"input_ids": row, "labels": i % 2} for i, row in enumerate(ids)]


def ours(job: Job, steps: int, out: str) -> None:
    """``steps`` steps of fastformer's trainer."""
    from fastformer import models
    from fastformer.data import CausalLM, Classification, Loader
    from fastformer.training import OBJECTIVES, Trainer
    from fastformer.training.finetune import FinetuneConfig, OptimizerConfig, RunConfig

    model = getattr(models, job.model)(getattr(models, job.config)(**job.fields))
    run = RunConfig(out=out, max_steps=steps, eval_every=0, save_every=0, tensorboard=False, device="cpu")
    config = FinetuneConfig(optimizer=OptimizerConfig(learning_rate=5e-5), run=run)
    collator = CausalLM() if job.objective == "causal_lm" else Classification()
    loader = Loader(samples_of(job, steps), collator, job.batch)
    trainer = Trainer(model, loader, config, objective=OBJECTIVES[job.objective], quiet=True)
    _report(lambda: [trainer.train_step() for _ in range(steps)])


def theirs(job: Job, steps: int, out: str) -> None:
    """``steps`` steps of ``transformers.Trainer``."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = getattr(transformers, job.config)(**job.fields, use_cache=False)
    model = getattr(transformers, job.model)(config)
    arguments = transformers.TrainingArguments(
        out,
        per_device_train_batch_size=job.batch,
        max_steps=steps,
        learning_rate=5e-5,
        weight_decay=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=samples_of(job, steps), data_collator=transformers.default_data_collator
    )
    _report(trainer.train)


def _report(train: Any) -> None:
    before = _largest(forget=True)
    train()
    peak = _largest()
    print(f"\nbytes {peak} {peak - before}", flush=True)


def peak_bytes(provider: str, job: str, steps: int) -> tuple[int, int]:
    """(largest resident size of the process, its rise while training), in bytes."""
    command = [sys.executable, "-m", "benchmarks.finetune_memory", "--measure", provider, job, "--steps", str(steps)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = next(line for line in printed.splitlines() if line.startswith("bytes "))
    peak, rise = map(int, line.split()[1:])
    return peak, rise


def report(jobs: list[str], steps: int) -> str:
    """A line for each job."""
    if not AVAILABLE:
        return "peak memory: measured on Linux only"
    lines = []
    for name in jobs:
        job = JOBS[name]
        (mine, rise), (peer, peer_rise) = (peak_bytes(provider, name, steps) for provider in ("ours", "theirs"))
        met = "✓" if mine <= GOAL * peer else "✗ missed"
        lines.append(
            f"{name} {job.batch}×{job.length} fp32, {steps} steps of AdamW: {mine / 1e6:,.0f} MB, transformers' Trainer"
            f" {peer / 1e6:,.0f} MB, {mine / peer:.2f} of it {met} (goal: {GOAL:g}); rise above the model"
            f" {rise / 1e6:,.0f} and {peer_rise / 1e6:,.0f} MB"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("PROVIDER", "JOB"), help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help="write the table to benchmarks/results")
    args = parser.parse_args(argv)
    if not args.measure:
        table = report(args.jobs, args.steps)
        print(table)
        if args.keep:
            keep("finetune_memory", table, f"python -m benchmarks.finetune_memory --steps {args.steps}")
        return
    provider, name = args.measure
    with tempfile.TemporaryDirectory() as directory:
        {"ours": ours, "theirs": theirs}[provider](JOBS[name], args.steps, str(Path(directory, "run")))


if __name__ == "__main__":
    main()
