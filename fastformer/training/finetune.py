"""Fine-tuning: from a pre-trained model and labelled examples to a model for a task, by the one trainer.

``prepare`` reads and checks everything (columns, labels, lengths, tokenizer) before a step is done, and makes the
trainer; ``finetune`` runs it and leaves ``checkpoint/``, logs and loss.png in ``run.out``. With adapters (lora.rank)
checkpoints hold these alone, and ``merged/`` is the whole model in the end.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..data import EvaluationLoader, Loader, Tokenizer, load_tokenizer
from ..data.examples import Example, read_examples, split_examples
from ..data.tasks import TASKS, Columns, Encoder, collator_of, labels_in, lengths_of
from ..data.tokenizers import check_tokenizer
from ..models import PreTrainedModel
from ..models.pretrained import read_config, resolve
from .checkpoint import MERGED, NEWEST, find_checkpoint, has_checkpoint, load_state, restore_checkpoint, save_checkpoint
from .config import OptimizerConfig, ParallelConfig, RunConfig, ScheduleConfig, _check
from .logs import read_metrics
from .lora import LoraConfig, add_lora, freeze, load_adapter, load_lora, merge_lora, trainable_parameters
from .objectives import OBJECTIVES
from .parallel import Parallel, processes
from .pretrain import count, cpu_threads
from .trainer import Result, Trainer

# (task, config.json's model_type) -> class
CLASSES = {
    ("classification", "bert"): "BertForSequenceClassification",
    ("classification", "gpt2"): "GPT2ForSequenceClassification",
    ("classification", "llama"): "LlamaForSequenceClassification",
    ("token_classification", "bert"): "BertForTokenClassification",
    ("token_classification", "gpt2"): "GPT2ForTokenClassification",
    ("token_classification", "llama"): "LlamaForTokenClassification",
    ("question_answering", "bert"): "BertForQuestionAnswering",
    ("seq2seq", "t5"): "T5ForConditionalGeneration",
    ("instruction", "gpt2"): "GPT2LMHeadModel",
    ("instruction", "llama"): "LlamaForCausalLM",
}
DECODERS = ("gpt2", "llama")
OBJECTIVE_OF = {"classification": "sequence_classification"}  # the others have their task's name
DROPOUTS = {  # the fields of a configuration that dropout is set by
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "t5": ("dropout_rate",),
    "llama": ("attention_dropout",),
}


@dataclass(frozen=True)
class ExamplesConfig:
    """Labelled examples."""

    path: str = ""
    """JSON Lines, CSV or TSV to train on."""
    validation: str = ""
    """The same to measure on; empty: a part of the former is held out."""
    validation_fraction: float = 0.1
    """That part."""
    columns: Columns = field(default_factory=Columns)
    """Which column is what."""
    prompt: str = "{}"
    """seq2seq, instruction: what the model reads, {} in the place of the source."""
    max_length: int = 0
    """Tokens of a text at most; 0: the model's positions, 512 if it has no limit."""
    stride: int = 64
    """question_answering: tokens by which windows of a long context overlap."""
    too_long: Literal["cut", "error"] = "cut"
    """What becomes of a longer text."""
    batch_size: int = 16
    """Examples in a batch (times optimizer.accumulate in a step)."""

    def __post_init__(self) -> None:
        _check(
            "data",
            self,
            ("validation_fraction", "in (0, 1)", 0 < self.validation_fraction < 1),
            ("max_length", "at least 0", self.max_length >= 0),
            ("stride", "at least 0", self.stride >= 0),
            ("too_long", "cut or error", self.too_long in ("cut", "error")),
            ("batch_size", "at least 1", self.batch_size >= 1),
            ("prompt", "a text with {}", "{}" in self.prompt),
        )


@dataclass(frozen=True)
class FinetuneConfig:
    """Train a pre-trained model for a task."""

    task: Literal["classification", "token_classification", "question_answering", "seq2seq", "instruction"] = (
        "classification"
    )
    """What the model learns."""
    model: str = ""
    """A model directory, or a run that holds a checkpoint."""
    epochs: float = 3.0
    """Times every example is seen; 0: run.max_steps says how long."""
    freeze: tuple[str, ...] = ()
    """Beginnings of the names of parameters that stay as they are; "body": all but the head."""
    dropout: float = -1.0
    """The model's dropout, in place of its own; -1 leaves that."""
    data: ExamplesConfig = field(default_factory=ExamplesConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-5, weight_decay=0.01, beta2=0.999)
    )
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(kind="linear", warmup_steps=50, final_ratio=0.0)
    )
    run: RunConfig = field(default_factory=lambda: RunConfig(out="runs/finetune", eval_every=0, save_every=0))
    """run.eval_every 0 measures after every epoch."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task: got {self.task!r}, expected one of {', '.join(TASKS)}")
        if self.freeze and self.lora.rank:
            raise ValueError(f"freeze: got {self.freeze!r} beside lora.rank, which freezes all but adapters and head")
        if self.lora.rank and self.parallel.strategy in ("fsdp", "tp"):
            raise ValueError(
                f"parallel.strategy: got {self.parallel.strategy!r} beside lora.rank; adapters are trained with ddp"
            )
        if self.epochs < 0:
            raise ValueError(f"epochs: got {self.epochs}, expected at least 0")
        if self.dropout != -1 and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}, expected a number in [0, 1), or -1")


@dataclass(frozen=True)
class PreparedTask:
    """A task's data as samples.

    Attributes:
        train, validation: samples, which ``collator`` takes.
        labels: names of the classes, for classification.
        encoder: what made the samples.
        parallel: the processes that share them.
    """

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    collator: Any
    labels: tuple[str, ...]
    encoder: Encoder
    parallel: Parallel = field(default_factory=Parallel)

    @property
    def ranks(self) -> dict[str, int]:
        """Which rows of a batch are this process's, for a loader."""
        return {"rank": self.parallel.rank, "world_size": self.parallel.world_size}

    def validation_batches(self, batch_size: int) -> EvaluationLoader:
        """The validation samples, in order; of ``batch_size`` of all processes this one's."""
        return EvaluationLoader(self.validation, self.collator, batch_size, **self.ranks)


Metrics = Callable[[PreparedTask, int], Callable[[nn.Module], dict[str, float]] | None]


def finetune(
    config: FinetuneConfig,
    *,
    train: Iterable[Example] | None = None,
    validation: Iterable[Example] | None = None,
    metrics: Metrics | None = None,
    quiet: bool = False,
) -> Result:
    """Fine-tunes ``config.model`` and leaves the best or the last model in ``config.run.out``.

    Args:
        train, validation: examples, in place of the files of ``config.data``.
        metrics: makes, of the data and a batch size, the metrics that the trainer measures beside the loss.

    Raises:
        FileExistsError: ``run.out`` holds a checkpoint already and ``run.resume`` is not set.
        FileNotFoundError: a file or model that does not exist.
        ValueError: settings, examples, model and tokenizer that do not fit together; the message names what.
    """
    with processes(config.parallel, config.run.device) as parallel:
        options: dict[str, Any] = {"train": train, "validation": validation, "metrics": metrics}
        trainer = prepare(config, **options, quiet=quiet or not parallel.writes, parallel=parallel)
        result = trainer.fit()
        parallel.each(lambda: _finish(trainer, result, quiet) if parallel.writes else None)
    return result


def _finish(trainer: Trainer, result: Result, quiet: bool) -> None:
    """Adapters merged, the losses plotted, and a line about it."""
    config, out, run = trainer.config, trainer.out, trainer.config.run
    written = out / ("best" if run.keep_best and (out / "best").is_dir() else NEWEST)
    if config.lora.rank:
        if written.name == "best":
            load_adapter(trainer.model, written)
        model = merge_lora(trainer.model)
        written = save_checkpoint(out / MERGED, model, trainer.tokenizer)
    from .plots import plot_loss

    plot_loss(read_metrics(out), out / "loss.png", title=f"{config.task}, {Path(config.model).name}")
    if not quiet:
        measured = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in result.metrics.items())
        print(f"{result.steps} steps in {result.seconds:.0f} s; {measured}\n{written}")


def prepare(
    config: FinetuneConfig,
    *,
    train: Iterable[Example] | None = None,
    validation: Iterable[Example] | None = None,
    metrics: Metrics | None = None,
    quiet: bool = False,
    trainer_class: type[Trainer] = Trainer,
    parallel: Parallel | None = None,
) -> Trainer:
    """The trainer of a run, ready to ``fit``; arguments and errors as in :func:`finetune`."""
    out, parallel = Path(config.run.out), parallel or Parallel()
    if not config.run.resume and parallel.first(lambda: has_checkpoint(out)):
        raise FileExistsError(
            f"run.out: {out} holds a checkpoint already; continue it with --run.resume, or choose another --run.out"
        )
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    base = _base(config.model)
    checkpoint = parallel.first(lambda: restore_checkpoint(out)) if config.run.resume else None
    tokenizer = load_tokenizer(checkpoint or base)
    data = dataclasses.replace(prepare_data(config, base, tokenizer, train, validation), parallel=parallel)
    torch.manual_seed(config.run.seed)
    model = _load_model(config, base if checkpoint is None or config.lora.rank else checkpoint, data)
    check_tokenizer(model, tokenizer)
    if config.lora.rank:
        model = load_lora(model, checkpoint, trainable=True) if checkpoint else add_lora(model, config.lora, base)
    elif config.freeze:
        freeze(model, config.freeze)
    config = _with_steps(config, len(data.train))
    trainer = trainer_class(
        model,
        Loader(
            data.train,
            data.collator,
            min(config.data.batch_size, len(data.train)),
            seed=config.run.seed,
            pool=64 * min(config.data.batch_size, len(data.train)),
            lengths=lengths_of(data.train),
            **data.ranks,
        ),
        config,
        objective=OBJECTIVES[OBJECTIVE_OF.get(config.task, config.task)],
        validation=data.validation_batches(config.data.batch_size),
        metrics=None if metrics is None else metrics(data, config.data.batch_size),
        tokenizer=tokenizer,
        parallel=parallel,
        quiet=quiet,
    )
    if checkpoint is not None:
        trainer.load_state_dict(load_state(checkpoint))
    if not quiet:
        print(describe(data, trainer))
    return trainer


def prepare_data(
    config: FinetuneConfig,
    base: Path,
    tokenizer: Tokenizer,
    train: Iterable[Example] | None = None,
    validation: Iterable[Example] | None = None,
) -> PreparedTask:
    """Reads, splits and encodes the examples; arguments and errors as in :func:`finetune`."""
    data, values = config.data, read_config(base)
    if train is None and not data.path:
        raise ValueError("data.path: got '', expected a file of examples (.jsonl, .csv, .tsv)")
    examples = read_examples(data.path if train is None else train)
    held_out = validation if validation is not None else data.validation or None
    labels = labels_in(examples, config.task, data.columns)
    if held_out is not None:
        measured = read_examples(held_out, "validation")
    else:
        label = data.columns.label if config.task == "classification" else None
        examples, measured = split_examples(examples, data.validation_fraction, config.run.seed, label)
    known = tuple(map(str, (values.get("id2label") or {}).values()))
    if labels and set(labels) <= set(known):
        labels = known  # a model that has learnt these classes already keeps their order
    encoder = Encoder(
        config.task,
        tokenizer,
        _max_length(data.max_length, values),
        labels,
        stride=data.stride,
        prompt=data.prompt,
        cut=data.too_long == "cut",
        columns=data.columns,
        causal=values.get("model_type") in DECODERS,
    )
    collator = collator_of(config.task, _padding(config.task, values, tokenizer))
    return PreparedTask(encoder(examples), encoder(measured, "validation"), collator, labels, encoder)


def describe(data: PreparedTask, trainer: Trainer) -> str:
    """The run in three lines: examples, model, machine."""
    config, model = trainer.config, trainer.model
    trained, total = trainable_parameters(model)
    on = f"cpu, {cpu_threads()}" if trainer.device.type == "cpu" else str(trainer.device)
    classes = f"; {len(data.labels)} classes" if data.labels else ""
    padding = (
        f", padded with token {data.collator.pad_token_id}"
        if _ends_at_padding(config.task, data.encoder.causal)
        else ""
    )
    return (
        f"data   {count(len(data.train))} samples to train on, {count(len(data.validation))} to measure on{classes}"
        f"{padding}\n"
        f"model  {config.model}: {count(trained)} of {count(total)} parameters are trained\n"
        f"run    {on}, {str(trainer.dtype)[6:]}; {config.run.max_steps} steps of "
        f"{config.data.batch_size * config.optimizer.accumulate} samples"
    )


def _base(model: str) -> Path:
    if not model:
        raise ValueError("model: got '', expected a model directory")
    path = Path(model).expanduser()
    return find_checkpoint(path) if path.exists() else resolve(model)


def _ends_at_padding(task: str, causal: bool) -> bool:
    """Whether the model takes the last token before the padding, so that its configuration has to name that."""
    return causal and task == "classification"


def _padding(task: str, values: dict[str, Any], tokenizer: Tokenizer) -> int:
    """The token that short texts are filled up with: the tokenizer's, else any, as it is neither seen nor scored.

    But a decoder that classifies looks for it, to find where a text ends: a tokenizer without one, as GPT-2's and most
    Llamas', then lends the end of text, unless the model says which.

    Raises:
        ValueError: there is no such token.
    """
    own = getattr(tokenizer, "pad_token_id", None)
    if own is not None or not _ends_at_padding(task, values.get("model_type") in DECODERS):
        return own or 0
    ends = values.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    for token in (values.get("pad_token_id"), tokenizer.eos_token_id, *ends):
        if token is not None and token >= 0:  # old Llamas have -1 for none
            return token
    raise ValueError(
        "tokenizer: has no padding token and no end of text, and by one of these a decoder finds the last token of a "
        "text, which it classifies"
    )


def _load_model(config: FinetuneConfig, directory: Path, data: PreparedTask) -> PreTrainedModel:
    from .. import models

    kind = read_config(directory).get("model_type")
    name = CLASSES.get((config.task, kind))
    if name is None:
        known = ", ".join(sorted(kind for task, kind in CLASSES if task == config.task))
        raise ValueError(f"model: {directory} is a {kind!r}, and {config.task} is for {known}")
    changes: dict[str, Any] = {"id2label": dict(enumerate(data.labels))} if data.labels else {}
    if _ends_at_padding(config.task, data.encoder.causal):
        changes["pad_token_id"] = data.collator.pad_token_id
    if config.task == "question_answering":
        changes["num_labels"] = 2
    if config.dropout != -1:
        heads = ("classifier_dropout",) if config.task == "token_classification" else ()
        changes |= dict.fromkeys((*DROPOUTS[kind], *heads), config.dropout)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*this head starts at random values")  # it is about to be trained
        return getattr(models, name).from_pretrained(directory, dtype=torch.float32, **changes)


def _max_length(wanted: int, values: dict[str, Any]) -> int:
    """T5's positions are relative, so it has no limit of its own."""
    limited = values.get("model_type") != "t5"
    names = ("max_position_embeddings", "n_positions") if limited else ()
    available = next((values[name] for name in names if name in values), None)
    if available is not None and wanted > available:
        raise ValueError(f"data.max_length: got {wanted}, and the model has {available} positions")
    return wanted or available or 512


def _with_steps(config: FinetuneConfig, samples: int) -> FinetuneConfig:
    """Epochs as steps."""
    run = config.run
    epoch = samples / (min(config.data.batch_size, samples) * config.optimizer.accumulate)
    if config.epochs:
        run = dataclasses.replace(run, max_steps=max(1, math.ceil(config.epochs * epoch)))
    if not run.eval_every:
        run = dataclasses.replace(run, eval_every=max(1, round(epoch)))
    return dataclasses.replace(config, run=run)
