"""What a run is: five small dataclasses, one file of YAML or a few ``--section.key value`` flags.

The docstring under each field is its help text on the command line. :func:`load_config` reads YAML and refuses a key
that no section has, naming the nearest one that exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..extras import require
from .schedule import KINDS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the GPT-2; names as in its Hugging Face configuration."""

    n_layer: int = 4
    """Number of blocks."""
    n_head: int = 4
    """Attention heads; divides n_embd."""
    n_embd: int = 128
    """Width of the residual stream."""
    dropout: float = 0.0
    """Dropout after the embeddings and every residual branch; attention weights are never dropped."""

    def __post_init__(self) -> None:
        _check(
            "model",
            self,
            ("n_layer", "at least 1", self.n_layer >= 1),
            ("n_head", "at least 1", self.n_head >= 1),
            ("n_embd", f"a multiple of model.n_head = {self.n_head}", _divides(self.n_head, self.n_embd)),
            ("dropout", "in [0, 1)", 0 <= self.dropout < 1),
        )


@dataclass(frozen=True)
class DataConfig:
    """Text, tokens and batches."""

    path: str = "shakespeare"
    """Text, JSON Lines (also .jsonl.gz), Parquet, a directory of these, what `fastformer tokenize` wrote, or a built-in
    corpus: shakespeare, python."""
    text_field: str = "text"
    """The field of a record of JSON Lines or Parquet that holds its text."""
    tokenizer: str = "char"
    """char, bpe (trained on the text), or a directory that holds a saved tokenizer."""
    vocab_size: int = 1024
    """Number of tokens a bpe tokenizer is trained to."""
    block_size: int = 64
    """Context: tokens in a window."""
    batch_size: int = 12
    """Windows in a batch (times optimizer.accumulate in a step)."""
    validation_fraction: float = 0.1
    """Share of the text held out, in whole documents where there are ten or more."""

    def __post_init__(self) -> None:
        _check(
            "data",
            self,
            ("block_size", "at least 1", self.block_size >= 1),
            ("batch_size", "at least 1", self.batch_size >= 1),
            ("validation_fraction", "in (0, 1)", 0 < self.validation_fraction < 1),
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101) with the torch.optim implementation fused over all parameters."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """On matrices and embeddings only; biases and norms are never decayed."""
    beta1: float = 0.9
    """Decay of the running mean of gradients."""
    beta2: float = 0.99
    """Decay of the running mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the latter."""
    clip_norm: float = 1.0
    """Largest norm of the gradient of all parameters together; 0 does not clip."""
    accumulate: int = 1
    """Batches whose gradients are summed into one step; the loss is that of the one large batch."""
    ema_decay: float = 0.0
    """Weight of the past in a running average of the weights, which is what is evaluated; 0: none."""
    rates: tuple[str, ...] = ()
    """Parameters with a learning rate of their own, as the beginning of their names and a multiple of the others':
    discriminator.=2."""

    @property
    def multiples(self) -> dict[str, float]:
        """``rates`` as beginnings of names and their multiples of the learning rate."""
        return {name: float(value) for name, _, value in (rate.rpartition("=") for rate in self.rates)}

    def __post_init__(self) -> None:
        try:
            named = all(name and multiple >= 0 for name, multiple in self.multiples.items())
        except ValueError:
            named = False
        _check(
            "optimizer",
            self,
            ("rates", "beginnings of names with a number of at least 0 each, such as discriminator.=2", named),
            ("learning_rate", "above 0", self.learning_rate > 0),
            ("weight_decay", "at least 0", self.weight_decay >= 0),
            ("beta1", "in [0, 1)", 0 <= self.beta1 < 1),
            ("beta2", "in [0, 1)", 0 <= self.beta2 < 1),
            ("clip_norm", "at least 0", self.clip_norm >= 0),
            ("accumulate", "at least 1", self.accumulate >= 1),
            ("ema_decay", "in [0, 1)", 0 <= self.ema_decay < 1),
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run."""

    kind: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """Shape after the warm-up; wsd stays at the peak and decays at the end."""
    warmup_steps: int = 100
    """Steps over which the rate rises to its peak."""
    final_ratio: float = 0.1
    """Share of the peak left at the end."""
    decay_fraction: float = 0.1
    """Share of the run over which wsd decays."""

    def __post_init__(self) -> None:
        _check(
            "schedule",
            self,
            ("kind", f"one of {', '.join(KINDS)}", self.kind in KINDS),
            ("warmup_steps", "at least 0", self.warmup_steps >= 0),
            ("final_ratio", "in [0, 1]", 0 <= self.final_ratio <= 1),
            ("decay_fraction", "in (0, 1]", 0 < self.decay_fraction <= 1),
        )


@dataclass(frozen=True)
class RunConfig:
    """Where, how long, and what is written."""

    out: str = "runs/pretrain"
    """Directory for the checkpoint, logs and plots."""
    seed: int = 0
    """Seeds weights, batches and dropout."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1 …"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward pass by autocast; auto is bfloat16 on a GPU that has it and float32 on a CPU. The loss
    is scaled for float16."""
    recompute: bool = False
    """Keep each block's input only and run it again for the backward pass: less memory, a third more arithmetic."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    max_steps: int = 2000
    """Steps in the schedule; the run ends with the last."""
    max_minutes: float = 0.0
    """Ends the run after this long; the schedule follows the clock where that is ahead of the steps. 0: no limit."""
    log_every: int = 10
    """Steps between two lines in the logs."""
    eval_every: int = 250
    """Steps between two measurements of the validation loss; 0: only at the end."""
    eval_windows: int = 256
    """Windows of held-out text per measurement."""
    save_every: int = 1000
    """Steps between two checkpoints; 0: only at the end."""
    keep: int = 2
    """Checkpoints kept, the newest included."""
    keep_best: bool = False
    """Keep the best of the measured models in best/."""
    best_metric: str = "validation_loss"
    """What the best is chosen by, and early stopping: validation_loss, or a metric of the caller's."""
    best_is: Literal["lowest", "highest"] = "lowest"
    """Which values of it are good."""
    patience: int = 0
    """End the run after so many measurements without a new best; 0: never."""
    on_bad_loss: Literal["stop", "skip"] = "stop"
    """On a loss or gradient that is not finite, or a spike: stop, or leave that batch out (waits for the GPU at every
    step). Either way the message names the batch."""
    spike_zscore: float = 0.0
    """A loss so many standard deviations above the recent mean is a spike; 0: none is."""
    spike_window: int = 100
    """Steps in that mean."""
    resume: bool = False
    """Continue from the checkpoint in run.out, to the bit."""
    tensorboard: bool = True
    """Write a TensorBoard log."""

    def __post_init__(self) -> None:
        _check(
            "run",
            self,
            ("threads", "at least 0", self.threads >= 0),
            ("dtype", f"auto or one of {', '.join(DTYPES)}", self.dtype in ("auto", *DTYPES)),
            ("max_steps", "at least 1", self.max_steps >= 1),
            ("max_minutes", "at least 0", self.max_minutes >= 0),
            ("log_every", "at least 1", self.log_every >= 1),
            ("eval_every", "at least 0", self.eval_every >= 0),
            ("eval_windows", "at least 1", self.eval_windows >= 1),
            ("save_every", "at least 0", self.save_every >= 0),
            ("keep", "at least 1", self.keep >= 1),
            ("best_is", "lowest or highest", self.best_is in ("lowest", "highest")),
            ("patience", "at least 0", self.patience >= 0),
            ("on_bad_loss", "stop or skip", self.on_bad_loss in ("stop", "skip")),
            ("spike_zscore", "at least 0", self.spike_zscore >= 0),
            ("spike_window", "at least 8", self.spike_window >= 8),
        )


@dataclass(frozen=True)
class ParallelConfig:
    """How processes started by torchrun share the work."""

    strategy: Literal["none", "ddp", "fsdp", "tp"] = "none"
    """none: one process. ddp: each has the model and some rows. fsdp: the model is spread over them too. tp: they share
    every layer."""
    tensor: int = 0
    """Ranks that share every layer, next to each other; ddp or fsdp is between such groups. 0: with tp all, else 1."""
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    """With fsdp, the type in which weights are gathered and blocks compute: bfloat16 halves what is sent, and rounds
    the residual stream."""
    timeout_minutes: float = 30.0
    """A rank that waits longer than this for the others gives up."""

    def __post_init__(self) -> None:
        _check(
            "parallel",
            self,
            ("strategy", "none, ddp, fsdp or tp", self.strategy in ("none", "ddp", "fsdp", "tp")),
            ("tensor", "at least 0", self.tensor >= 0),
            ("gather_dtype", "float32 or bfloat16", self.gather_dtype in ("float32", "bfloat16")),
            ("timeout_minutes", "above 0", self.timeout_minutes > 0),
        )


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT-2 on text."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def tokens_per_step(self) -> int:
        """Targets scored in a step."""
        return self.data.block_size * self.data.batch_size * self.optimizer.accumulate


def _check(section: str, values: Any, *rules: tuple[str, str, bool]) -> None:
    """Raises ValueError for the first of ``rules``, (field, what is accepted, whether it is), that does not hold."""
    for name, accepted, valid in rules:
        if not valid:
            raise ValueError(f"{section}.{name}: got {getattr(values, name)!r}, expected {accepted}")


def _divides(divisor: int, number: int) -> bool:
    return number >= 1 and divisor >= 1 and number % divisor == 0


def resolve_device(device: str) -> torch.device:
    """``"auto"`` is the GPU where there is one; a name torch does not know, or a GPU that is not there, is an error."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"run.device: got {device!r}, expected auto, cpu, cuda or cuda:N") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"run.device: {device!r} was asked for and torch sees {torch.cuda.device_count()} GPUs; use cpu"
        )
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Precision of the forward pass: bfloat16 where a GPU computes with it, else float32, unless asked for by name."""
    if dtype != "auto":
        return DTYPES[dtype]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries, as :func:`from_dict` and YAML take them."""
    return dataclasses.asdict(config)


def decisive(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings, by full name, that decide what a step computes: not how long the run is, on how many processes, nor
    what it writes."""
    chosen = {}
    for key, value in config.items():
        name = prefix + key
        if isinstance(value, dict):
            chosen |= decisive(value, f"{name}.")
        elif name in ("run.seed", "run.dtype") or not name.startswith(("run.", "schedule.", "parallel.")):
            chosen[name] = value
    return chosen


def from_dict(
    cls: type, values: dict[str, Any], default: Any = None, prefix: str = "", known: list[str] | None = None
) -> Any:
    """An instance of the dataclass ``cls`` with ``values`` in place of the defaults, every key and type checked.

    Raises:
        ValueError: a key the dataclass does not have (the message names the nearest), or a value of the wrong type.
    """
    default = cls() if default is None else default
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'config'}: expected a mapping of settings, got {values!r}")
    hints = typing.get_type_hints(cls)
    known = _settings(cls) if known is None else known
    changes = {}
    for key, value in values.items():
        key = str(key).replace("-", "_")
        if key not in hints:
            raise ValueError(
                f"unknown setting {prefix}{key}{_nearest(prefix + key, known)}; {prefix or 'sections: '}"
                f"{' has ' if prefix else ''}{', '.join(hints)}"
            )
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            changes[key] = from_dict(kind, value, getattr(default, key), f"{prefix}{key}.", known)
        else:
            changes[key] = _convert(prefix + key, value, kind)
    return dataclasses.replace(default, **changes)


def load_config(path: str | Path, cls: type = TrainConfig, default: Any = None) -> Any:
    """Reads a YAML file of sections and keys into ``cls``; what it leaves out is as in ``default``, or in ``cls()``."""
    yaml = require("yaml", "reading a config file")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config: {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is not valid YAML: {error}") from error
    return from_dict(cls, values or {}, default)


def _settings(cls: type, prefix: str = "") -> list[str]:
    names = []
    for name, kind in typing.get_type_hints(cls).items():
        names += _settings(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return names


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    leaf = name.rsplit(".", 1)[-1]
    close = close or [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    return f"; did you mean {close[0]}?" if close else ""


def _convert(name: str, value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(str, typing.get_args(kind)))}")
        return value
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        several = len(kinds) == 2 and kinds[1] is Ellipsis
        if not isinstance(value, list | tuple) or not (several or len(value) == len(kinds)):
            raise ValueError(f"{name}: got {value!r}, expected a list" + ("" if several else f" of {len(kinds)}"))
        return tuple(_convert(name, v, kinds[0] if several else k) for v, k in zip(value, [*kinds] * len(value)))
    accepted = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in accepted and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except (TypeError, ValueError):
            pass
    if (bool not in accepted and isinstance(value, bool)) or not isinstance(value, accepted):
        raise ValueError(f"{name}: got {value!r}, expected {' or '.join(k.__name__ for k in accepted)}")
    return value
