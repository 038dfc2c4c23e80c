"""From a configuration to a trained generative model: data, model, objective, the one trainer.

    vae              images: TransformerVAE; text: TransformerTextVAE
    gan              images: TransformerGAN
    autoregressive   images: ImageGPT; for text that is ``fastformer pretrain``

What is measured beside the loss comes from the caller (``fastformer.generative_measures``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from .. import models
from ..data import EvaluationLoader, Loader, Tokenizer, load_corpus, load_tokenizer, split_documents, train_tokenizer
from ..data.collators import pad_rows
from ..data.images import ImageParts, Images, collate_images, load_images
from ..models import PreTrainedModel
from .checkpoint import NEWEST, has_checkpoint, load_state, restore_checkpoint
from .config import OptimizerConfig, RunConfig, ScheduleConfig, _check, _divides
from .generative_objectives import GANSettings, Numbered, VAESettings, gan_objective, image_gpt, vae_objective
from .objectives import Objective
from .pretrain import count, cpu_threads
from .trainer import Result, Trainer

FAMILIES = ("vae", "gan", "autoregressive")
TEXTS = ("shakespeare", "python")
SPECIAL_TOKENS = 3  # of TransformerTextVAE: before a text, after it, and in the place of a hidden word


@dataclass(frozen=True)
class GenerativeData:
    """Images, or lines of text."""

    path: str = "digits"
    """Images: digits, fashion-mnist, a folder of pictures, an .npz file; text: shakespeare, python, a .txt file."""
    size: int = 0
    """Side of the images, by averaging squares of pixels; 0: as they are."""
    levels: int = 0
    """Values of a pixel; 0: as they are."""
    images: int = 0
    """Train on so many images only; 0: all."""
    tokenizer: str = "char"
    """Of text: char, or bpe (trained on it)."""
    vocab_size: int = 1024
    """Number of tokens a bpe tokenizer is trained to."""
    max_length: int = 48
    """Tokens of a line at most, its end included; longer ones are left out."""
    batch_size: int = 64
    """Images or lines in a batch (times optimizer.accumulate in a step)."""

    def __post_init__(self) -> None:
        _check(
            "data",
            self,
            ("size", "at least 0", self.size >= 0),
            ("levels", "0, or 2 to 256", self.levels == 0 or 2 <= self.levels <= 256),
            ("images", "at least 0", self.images >= 0),
            ("tokenizer", "char or bpe", self.tokenizer in ("char", "bpe")),
            ("max_length", "at least 4", self.max_length >= 4),
            ("batch_size", "at least 2", self.batch_size >= 2),
        )

    @property
    def is_text(self) -> bool:
        return self.path in TEXTS or self.path.endswith((".txt", ".md"))


@dataclass(frozen=True)
class GenerativeModel:
    """Shape of the model; what a family has no use for is not read."""

    d_model: int = 64
    """Width; of a GAN's generator at its coarsest, its discriminator is half as wide."""
    nhead: int = 4
    """Attention heads."""
    num_layers: int = 3
    """Blocks: of a VAE's encoder and decoder each, of a GAN's stages each and its discriminator."""
    dropout: float = 0.0
    """Dropout (not in a GAN)."""
    latent_size: int = 16
    """Latents of a VAE or GAN."""
    patch_size: int = 2
    """Side of the patches of a VAE and of a discriminator; a generator writes patches of half of it."""
    likelihood: Literal["categorical", "logistic"] = "categorical"
    """A VAE's distribution of a pixel."""
    word_dropout: float = 0.3
    """Share of the words hidden from a text VAE's decoder while it learns."""

    def __post_init__(self) -> None:
        _check(
            "model",
            self,
            ("nhead", "at least 1", self.nhead >= 1),
            ("d_model", f"a multiple of model.nhead = {self.nhead}", _divides(self.nhead, self.d_model)),
            ("num_layers", "at least 1", self.num_layers >= 1),
            ("dropout", "in [0, 1)", 0 <= self.dropout < 1),
            ("latent_size", "at least 1", self.latent_size >= 1),
            ("patch_size", "at least 1", self.patch_size >= 1),
            ("word_dropout", "in [0, 1]", 0 <= self.word_dropout <= 1),
        )


@dataclass(frozen=True)
class GenerativeConfig:
    """Train a generative model of images or lines of text."""

    family: Literal["vae", "gan", "autoregressive"] = "vae"
    """vae, gan or autoregressive. It also decides the defaults of the rest: see `--family gan --help`."""
    samples: int = 1000
    """Samples that are measured beside the data."""
    data: GenerativeData = field(default_factory=GenerativeData)
    model: GenerativeModel = field(default_factory=GenerativeModel)
    vae: VAESettings = field(default_factory=VAESettings)
    gan: GANSettings = field(default_factory=GANSettings)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(weight_decay=0.01, ema_decay=0.99))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(out="runs/vae", eval_every=500))

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family: got {self.family!r}, expected one of {', '.join(FAMILIES)}")
        if self.samples < 10:
            raise ValueError(f"samples: got {self.samples}, expected at least 10")
        if self.data.is_text and self.family != "vae":
            other = "fastformer pretrain" if self.family == "autoregressive" else "family vae"
            raise ValueError(f"data.path: {self.data.path!r} is text, which {self.family} is not for; use {other}")
        if self.family == "gan" and self.optimizer.accumulate > 1:
            raise ValueError("optimizer.accumulate: got more than 1; a GAN's images are compared within a batch")


def defaults(family: str = "vae") -> GenerativeConfig:
    """What a family is trained with unless told otherwise, sized for the digits and two cores.

    A GAN's average of past gradients is short, as its goal moves (TransGAN and ViTGAN: beta1 = 0), its gradient is
    not clipped, as that would tie one network's step to the other's, the discriminator, which is the smaller network,
    has four times the generator's rate (Heusel et al. 2017, §2), and what is sampled is the average of the weights.
    """
    run = RunConfig(out=f"runs/{family}", eval_every=500)
    if family == "gan":
        return GenerativeConfig(
            family="gan",
            model=GenerativeModel(d_model=128, num_layers=2, latent_size=32),
            optimizer=OptimizerConfig(
                learning_rate=3e-4,
                weight_decay=0.0,
                beta1=0.0,
                beta2=0.99,
                clip_norm=0.0,
                ema_decay=0.998,
                rates=("discriminator.=4",),
            ),
            schedule=ScheduleConfig(kind="constant", warmup_steps=50),
            run=replace(run, best_metric="frechet_distance"),
        )
    if family == "autoregressive":
        return GenerativeConfig(
            family="autoregressive",
            model=GenerativeModel(num_layers=4, dropout=0.1),
            optimizer=OptimizerConfig(weight_decay=0.1, ema_decay=0.99),
            run=run,
        )
    return GenerativeConfig(family=family, run=run)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Lines:
    """Lines of text as token ids, each with its end; a dataset."""

    rows: list[list[int]]
    end: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[int]:
        return self.rows[index]

    def collate(self, samples: Any, keys: Any = None) -> dict[str, Any]:
        """``input_ids (B, S)``, the end as padding, and ``attention_mask``."""
        mask = np.arange(max(map(len, samples))) < np.array([len(row) for row in samples])[:, None]
        return {
            "input_ids": torch.from_numpy(pad_rows(samples, self.end)),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        }


@dataclass(frozen=True)
class GenerativeParts:
    """A data set in three parts; ``images`` of them, or ``tokenizer`` and lines."""

    train: Any
    validation: Any
    test: Any
    collator: Callable[..., Any]
    images: ImageParts | None = None
    tokenizer: Tokenizer | None = None


Metrics = Callable[[GenerativeConfig, GenerativeParts], Callable[[nn.Module], dict[str, float]] | None]
Build = Callable[[GenerativeConfig, GenerativeParts], PreTrainedModel]


def prepare_data(config: GenerativeConfig, tokenizer: Tokenizer | None = None) -> GenerativeParts:
    """Reads ``config.data``; ``tokenizer`` is that of a run that is continued.

    Raises:
        FileNotFoundError, ValueError: there is no such data, or a setting that does not fit it, named.
    """
    data = config.data
    if data.is_text:
        return _lines(data, tokenizer)
    parts = load_images(data.path, size=data.size, levels=data.levels)
    train: Images = parts.train.part(slice(data.images or None))
    return GenerativeParts(train, parts.validation, parts.test, collate_images, images=parts)


def _lines(data: GenerativeData, tokenizer: Tokenizer | None) -> GenerativeParts:
    corpus = load_corpus(data.path)
    train, held_out = split_documents(corpus, 0.1)
    known = corpus.documents if data.tokenizer == "char" else train
    tokenizer = tokenizer or train_tokenizer(data.tokenizer, [d.text for d in known], data.vocab_size)
    end = tokenizer.vocab_size + 1  # TransformerTextVAEConfig.eos_token_id

    def rows(documents: Any) -> list[list[int]]:
        lines = dict.fromkeys(line.strip() for d in documents for line in d.text.splitlines())
        encoded = (tokenizer.encode(line) for line in lines if line and not line.endswith(":"))
        return [[*ids, end] for ids in encoded if len(ids) < data.max_length]

    parts = rows(train), rows(held_out)
    if not parts[0] or len(parts[1]) < 4:
        raise ValueError(
            f"data.max_length: {data.max_length} leaves {len(parts[0])} lines to train on and {len(parts[1])} held out"
        )
    half = len(parts[1]) // 2
    lines = [Lines(part, end) for part in (parts[0], parts[1][:half], parts[1][half:])]
    return GenerativeParts(*lines, lines[0].collate, tokenizer=tokenizer)


def build_model(config: GenerativeConfig, data: GenerativeParts) -> PreTrainedModel:
    """A model of ``config`` for the data, its weights drawn from ``config.run.seed``."""
    torch.manual_seed(config.run.seed)
    shape = config.model
    common = {"nhead": shape.nhead, "num_layers": shape.num_layers, "d_model": shape.d_model}
    if data.tokenizer is not None:
        return models.TransformerTextVAE(
            models.TransformerTextVAEConfig(
                **common,
                vocab_size=data.tokenizer.vocab_size + SPECIAL_TOKENS,
                max_length=config.data.max_length,
                latent_size=shape.latent_size,
                dropout=shape.dropout,
                word_dropout=shape.word_dropout,
            )
        )
    _, channels, side, _ = data.train.pixels.shape
    common |= {"image_size": side, "num_channels": channels, "levels": data.train.levels}
    if config.family == "autoregressive":
        labels = data.train.num_labels
        return models.ImageGPT(models.ImageGPTConfig(**common, num_labels=labels, dropout=shape.dropout))
    common |= {"latent_size": shape.latent_size}
    if config.family == "gan":
        return models.TransformerGAN(
            models.TransformerGANConfig(
                **common,
                patch_size=max(1, shape.patch_size // 2),
                discriminator_width=shape.d_model // 2,
                discriminator_layers=shape.num_layers,
                discriminator_patch=shape.patch_size,
            )
        )
    return models.TransformerVAE(
        models.TransformerVAEConfig(
            **common, patch_size=shape.patch_size, likelihood=shape.likelihood, dropout=shape.dropout
        )
    )


def objective_of(config: GenerativeConfig) -> Objective:
    """What the family is trained to."""
    if config.family == "gan":
        return gan_objective(config.gan)
    return vae_objective(config.vae) if config.family == "vae" else image_gpt


def train(
    config: GenerativeConfig, *, metrics: Metrics | None = None, build: Build | None = None, quiet: bool = False
) -> tuple[Result, PreTrainedModel, GenerativeParts]:
    """Trains as ``config`` says; leaves checkpoints and logs in ``config.run.out``.

    Args:
        metrics: makes, of the configuration and the data, what the trainer measures beside the loss.
        build: makes the model, in place of :func:`build_model`; one with the methods of that family's.

    Returns:
        How it ended, the model to use (the best, where ``run.keep_best`` keeps it, else the average of the weights,
        where there is one), and the data.

    Raises:
        FileExistsError: ``run.out`` holds a checkpoint already and ``run.resume`` is not set.
        FileNotFoundError: there is no such data, or no checkpoint to resume.
        ValueError: settings that do not fit the data or the run being resumed.
    """
    trainer, data = prepare(config, metrics=metrics, build=build, quiet=quiet)
    result = trainer.fit()
    kept = [trainer.out / name for name in ("best", "ema", NEWEST)]
    usable = config.run.keep_best, bool(config.optimizer.ema_decay), True
    used = next(path for path, wanted in zip(kept, usable) if wanted and path.is_dir())
    return result, type(trainer.model).from_pretrained(used, device=trainer.device), data  # type: ignore[attr-defined]


def prepare(
    config: GenerativeConfig, *, metrics: Metrics | None = None, build: Build | None = None, quiet: bool = False
) -> tuple[Trainer, GenerativeParts]:
    """The trainer of a run, ready to ``fit``, and its data; arguments and errors as in :func:`train`."""
    out = Path(config.run.out)
    if has_checkpoint(out) and not config.run.resume:
        raise FileExistsError(
            f"run.out: {out} holds a checkpoint already; continue it with --run.resume, or choose another --run.out"
        )
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    checkpoint = restore_checkpoint(out) if config.run.resume else None
    tokenizer = load_tokenizer(checkpoint) if checkpoint is not None and config.data.is_text else None
    data = prepare_data(config, tokenizer)
    model = (build or build_model)(config, data)
    if checkpoint is not None:
        model = type(model).from_pretrained(checkpoint)
    size = min(config.data.batch_size, len(data.train))
    validation = EvaluationLoader(data.validation, data.collator, config.data.batch_size)
    trainer = Trainer(
        model,
        Numbered(Loader(data.train, data.collator, size, seed=config.run.seed)),
        config,
        objective=objective_of(config),
        validation=None if config.family == "gan" else validation,  # its loss says how the two networks stand
        metrics=None if metrics is None else metrics(config, data),
        tokenizer=data.tokenizer,
        quiet=quiet,
    )
    if checkpoint is not None:
        trainer.load_state_dict(load_state(checkpoint))
    if not quiet:
        print(describe(data, trainer))
    return trainer, data


def describe(data: GenerativeParts, trainer: Trainer) -> str:
    """The run in three lines: data, model, machine."""
    config, model = trainer.config, trainer.model
    if data.tokenizer is not None:
        what = f"lines of {config.data.path}, {data.tokenizer.vocab_size} tokens"
    else:
        shape = " × ".join(map(str, data.train.pixels.shape[1:]))
        what = f"images of {config.data.path}, {shape}, {data.train.levels} levels"
    on = f"cpu, {cpu_threads()}" if trainer.device.type == "cpu" else str(trainer.device)
    sizes = ", ".join(f"{name} {_parameters(part)}" for name, part in model.named_children())
    networks = f" ({sizes})" if config.family == "gan" else ""
    return (
        f"data   {count(len(data.train))} {what}; {count(len(data.validation))} for validation, "
        f"{count(len(data.test))} to report on\n"
        f"model  {type(model).__name__}, {_parameters(model)} parameters{networks}\n"
        f"run    {on}, {str(trainer.dtype)[6:]}; {config.run.max_steps} steps of "
        f"{config.data.batch_size * config.optimizer.accumulate}"
    )


def _parameters(module: nn.Module) -> str:
    return count(sum(p.numel() for p in module.parameters()))
