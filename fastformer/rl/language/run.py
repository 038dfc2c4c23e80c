"""``fastformer align``: from a model to one that does what is rewarded or preferred.

``prepare`` reads and checks everything before a step is done, and makes the trainer; ``align`` runs it and leaves
``checkpoint/``, logs and pictures in ``run.out``. With adapters (lora.rank) checkpoints hold these alone, and
``merged/`` is the whole model in the end.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...data import CausalLM, EvaluationLoader, Loader, load_tokenizer, to_device
from ...data.collators import IGNORED
from ...data.examples import read_examples, split_examples
from ...data.tokenizers import check_tokenizer
from ...models.pretrained import read_config
from ...training.checkpoint import (
    MERGED,
    NEWEST,
    has_checkpoint,
    load_state,
    restore_checkpoint,
    save_checkpoint,
)
from ...training.config import DTYPES, RunConfig, resolve_device
from ...training.finetune import DROPOUTS, _base, _max_length
from ...training.logs import read_metrics
from ...training.lora import add_lora, load_adapter, load_lora, merge_lora
from ...training.objectives import causal_lm
from ...training.pretrain import count
from ...training.trainer import Result
from .config import ONLINE, AlignConfig
from .experience import Experience, score
from .losses import Noted, PolicyLoss, PreferenceLoss, ScoreLoss, completion_log_probs
from .policy import PolicyWithValue, Reference, SamplingModel, device_of, evaluating, precision, sequence_scores
from .preferences import Pairs, encode_answers, encode_pairs, end_token, prompt_text
from .rewards import ModelReward, RewardFunction, Rewards, matches, overlong
from .rollouts import roll_out
from .tasks import Task, examples_task, parse_options, reasoning_gym_task
from .trainer import AlignTrainer

CLASSES = {"gpt2": "GPT2", "llama": "Llama"}
Functions = Mapping[str, RewardFunction]


def align(
    config: AlignConfig,
    *,
    task: Task | None = None,
    pairs: Iterable[Mapping[str, Any]] | None = None,
    rewards: Functions | Rewards | None = None,
    quiet: bool = False,
) -> Result:
    """Trains ``config.model`` and leaves the result in ``config.run.out``.

    Args:
        task: prompts, answers and a verifier, in place of those of ``config.data``.
        pairs: preferences, in place of the file's, for reward and dpo.
        rewards: reward functions by name, in place of those of ``config.reward``; with their weights as
            :class:`Rewards`.
        quiet: print nothing.

    Raises:
        FileExistsError: ``run.out`` holds a checkpoint already and ``run.resume`` is not set.
        FileNotFoundError: a file or model that does not exist.
        ValueError: settings, examples, model and tokenizer that do not fit together; the message names what.
        RewardError: a reward function failed; the message names it and the sample.
    """
    trainer = prepare(config, task=task, pairs=pairs, rewards=rewards, quiet=quiet)
    result = trainer.fit()
    out, run = trainer.out, trainer.config.run
    written = out / ("best" if run.keep_best and (out / "best").is_dir() else NEWEST)
    if config.lora.rank:
        adapted = trainer.model.policy if isinstance(trainer.model, PolicyWithValue) else trainer.model
        if written.name == "best":
            load_adapter(adapted, written)
        written = save_checkpoint(out / MERGED, merge_lora(adapted), trainer.tokenizer)
    from .plots import plot_alignment

    title = f"{config.algorithm}, {Path(config.model).name}"
    if config.algorithm in ONLINE:
        plot_alignment(read_metrics(out), out / "alignment.png", title=title)
    else:
        from ...training.plots import plot_loss

        plot_loss(read_metrics(out), out / "loss.png", title=title)
    if not quiet:
        measured = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in result.metrics.items())
        print(f"{result.steps} steps in {result.seconds:.0f} s ({result.stopped}); {measured}\n{written}")
    return result


def prepare(
    config: AlignConfig,
    *,
    task: Task | None = None,
    pairs: Iterable[Mapping[str, Any]] | None = None,
    rewards: Functions | Rewards | None = None,
    quiet: bool = False,
) -> AlignTrainer:
    """The trainer of a run, ready to ``fit``; arguments and errors as in :func:`align`."""
    out = Path(config.run.out)
    if has_checkpoint(out) and not config.run.resume:
        raise FileExistsError(
            f"run.out: {out} holds a checkpoint already; continue it with --run.resume, or choose another --run.out"
        )
    if config.algorithm in ONLINE and config.lora.dropout:
        raise ValueError(
            f"lora.dropout: got {config.lora.dropout}; the policy that samples and the one that is trained "
            "would differ; use 0"
        )
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    base = _base(config.model)
    checkpoint = restore_checkpoint(out) if config.run.resume else None
    tokenizer = load_tokenizer(checkpoint or base)
    setting = Setting(config, base, checkpoint, tokenizer, quiet)
    if config.algorithm in ONLINE:
        trainer = _online(setting, task or read_task(config), rewards)
    elif config.algorithm == "sft":
        trainer = _supervised(setting, task or read_task(config))
    else:
        trainer = _preferences(setting, pairs)
    if checkpoint is not None:
        if isinstance(trainer.model, PolicyWithValue):
            trainer.model.load_value_head(checkpoint)
        trainer.load_state_dict(load_state(checkpoint))
    return trainer


def read_task(config: AlignConfig) -> Task:
    """The task that ``config.data`` names."""
    data = config.data
    if bool(data.task) == bool(data.path):
        raise ValueError("data.task, data.path: give one of them, a task of reasoning-gym or a file of examples")
    if data.task:
        return reasoning_gym_task(data.task, data.size, data.held_out, data.seed, parse_options(data.options))
    return examples_task(data.path, data.validation, data.validation_fraction, config.run.seed)


@dataclasses.dataclass
class Setting:
    """What all algorithms begin from."""

    config: AlignConfig
    base: Path
    checkpoint: Path | None
    tokenizer: Any
    quiet: bool

    @property
    def end(self) -> int:
        """The token that ends a completion."""
        return end_token(self.tokenizer, self.config.rollout.end)

    @property
    def form(self) -> dict[str, Any]:
        """How a prompt is put, for :func:`.preferences.prompt_text`."""
        data = self.config.data
        return {"template": data.prompt, "system": data.system, "chat": data.chat}

    @property
    def max_length(self) -> int:
        """Tokens of a row at most."""
        return _max_length(self.config.data.max_length, read_config(self.base))

    def load(self, directory: Path | None = None, *, scores: bool = False) -> Any:
        """The model of ``directory``, by default that of the base, without dropout: probabilities are to be the same
        when sampling and when training."""
        from ... import models

        directory = directory or self.base
        kind = str(read_config(directory).get("model_type"))
        if kind not in CLASSES:
            raise ValueError(f"model: {directory} is a {kind!r}, and align is for {', '.join(CLASSES)}")
        changes: dict[str, Any] = dict.fromkeys(DROPOUTS[kind], 0.0)
        if scores:
            changes["num_labels"] = 1
        name = CLASSES[kind] + (
            "ForSequenceClassification" if scores else "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*this head starts at random values")
            return getattr(models, name).from_pretrained(directory, dtype=torch.float32, **changes)

    def trained(self, *, scores: bool = False) -> tuple[Any, Any]:
        """(the model to train, with adapters if there are to be some; a plain copy of it as it was before, or None)."""
        config = self.config
        torch.manual_seed(config.run.seed)
        model = self.load(self.base if config.lora.rank or self.checkpoint is None else self.checkpoint, scores=scores)
        check_tokenizer(model, self.tokenizer)
        model.to(resolve_device(config.run.device))
        if not config.lora.rank:
            return model, None
        plain = copy.deepcopy(model) if config.algorithm in ONLINE else None
        if self.checkpoint is not None:
            return load_lora(model, self.checkpoint, trainable=True), plain
        return add_lora(model, config.lora, self.base), plain

    def trainer(self, model: nn.Module, loader: Any, noted: Noted | None, **options: Any) -> AlignTrainer:
        """The trainer, after a line on what it trains."""
        config = self.config
        if noted is not None:
            options["objective"] = noted.objective()
        limit = config.policy.kl_limit if config.algorithm in ONLINE else 0.0
        return AlignTrainer(
            model, loader, config, noted=noted, kl_limit=limit, tokenizer=self.tokenizer, quiet=self.quiet, **options
        )

    def loader(self, samples: Sequence[Any], collator: Any) -> Loader:
        """Shuffled batches of samples."""
        size = min(self.config.data.batch_size, len(samples))
        return Loader(samples, collator, size, seed=self.config.run.seed)

    def say(self, text: str) -> None:
        """Prints a line of what is about to happen."""
        if not self.quiet:
            print(text, flush=True)


# ---- rewards ---------------------------------------------------------------------------------------------------------


def make_rewards(config: AlignConfig, task: Task, given: Functions | Rewards | None = None) -> Rewards:
    """The reward functions of ``config.reward``, or those given.

    Raises:
        ValueError: there is nothing to reward.
    """
    if given is not None:
        return given if isinstance(given, Rewards) else Rewards(given)
    reward, limit = config.reward, config.rollout.max_new_tokens
    functions: dict[str, RewardFunction] = {}
    weights: dict[str, float] = {}
    if task.verifier is not None and reward.verifier:
        functions["verifier"], weights["verifier"] = task.verifier, reward.verifier
    if reward.model:
        functions["model"], weights["model"] = load_reward(reward.model), reward.model_weight
    if reward.pattern:
        functions["pattern"], weights["pattern"] = matches(reward.pattern), reward.pattern_weight
    if reward.overlong:
        functions["overlong"] = overlong(limit, min(reward.overlong, limit))
        weights["overlong"] = reward.overlong_weight
    if not functions:
        raise ValueError("reward: nothing is rewarded; the examples have no answers, and no other reward is set")
    return Rewards(functions, weights)


def load_reward(path: str) -> ModelReward:
    """The reward model in a directory, or of a run of ``--algorithm reward``."""
    from ... import models

    directory = _base(path)
    kind = str(read_config(directory).get("model_type"))
    if kind not in CLASSES:
        raise ValueError(f"reward.model: {directory} is a {kind!r}, expected {', '.join(CLASSES)}")
    cls = getattr(models, f"{CLASSES[kind]}ForSequenceClassification")
    return ModelReward(cls.from_pretrained(directory), load_tokenizer(directory))


# ---- the algorithms --------------------------------------------------------------------------------------------------


def _online(setting: Setting, task: Task, given: Functions | Rewards | None) -> AlignTrainer:
    config = setting.config
    rewards = make_rewards(config, task, given)
    policy, plain = setting.trained()
    if config.algorithm == "ppo":
        policy = PolicyWithValue(policy)
    reference = None
    if config.policy.kl_coefficient or config.policy.kl_limit:
        resumed_whole = setting.checkpoint is not None and not config.lora.rank
        reference = Reference(policy, setting.load() if resumed_whole else None)
    sampler = SamplingModel(policy, plain, DTYPES[config.rollout.dtype])
    train, held_out = (_prompts(setting, examples) for examples in (task.train, task.held_out))
    experience = Experience(
        policy,
        sampler,
        reference,
        setting.tokenizer,
        *train,
        rewards,
        config,
        setting.end,
    )
    # There is no validation loss; what is right, or else what is rewarded, says which model is the best.
    config = setting.config = dataclasses.replace(config, run=_measured_by(config.run, task.verifier is not None))
    loss = PolicyLoss(config.algorithm, config.policy, config.rollout.temperature, config.rollout.max_new_tokens)
    setting.say(
        f"data   {count(len(train[0]))} prompts to train on, {count(len(held_out[0]))} to measure on\n"
        f"run    {config.run.max_steps} steps, {config.updates} on each rollout of {config.rollout.prompts} prompts x "
        f"{config.rollout.group_size}; rewards: {', '.join(rewards.functions)}"
    )
    metrics = held_out_metrics(setting, sampler, *held_out, rewards, task.verifier)
    return setting.trainer(policy, experience, loss, metrics=metrics)


def _supervised(setting: Setting, task: Task) -> AlignTrainer:
    arguments = (setting.tokenizer, setting.end, setting.max_length)
    samples = encode_answers(task.train, *arguments, **setting.form)
    measured = encode_answers(task.held_out, *arguments, "validation", **setting.form)
    model, _ = setting.trained()
    metrics = None
    if task.verifier is not None:
        # Nothing that is longer than any answer is right, and a small model may have no room for more.
        longest = max(sum(label != IGNORED for label in s["labels"]) for s in samples + measured)
        rollout = setting.config.rollout
        rollout = dataclasses.replace(rollout, max_new_tokens=min(rollout.max_new_tokens, longest))
        setting.config = dataclasses.replace(setting.config, rollout=rollout)
        held_out = _prompts(setting, task.held_out)
        rewards = Rewards({"verifier": task.verifier})
        metrics = held_out_metrics(setting, SamplingModel(model), *held_out, rewards, task.verifier)
    setting.say(f"data   {count(len(samples))} answers to learn, {count(len(measured))} to measure on")
    validation = EvaluationLoader(measured, CausalLM(), setting.config.data.batch_size)
    loader = setting.loader(samples, CausalLM())
    return setting.trainer(model, loader, None, objective=causal_lm, validation=validation, metrics=metrics)


def _preferences(setting: Setting, pairs: Iterable[Mapping[str, Any]] | None) -> AlignTrainer:
    config, data = setting.config, setting.config.data
    if pairs is None and not data.path:
        raise ValueError("data.path: got '', expected a file of preferences (.jsonl, .csv, .tsv)")
    examples = read_examples(data.path if pairs is None else pairs)
    if data.validation:
        held_out = read_examples(data.validation, "validation")
    else:
        examples, held_out = split_examples(examples, data.validation_fraction, config.run.seed)
    arguments = (setting.tokenizer, setting.end, setting.max_length)
    samples = encode_pairs(examples, *arguments, **setting.form)
    measured = encode_pairs(held_out, *arguments, "validation", **setting.form)
    scores = config.algorithm == "reward"
    model, _ = setting.trained(scores=scores)
    loss: Noted = ScoreLoss() if scores else PreferenceLoss(config.policy)
    ipo = config.policy.preference_loss == "ipo"
    if not scores:
        resumed_whole = setting.checkpoint is not None and not config.lora.rank
        reference = setting.load() if resumed_whole else model
        for part in (samples, measured):
            with precision(model, config.run.dtype):
                add_reference(reference.to(device_of(model)), part, data.batch_size, mean=ipo)
    validation = EvaluationLoader(measured, Pairs(), data.batch_size)
    setting.say(f"data   {count(len(samples))} pairs to learn from, {count(len(measured))} to measure on")

    @torch.no_grad()
    def accuracy(model: nn.Module) -> dict[str, float]:
        right = total = 0
        for batch in validation:
            batch = to_device(batch, device_of(model))
            with precision(model, config.run.dtype):
                if scores:
                    better, worse = sequence_scores(model, batch["input_ids"], batch["lengths"]).chunk(2)
                else:
                    better, worse = (completion_log_probs(model, batch, mean=ipo) - batch["reference"]).chunk(2)
            right, total = right + int((better > worse).sum()), total + len(better)
        return {"held_out_accuracy": right / total}

    return setting.trainer(model, setting.loader(samples, Pairs()), loss, validation=validation, metrics=accuracy)


def add_reference(model: Any, samples: list[dict[str, Any]], batch_size: int, mean: bool = False) -> None:
    """Adds to pairs the log-probabilities of their completions under ``model``, its adapters switched off: one pass
    before training, in place of one at every step."""
    adapted = hasattr(model, "disable_adapter")
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        batch = to_device(Pairs()(part), device_of(model))
        with evaluating(model), model.disable_adapter() if adapted else nullcontext():
            chosen, rejected = completion_log_probs(model, batch, mean).chunk(2)
        for sample, better, worse in zip(part, chosen.tolist(), rejected.tolist()):
            sample["reference_chosen"], sample["reference_rejected"] = better, worse


# ---- prompts and measurements ----------------------------------------------------------------------------------------


def _prompts(setting: Setting, examples: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """(examples whose prompt is the text that the model reads, its tokens)."""
    room, texts, ids = setting.max_length - setting.config.rollout.max_new_tokens, [], []
    for index, example in enumerate(examples):
        text = prompt_text(example["prompt"], setting.tokenizer, **setting.form)
        tokens = setting.tokenizer.encode(text)
        if not 0 < len(tokens) <= room:
            raise ValueError(
                f"data example {index}: a prompt of {len(tokens)} tokens; expected 1 to {room}, data.max_length "
                "less rollout.max_new_tokens"
            )
        texts.append({**example, "prompt": text})
        ids.append(tokens)
    return texts, ids


def _measured_by(run: RunConfig, verified: bool) -> RunConfig:
    if run.best_metric != "validation_loss":
        return run
    return dataclasses.replace(run, best_metric="true_reward" if verified else "held_out_reward", best_is="highest")


def held_out_metrics(
    setting: Setting,
    sampler: SamplingModel,
    examples: Sequence[Mapping[str, Any]],
    prompt_ids: Sequence[Sequence[int]],
    rewards: Rewards,
    verifier: RewardFunction | None,
) -> Callable[[nn.Module], dict[str, float]]:
    """What the trainer measures: the likeliest completion of each held-out prompt, its reward, and, whatever is
    rewarded, how many are right (``true_reward``). A reward that rises while that falls is being hacked."""
    config = setting.config
    size = config.rollout.batch_size or max(config.rows, 32)

    def measure(model: nn.Module) -> dict[str, float]:
        with evaluating(model):
            rollouts = roll_out(
                sampler.current(),
                setting.tokenizer,
                prompt_ids,
                max_new_tokens=config.rollout.max_new_tokens,
                end=setting.end,
                temperature=0.0,
                batch_size=size,
                record=False,
            )
        measured = {"held_out_reward": float(score(rewards, examples, rollouts).total.mean())}
        if verifier is not None:
            true = score(Rewards({"verifier": verifier}), examples, rollouts).total
            measured["true_reward"] = float(true.mean())
        return measured | {"held_out_length": float(rollouts.lengths.float().mean())}

    return measure
