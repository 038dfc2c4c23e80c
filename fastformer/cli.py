"""The ``fastformer`` command: ``fastformer <verb> --section.key value``.

Each verb is a function of its arguments that imports what it needs when it runs. Options are the fields of a dataclass,
their help text the docstrings (tyro). Exit status: 0, 1 when the job failed, 2 for arguments that make no sense.
"""

from __future__ import annotations

import difflib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .extras import MissingPackageError, require
from .version import __version__

Config = TypeVar("Config")


@dataclass(frozen=True)
class GenerateConfig:
    """Write text with a trained model."""

    model: str = "runs/demo"
    """A checkpoint directory, or a run that holds one."""
    prompt: str = "\n"
    """Text to continue."""
    max_new_tokens: int = 200
    """Tokens to write; the context may be shorter."""
    temperature: float = 0.8
    """Below 1 is bolder about likely tokens, above 1 about unlikely ones; 0 always takes the likeliest."""
    top_k: int = 40
    """Draw among the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Of those, among the likeliest whose probabilities add up to this."""
    min_p: float = 0.0
    """Of those, among tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes what was written before less likely."""
    no_repeat_ngram_size: int = 0
    """No sequence of so many tokens twice; 0 for off."""
    num_beams: int = 1
    """Beam search with so many hypotheses: use temperature 0. The text comes at the end."""
    stop: tuple[str, ...] = ()
    """Texts that end the writing."""
    seed: int | None = None
    """The same seed writes the same text; without one it is new each time."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1 …"""


def demo(arguments: Sequence[str]) -> int:
    """Train a small GPT on Shakespeare for three minutes, write with it, compare it with torch.nn."""
    from .demo import DemoConfig, run

    run(parse(DemoConfig, arguments, "demo"))
    return 0


def clean(arguments: Sequence[str]) -> int:
    """Clean a corpus step by step, without its duplicates, and say what each step did."""
    from .data.cleaning import CleanConfig, run_clean

    print(run_clean(parse(CleanConfig, arguments, "clean")))
    return 0


def tokenize(arguments: Sequence[str]) -> int:
    """Encode text into token shards, to train on without doing so again."""
    from .data import TokenizeConfig
    from .data import tokenize as write_tokens

    written = write_tokens(parse(TokenizeConfig, arguments, "tokenize"))
    for part in (written.train, written.validation):
        print(part)
    return 0


def pretrain(arguments: Sequence[str]) -> int:
    """Train a GPT-2 on your text."""
    from .training.config import TrainConfig, load_config

    path, rest = _take(arguments, "config")
    default = load_config(path, TrainConfig) if path else TrainConfig()
    epilogue = "--config FILE.yaml reads the same sections and keys from a file; flags override it."
    config = parse(TrainConfig, rest, "pretrain", default=default, description=f"Train a GPT-2 on text. {epilogue}")
    from .training.pretrain import pretrain as train

    train(config)
    return 0


def finetune(arguments: Sequence[str]) -> int:
    """Train a pre-trained model for a task: labels, tags, answers, instructions."""
    from .task_metrics import task_metrics
    from .training.finetune import FinetuneConfig
    from .training.finetune import finetune as train

    train(_parse_or_read(FinetuneConfig, arguments, "finetune"), metrics=task_metrics)
    return 0


def align(arguments: Sequence[str]) -> int:
    """Align a language model: reward models, DPO, and PPO, GRPO or RLOO on its own completions."""
    from .rl.language.config import AlignConfig
    from .rl.language.run import align as train

    train(_parse_or_read(AlignConfig, arguments, "align"))
    return 0


def generative(arguments: Sequence[str]) -> int:
    """Train a VAE, a GAN or an autoregressive model of images or lines of text, measure it, and show samples."""
    from .generative_measures import run
    from .training.generative import GenerativeConfig, defaults

    run(_parse_or_read(GenerativeConfig, arguments, "generative", chosen_by=(("family",), defaults)))
    return 0


def search(arguments: Sequence[str]) -> int:
    """Find learning rate, batch size and dropout for a fine-tuning."""
    from .task_metrics import task_metrics
    from .training.search import SearchConfig
    from .training.search import search as run

    run(_parse_or_read(SearchConfig, arguments, "search"), metrics=task_metrics)
    return 0


def rl(arguments: Sequence[str]) -> int:
    """Train an agent in an environment: DQN, REINFORCE, A2C or PPO."""
    from .rl.config import AgentConfig, preset
    from .rl.run import train

    train(_parse_or_read(AgentConfig, arguments, "rl", chosen_by=(("algorithm", "environment"), preset)))
    return 0


def generate(arguments: Sequence[str]) -> int:
    """Write text with a trained model, shown as it is made."""
    config = parse(GenerateConfig, arguments, "generate")
    from .data import load_tokenizer
    from .models import from_pretrained
    from .training.checkpoint import find_checkpoint
    from .training.config import resolve_device
    from .writing import write

    checkpoint = find_checkpoint(config.model)
    device = resolve_device(config.device)
    tokenizer = load_tokenizer(checkpoint)
    model = from_pretrained(checkpoint, device=device)
    say(config.prompt)
    written = write(
        model,
        tokenizer,
        config.prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        seed=config.seed,
        emit=say,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        num_beams=config.num_beams,
        stop_strings=list(config.stop) or None,
    )
    speed = f"{written.tokens / written.seconds:,.0f} tokens/s on {device}"
    print(flush=True)
    print(f"[{written.tokens} tokens in {written.seconds:.1f} s, {speed}]", file=sys.stderr)
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Measure a model on held-out text, labels or answers, with intervals, and write a report."""
    from .evaluation.command import EvaluateConfig, run

    config = parse(EvaluateConfig, arguments, "evaluate")
    from .data import load_tokenizer
    from .models import from_pretrained
    from .training.checkpoint import find_checkpoint
    from .training.config import resolve_device

    checkpoint = find_checkpoint(config.model)
    model = from_pretrained(checkpoint, device=resolve_device(config.device))
    run(config, model, load_tokenizer(checkpoint), shlex.join(["fastformer", "evaluate", *arguments]))
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """Say what this machine has, which kernels were built, and which of them run."""
    _no_arguments("doctor", arguments)
    from .doctor import report

    print(report())
    return 0


def bench(arguments: Sequence[str]) -> int:
    """Measure every operation beside PyTorch (from a checkout of the repository)."""
    repository = Path(__file__).resolve().parent.parent
    if not (repository / "benchmarks" / "__main__.py").is_file():
        raise FileNotFoundError(
            f"bench: there is no benchmarks/ in {repository}; the benchmarks come with the repository, not with the "
            "installed package. In a checkout: make bench"
        )
    return subprocess.call([sys.executable, "-m", "benchmarks", *arguments], cwd=repository)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "clean": clean,
    "tokenize": tokenize,
    "pretrain": pretrain,
    "finetune": finetune,
    "align": align,
    "generative": generative,
    "search": search,
    "rl": rl,
    "generate": generate,
    "evaluate": evaluate,
    "bench": bench,
    "doctor": doctor,
}

EXAMPLES = """\
examples:
  fastformer demo
  fastformer demo --minutes 10 --tokenizer bpe --out runs/longer
  fastformer clean --source raw/ --out cleaned.jsonl --config cleaning.yaml
  fastformer pretrain --data.path my.txt --model.n-embd 256 --run.max-minutes 30 --run.out runs/mine
  fastformer pretrain --config run.yaml --run.resume
  fastformer finetune --task classification --model MODEL --data.path reviews.csv --run.out runs/sentiment
  fastformer align --algorithm grpo --model MODEL --data.task chain_sum --lora.rank 8 --run.out runs/sums
  fastformer generative --family gan --data.path digits --run.out runs/gan
  fastformer search --task classification --model MODEL --data.path reviews.csv --search.trials 20 --run.out runs/search
  fastformer rl --algorithm ppo --environment CartPole-v1 --seeds 3 --run.out runs/cartpole
  fastformer tokenize --source my.txt --vocab-size 8192 --out data/mine
  fastformer generate --model runs/demo --prompt "ROMEO:" --max-new-tokens 200 --temperature 0.8 --top-k 40 --seed 0
  fastformer evaluate --model runs/demo --data held-out.txt --stride 32
"""


def usage() -> str:
    """The text of ``fastformer --help``."""
    verbs = "\n".join(f"  {name:12s}{function.__doc__}" for name, function in VERBS.items())
    return f"""\
fastformer {__version__}: transformer layers as fused kernels, and what trains and samples a model with them

usage: fastformer VERB [options]
       fastformer VERB --help

{verbs}

{EXAMPLES}
FASTFORMER_BACKEND=cuda|triton|cpu|reference chooses the kernels.
FASTFORMER_TRACEBACK=1 shows where an error came from."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"fastformer {__version__}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        print(f"fastformer: there is no {verb!r}.{hint} Verbs: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        return VERBS[verb](rest)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MissingPackageError, RuntimeError) as error:
        if os.environ.get("FASTFORMER_TRACEBACK"):
            raise
        print(f"fastformer {verb}: {error}", file=sys.stderr)
        if not isinstance(error, (ValueError, OSError, MissingPackageError)):
            print("(FASTFORMER_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1


def parse(cls: type[Config], arguments: Sequence[str], verb: str, **settings: Any) -> Config:
    """An instance of the dataclass ``cls`` from flags; help, or a message that names the nearest flag, and exit."""
    tyro = require("tyro", f"fastformer {verb}")
    return tyro.cli(cls, args=list(arguments), prog=f"fastformer {verb}", **settings)


def _parse_or_read(
    cls: type[Config],
    arguments: Sequence[str],
    verb: str,
    chosen_by: tuple[tuple[str, ...], Callable[..., Config]] | None = None,
) -> Config:
    """:func:`parse`, over the values of ``--config FILE.yaml``, over ``cls()``; with ``chosen_by``, fields and a
    function of them, over what that returns for their values."""
    from .training.config import load_config

    path, rest = _take(arguments, "config")
    default = load_config(path, cls) if path else cls()
    if chosen_by is not None:
        names, defaults = chosen_by
        default = defaults(*(_take(rest, name)[0] or getattr(default, name) for name in names))
        default = load_config(path, cls, default) if path else default
    text = f"{(cls.__doc__ or '').strip()} --config FILE.yaml reads the same keys from a file; flags override it."
    return parse(cls, rest, verb, default=default, description=text)


def say(piece: str) -> None:
    """Prints text as it is made."""
    print(piece, end="", flush=True)


def _take(arguments: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Splits ``--name VALUE`` or ``--name=VALUE`` off."""
    rest, value = [], None
    pending = iter(arguments)
    for argument in pending:
        if argument == f"--{name}":
            value = next(pending, None)
            if value is None:
                raise ValueError(f"--{name}: needs {'the name of a YAML file' if name == 'config' else 'a value'}")
        elif argument.startswith(f"--{name}="):
            value = argument.removeprefix(f"--{name}=")
        else:
            rest.append(argument)
    return value, rest


def _no_arguments(verb: str, arguments: Sequence[str]) -> None:
    if any(argument in ("-h", "--help") for argument in arguments):
        print(f"usage: fastformer {verb}\n\n{VERBS[verb].__doc__}")
        raise SystemExit(0)
    if arguments:
        raise ValueError(f"takes no arguments; got {' '.join(arguments)}")
