"""GRPO on a verifiable task, fastformer beside TRL: reward per rollout, and rollouts a second, over seeds.

    python -m benchmarks.rl_language                   --keep writes the table and the curves to benchmarks/results/
    python -m benchmarks.rl_language --job smollm2 --steps 60
    python -m benchmarks.rl_language --steps 4 --seeds 1 --start-steps 20         a look that takes a minute

Jobs: a GPT-2 of 0.8 M parameters from nothing, given a supervised start, all of it trained; SmolLM2-135M-Instruct with
LoRA on queries and values. The task is reasoning-gym's ``chain_sum``, two numbers of one digit, rewarded by its
verifier. Both begin from one checkpoint and have the same prompts, rollouts, learning rate, AdamW, clipping,
token-level loss and advantages over the group's standard deviation; TRL's model and its generation are those of
``transformers``. They take turns in one process; a rate counts everything from the first prompt to the last update.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

SYSTEM = "Answer with the number alone."  # or the model explains itself, and no answer fits the limit
GOAL = 2.0  # rollouts a second, ours over TRL's
OPTIONS = ("min_terms=2", "max_terms=2", "max_digits=1")


@dataclass(frozen=True)
class Job:
    """A model, and how it is trained by both."""

    learning_rate: float
    max_new_tokens: int
    prompts: int = 8
    group_size: int = 8
    lora: int = 0
    chat: bool = False
    system: str = ""
    end: str = ""

    @property
    def rows(self) -> int:
        """Completions in a rollout, which is one step."""
        return self.prompts * self.group_size


JOBS = {
    "gpt": Job(learning_rate=3e-4, max_new_tokens=6),
    "smollm2": Job(
        learning_rate=2e-4, max_new_tokens=16, lora=8, chat=True, prompts=4, end="<|im_end|>", system=SYSTEM
    ),
}


@dataclass(frozen=True)
class Run:
    """Mean reward of each step's rollouts, and rollouts a second."""

    rewards: list[float]
    per_second: float

    @property
    def first(self) -> float:
        """Of the first quarter."""
        return statistics.fmean(self.rewards[: max(1, len(self.rewards) // 4)])

    @property
    def last(self) -> float:
        """Of the last quarter."""
        return statistics.fmean(self.rewards[-max(1, len(self.rewards) // 4) :])


# ---- the start -------------------------------------------------------------------------------------------------------


def small_gpt(folder: Path, task: Any, steps: int) -> Path:
    """A GPT-2 that has seen answers for a while, so that some of its own are right."""
    from fastformer.data import BPETokenizer
    from fastformer.models import GPT2Config, GPT2LMHeadModel
    from fastformer.rl.language import AlignConfig, AlignDataConfig, align
    from fastformer.training import OptimizerConfig, RunConfig, ScheduleConfig

    tokenizer = BPETokenizer.train([f"{e['prompt']} {e['answer']}" for e in task.train], 320)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    shape = {"n_positions": 64, "n_embd": 128, "n_layer": 4, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(tokenizer.vocab_size, bos_token_id=end, eos_token_id=end, **shape)).save_pretrained(
        folder
    )
    tokenizer.save(folder)
    run = {"tensorboard": False, "device": "cpu", "eval_every": 0, "save_every": 0}
    config = AlignConfig(
        algorithm="sft",
        model=str(folder),
        data=AlignDataConfig(batch_size=32),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=20),
        run=RunConfig(out=str(folder / "start"), max_steps=steps, **run),
    )
    result = align(config, task=task, quiet=True)
    print(f"start: {steps} supervised steps, {result.metrics['true_reward']:.2f} of held-out answers right", flush=True)
    return folder / "start" / "checkpoint"


def start_of(name: str, folder: Path, task: Any, steps: int) -> Path:
    """The directory that both begin from."""
    if name == "gpt":
        return small_gpt(folder, task, steps)
    from examples.smollm2_lora.__main__ import smollm2

    return smollm2()


# ---- the two ---------------------------------------------------------------------------------------------------------


def ours(job: Job, start: Path, task: Any, steps: int, seed: int, out: Path) -> Run:
    """fastformer's."""
    from fastformer.rl.language import AlignConfig, AlignDataConfig, RolloutConfig, align
    from fastformer.training import LoraConfig, OptimizerConfig, RunConfig, ScheduleConfig
    from fastformer.training.logs import read_metrics

    config = AlignConfig(
        algorithm="grpo",
        model=str(start),
        data=AlignDataConfig(batch_size=job.rows, chat=job.chat, system=job.system),
        rollout=RolloutConfig(job.prompts, job.group_size, job.max_new_tokens, end=job.end),
        lora=LoraConfig(rank=job.lora, alpha=16.0),
        optimizer=OptimizerConfig(learning_rate=job.learning_rate, weight_decay=0.0, beta2=0.999),
        schedule=ScheduleConfig(kind="constant", warmup_steps=0),
        run=RunConfig(
            out=str(out), seed=seed, max_steps=steps, tensorboard=False, device="cpu", eval_every=0, save_every=0
        ),
    )
    result = align(config, task=task, quiet=True)
    rewards = [record["reward"] for record in read_metrics(out) if "reward" in record]
    return Run(rewards, len(rewards) * job.rows / result.seconds)


def theirs(job: Job, start: Path, task: Any, steps: int, seed: int, out: Path) -> Run:
    """TRL's."""
    import datasets
    import peft
    import transformers
    import trl

    if job.chat:
        tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    else:
        end = "<|endoftext|>"
        options = {"tokenizer_file": str(start / "tokenizer.json"), "eos_token": end, "pad_token": end}
        tokenizer = transformers.PreTrainedTokenizerFast(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)

    def asked(text: str) -> Any:
        roles = {"system": job.system, "user": text}
        return [{"role": role, "content": content} for role, content in roles.items()] if job.chat else text

    rows = datasets.Dataset.from_list([{"prompt": asked(e["prompt"]), "number": i} for i, e in enumerate(task.train)])

    def correct(prompts: Any, completions: Any, number: Sequence[int], **columns: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        examples = [task.train[n] for n in number]
        entries = [example["entry"] for example in examples]
        return task.verifier([e["prompt"] for e in examples], texts, entry=entries)

    arguments = trl.GRPOConfig(
        str(out),
        per_device_train_batch_size=job.rows,
        num_generations=job.group_size,
        max_completion_length=job.max_new_tokens,
        temperature=1.0,
        top_k=0,
        beta=0.0,
        loss_type="dapo",
        scale_rewards="group",
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        adam_beta2=0.999,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        max_steps=steps,
        logging_steps=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=seed,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    adapters = None
    if job.lora:
        adapters = peft.LoraConfig(
            r=job.lora, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=correct,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapters,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return Run(rewards, len(rewards) * job.rows / seconds)


# ---- the table -------------------------------------------------------------------------------------------------------


def table(name: str, runs: dict[str, list[Run]]) -> str:
    """What was measured: each number's mean over the seeds and its standard deviation."""
    lines = [f"{name:10s} {'reward, first quarter':>22s} {'last quarter':>16s} {'rollouts/s':>16s}"]
    for provider, of_provider in runs.items():
        columns = [[getattr(run, field) for run in of_provider] for field in ("first", "last", "per_second")]
        texts = [f"{statistics.fmean(c):.3f} ± {statistics.stdev(c) if len(c) > 1 else 0:.3f}" for c in columns]
        lines.append(f"{provider:10s} {texts[0]:>22s} {texts[1]:>16s} {texts[2]:>16s}")
    if len(runs) == 2:
        fast, slow = (statistics.fmean(run.per_second for run in part) for part in runs.values())
        ratio = fast / slow
        lines.append(f"rollouts/s: {ratio:.2f} times TRL's (goal {GOAL:g}: {'met' if ratio >= GOAL else 'missed'})")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=JOBS, default="gpt")
    parser.add_argument("--steps", type=int, default=150, help="rollouts of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--start-steps", type=int, default=150, help="supervised steps before, of the small GPT")
    parser.add_argument("--learning-rate", type=float, default=0.0, help="of both; 0: the job's")
    parser.add_argument("--only", choices=("ours", "trl"), default="", help="one of the two")
    parser.add_argument("--keep", action="store_true", help="write the table and the curves to benchmarks/results/")
    given = parser.parse_args(arguments)
    from benchmarks.machine import keep
    from fastformer.rl.language import reasoning_gym_task
    from fastformer.rl.language.plots import plot_seeds
    from fastformer.rl.language.tasks import parse_options

    job = JOBS[given.job]
    if given.learning_rate:
        job = dataclasses.replace(job, learning_rate=given.learning_rate)
    task = reasoning_gym_task("chain_sum", 2000, 50, seed=1, options=parse_options(OPTIONS))
    providers = {"fastformer": ours, "trl": theirs}
    if given.only:
        providers = {n: f for n, f in providers.items() if n == {"ours": "fastformer"}.get(given.only, given.only)}
    runs: dict[str, list[Run]] = {name: [] for name in providers}
    with tempfile.TemporaryDirectory() as folder:
        start = start_of(given.job, Path(folder, "model"), task, given.start_steps)
        for seed in range(given.seeds):
            for name, train in providers.items():
                run = train(job, start, task, given.steps, seed, Path(folder, f"{name}-{seed}"))
                runs[name].append(run)
                print(f"seed {seed} {name}: {run.first:.3f} -> {run.last:.3f}, {run.per_second:.1f}/s", flush=True)
    text = table(given.job, runs)
    print(text)
    if given.keep:
        command = f"python -m benchmarks.rl_language {shlex.join(sys.argv[1:] if arguments is None else arguments)}"
        path = keep(f"rl_language_{given.job}", text, command)
        curves = {
            name: [[((i + 1) * job.rows, reward) for i, reward in enumerate(run.rewards)] for run in of_name]
            for name, of_name in runs.items()
        }
        plot_seeds(
            curves, path.with_suffix(".png"), title=f"GRPO on chain_sum, {given.job}", labels=("completions", "reward")
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
