"""From a configuration to a trained model: text, tokenizer, tokens, model, trainer, plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data import (
    Corpus,
    TokenizedCorpus,
    Tokenizer,
    TokenShards,
    encode_documents,
    is_tokenized,
    load_corpus,
    load_tokenized,
    load_tokenizer,
    split_documents,
    train_tokenizer,
)
from ..models.gpt2 import GPT2Config, GPT2LMHeadModel
from .checkpoint import NEWEST, has_checkpoint, load_state, restore_checkpoint
from .config import DataConfig, TrainConfig
from .logs import read_metrics
from .parallel import Parallel, processes
from .trainer import Result, Trainer


@dataclass(frozen=True)
class PreparedData:
    """A corpus, its tokenizer, and both parts as streams of tokens: int32, or token shards."""

    corpus: Corpus | TokenizedCorpus
    tokenizer: Tokenizer
    train: Tensor | TokenShards
    validation: Tensor | TokenShards


def prepare_data(config: DataConfig, tokenizer: Tokenizer | None = None) -> PreparedData:
    """Reads, splits and encodes ``config.path``; or opens it, if ``fastformer tokenize`` wrote it.

    A new tokenizer learns its merges from the training part; its characters are those of the whole corpus, so that
    every held-out character can be scored.

    Raises:
        ValueError: text shorter than a window, or an unknown tokenizer; the message names the setting.
    """
    if is_tokenized(config.path):
        shards = load_tokenized(config.path, tokenizer)
        return _long_enough(PreparedData(shards, shards.train.tokenizer(), shards.train, shards.validation), config)
    corpus = load_corpus(config.path, text_field=config.text_field)
    train, validation = split_documents(corpus, config.validation_fraction)
    if tokenizer is None:
        if config.tokenizer in ("char", "bpe") or not Path(config.tokenizer).exists():
            documents = corpus.documents if config.tokenizer == "char" else train
            tokenizer = train_tokenizer(config.tokenizer, [d.text for d in documents], config.vocab_size)
        else:
            tokenizer = load_tokenizer(config.tokenizer)
    parts = [encode_documents(tokenizer, documents) for documents in (train, validation)]
    return _long_enough(PreparedData(corpus, tokenizer, *parts), config)


def _long_enough(data: PreparedData, config: DataConfig) -> PreparedData:
    for name, part in (("training", data.train), ("held-out", data.validation)):
        if part.numel() < config.block_size + 1:
            raise ValueError(
                f"data.block_size: {config.block_size} does not fit the {name} text, which has {part.numel()} tokens; "
                "use a smaller data.block_size, more text, or another data.validation_fraction"
            )
    return data


def build_model(config: TrainConfig, tokenizer: Tokenizer) -> GPT2LMHeadModel:
    """A GPT-2 of ``config.model`` for the tokenizer, its weights drawn from ``config.run.seed``."""
    torch.manual_seed(config.run.seed)
    shape, p = config.model, config.model.dropout
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=tokenizer.vocab_size,
            n_positions=config.data.block_size,
            n_embd=shape.n_embd,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            resid_pdrop=p,
            embd_pdrop=p,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def pretrain(config: TrainConfig, *, quiet: bool = False) -> Result:
    """Trains a model as ``config`` says; leaves checkpoints, logs, loss.png and run.png in ``config.run.out``.

    Raises:
        FileExistsError: ``run.out`` holds a checkpoint already and ``run.resume`` is not set.
        FileNotFoundError: ``run.resume`` is set and there is no checkpoint.
        ValueError: settings that do not fit the text or the run being resumed.
    """
    with processes(config.parallel, config.run.device) as parallel:
        return _pretrain(config, parallel, quiet)


def _pretrain(config: TrainConfig, parallel: Parallel, quiet: bool) -> Result:
    out = Path(config.run.out)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    if config.run.resume:
        checkpoint = parallel.first(lambda: restore_checkpoint(out))
        state = load_state(checkpoint)
        data = prepare_data(config.data, load_tokenizer(checkpoint))
        model = GPT2LMHeadModel.from_pretrained(checkpoint)
    else:
        if parallel.first(lambda: has_checkpoint(out)):
            raise FileExistsError(
                f"run.out: {out} holds a checkpoint already; continue it with --run.resume, or choose another --run.out"
            )
        data = prepare_data(config.data)
        model = build_model(config, data.tokenizer)
    quiet = quiet or not parallel.writes
    trainer = Trainer.on_tokens(
        model, data.train, data.validation, config, tokenizer=data.tokenizer, parallel=parallel, quiet=quiet
    )
    if config.run.resume:
        trainer.load_state_dict(state)
    if not quiet:
        print(describe(data, trainer))
    result = trainer.fit()
    if not trainer.parallel.writes:
        return result
    from .plots import plot_loss, plot_run

    records = read_metrics(out)
    plot_loss(records, out / "loss.png", title=f"GPT-2 on {data.corpus.name}")
    plot_run(records, out / "run.png", title=f"GPT-2 on {data.corpus.name}")
    if not quiet:
        used = result.tokens_per_second * trainer.flops_per_token / trainer.peak
        print(
            f"{result.steps} steps, {count(result.tokens)} tokens in {result.seconds:.0f} s "
            f"({result.tokens_per_second:,.0f} tokens/s, {used:.0%} of {trainer.peak_source}); "
            f"validation loss {result.validation_loss:.3f}\n"
            f"{out / NEWEST}: try `fastformer generate --model {out}`"
        )
    return result


def describe(data: PreparedData, trainer: Trainer) -> str:
    """The run in three lines: text, model, machine."""
    config, corpus = trainer.config, data.corpus
    shape, minutes = config.model, config.run.max_minutes
    parameters = sum(p.numel() for p in trainer.model.parameters())
    on_cpu = f"cpu, {cpu_threads()}"
    return (
        f"text   {corpus.name}: {count(len(corpus))} characters; {count(data.train.numel())} tokens to train on, "
        f"{count(data.validation.numel())} held out ({corpus.note})\n"
        f"model  GPT-2, {count(parameters)} parameters: {shape.n_layer} layers, {shape.n_head} heads, "
        f"{shape.n_embd} wide, context {config.data.block_size}, {data.tokenizer.vocab_size} tokens\n"
        f"run    {on_cpu if trainer.device.type == 'cpu' else trainer.device}, {str(trainer.dtype)[6:]}; "
        f"{config.tokens_per_step:,} tokens a step, {config.run.max_steps} steps"
        + (f" or {minutes:g} minutes" if minutes else "")
    )


def count(number: int) -> str:
    """A number to read: 4.79 M, or 12,345 below a hundred thousand."""
    return f"{number / 1e6:.2f} M" if number >= 100_000 else f"{number:,}"


def cpu_threads() -> str:
    """How many threads PyTorch and the kernels use."""
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)}"
