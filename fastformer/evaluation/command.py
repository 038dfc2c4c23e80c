"""``fastformer evaluate``: a checkpoint on a file, and the report of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..data import read_text
from .bootstrap import METHODS, RESAMPLES
from .classification import Classification
from .evaluate import Evaluation, Slice, by_label, by_length, evaluate, read_records
from .metric import Metric
from .perplexity import Perplexity, score_examples
from .predictions import classify_texts, generate_texts
from .report import write_report
from .text import BLEU, ROUGE, ChrF, ErrorRate, exact_match

METRICS: dict[str, Callable[[], Metric]] = {
    "bleu": BLEU,
    "chrf": ChrF,
    "rouge": ROUGE,
    "exact": exact_match,
    "wer": ErrorRate,
    "per": partial(ErrorRate, "PER"),
    "cer": partial(ErrorRate, "CER"),
}


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a trained model on held-out examples."""

    model: str = "runs/demo"
    """A checkpoint directory, or a run that holds one."""
    data: str = ""
    """perplexity: a text file, a directory of them, or JSONL; other tasks: JSONL, one example a line."""
    task: Literal["perplexity", "classification", "seq2seq"] = "perplexity"
    """seq2seq is any written answer: an encoder-decoder model's, or a causal one's continuation."""
    out: str = "runs/evaluation"
    """Directory for report.md, records.jsonl and plots."""
    text: str = "text"
    """Key of the text to score or to classify."""
    label: str = "label"
    """Key of the label: a name from the model's id2label, or its number."""
    source: str = "source"
    """Key of what is answered."""
    target: str = "target"
    """Key of the wanted answer, a text or a list of texts."""
    prompt: str = "{}"
    """What the model reads, {} in the place of the source."""
    metrics: tuple[str, ...] = ("bleu", "chrf")
    """Of answers: bleu, chrf, rouge, exact, wer, per, cer; the first one sorts the examples."""
    slices: tuple[str, ...] = ()
    """Further tables: length (words), label, or any other key of the examples."""
    baselines: tuple[str, ...] = ()
    """NAME=FILE, records.jsonl of another system on the same examples; or NAME:SCORE=NUMBER, a published score."""
    context: int | None = None
    """Tokens read at a time for perplexity, or of a text or prompt; default all the model has."""
    stride: int | None = None
    """Tokens the window of a long text moves by; default half the context."""
    max_new_tokens: int = 64
    """Length of an answer."""
    num_beams: int = 1
    """Beam search with so many hypotheses; 1 is greedy."""
    batch_size: int = 16
    """Examples at a time."""
    worst: int = 10
    """How many of the worst examples to list."""
    method: Literal["percentile", "bca"] = "percentile"
    """Bootstrap intervals; bca corrects for skew."""
    resamples: int = RESAMPLES
    """Draws of the bootstrap and of the tests."""
    seed: int = 0
    """Of the draws."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1 …"""

    def __post_init__(self) -> None:
        checks = [
            ("a file or directory", "data", self.data, bool(self.data)),
            (f"one or more of {', '.join(METRICS)}", "metrics", self.metrics, bool(self.metrics)),
            *((f"one of {', '.join(METRICS)}", "metrics", name, name in METRICS) for name in self.metrics),
            *(("NAME=FILE or NAME:SCORE=NUMBER", "baselines", entry, "=" in entry) for entry in self.baselines),
            ("at least 1", "batch_size", self.batch_size, self.batch_size >= 1),
            ("at least 1", "max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1),
            ("at least 1", "resamples", self.resamples, self.resamples >= 1),
            (f"one of {', '.join(METHODS)}", "method", self.method, self.method in METHODS),
        ]
        for accepted, name, value, valid in checks:
            if not valid:
                raise ValueError(f"{name}: got {value!r}, expected {accepted}")


def run(config: EvaluateConfig, model: Any, tokenizer: Any, command: str = "") -> Path:
    """Evaluates, prints the scores, and returns the report.

    Raises:
        ValueError: data that has no examples, labels of one class alone, a key that is missing; the message names it.
    """
    out = Path(config.out)
    data = _examples(config)
    make, predict, names = _task(config, model, tokenizer)
    baselines = dict(_baseline(entry, make) for entry in config.baselines)
    slices = {name: _slice(name, config, names) for name in config.slices}
    records = out / "records.jsonl"
    found = evaluate(model, data, make(), predict=predict, records=records, slices=slices, worst=config.worst)
    report = write_report(
        found,
        out,
        title=f"{config.model} on {config.data}: {config.task}",
        baselines=baselines,
        command=command,
        method=config.method,
        resamples=config.resamples,
        seed=config.seed,
    )
    for name, interval in found.intervals(method=config.method, resamples=config.resamples, seed=config.seed).items():
        if interval.score == interval.score:
            print(f"{name:30s} {interval}")
    print(f"{len(found):,} examples in {found.seconds:.1f} s; {report}")
    return report


def _task(config: EvaluateConfig, model: Any, tokenizer: Any) -> tuple[Callable[[], list[Metric]], Any, list[str]]:
    """What makes new metrics, what makes records, and the names of the classes."""
    if config.task == "perplexity":
        options = {"context": config.context, "stride": config.stride, "batch_size": config.batch_size}
        return lambda: [Perplexity()], partial(score_examples, tokenizer=tokenizer, text=config.text, **options), []
    if config.task == "classification":
        labels = getattr(model.config, "id2label", None)
        writes = getattr(model, "get_output_embeddings", lambda: None)() is not None  # words, not classes
        if writes or not labels:
            raise ValueError(
                f"model: {type(model).__name__} has no classes; expected a model with a classification head"
            )
        names = [labels[number] for number in sorted(labels)]
        _check_labels(config)
        options = {"text": config.text, "label": config.label, "max_length": config.context}
        predict = partial(classify_texts, tokenizer=tokenizer, names=names, batch_size=config.batch_size, **options)
        return lambda: [Classification(names)], predict, names
    options = {"source": config.source, "target": config.target, "prompt": config.prompt, "max_length": config.context}
    options.update(max_new_tokens=config.max_new_tokens, num_beams=config.num_beams, batch_size=config.batch_size)
    return (
        lambda: [METRICS[name]() for name in config.metrics],
        partial(generate_texts, tokenizer=tokenizer, **options),
        [],
    )


def _examples(config: EvaluateConfig) -> Iterator[dict[str, Any]]:
    """The examples of a file, one at a time; the file is there and has something in it."""
    path = Path(config.data).expanduser()
    if config.task == "perplexity" and path.suffix not in (".jsonl", ".json"):
        documents = read_text(path).documents
        return ({"name": document.name, config.text: document.text} for document in documents)
    if not path.is_file():
        raise FileNotFoundError(f"data: {str(path)!r} does not exist; expected JSONL, one example a line")
    if not path.stat().st_size:
        raise ValueError(f"data: {path} is empty")
    return _lines(path)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                example = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"data: {path}, line {number} is not JSON: {error}") from error
            if not isinstance(example, dict):
                raise ValueError(f"data: {path}, line {number} is not an object with keys: {line.strip()[:60]}")
            yield example


def _check_labels(config: EvaluateConfig) -> None:
    """Labels of one class would be found out after the model has run over all of them."""
    classes = {str(example.get(config.label)) for example in _lines(Path(config.data).expanduser())}
    if len(classes) == 1:
        raise ValueError(
            f"{config.label}: every example of {config.data} has {classes.pop()!r}; precision, recall and F1 compare "
            "classes and need two or more"
        )


def _slice(name: str, config: EvaluateConfig, names: list[str]) -> Slice:
    if name == "length":
        return by_length(config.source if config.task == "seq2seq" else config.text)
    if name == "label" and names:
        return by_label(names)
    return lambda record: str(record.shown.get(name, "–"))


def _baseline(entry: str, make: Callable[[], list[Metric]]) -> tuple[str, Evaluation | Mapping[str, float]]:
    name, value = entry.split("=", 1)
    if ":" not in name:
        if not Path(value).is_file():
            raise FileNotFoundError(f"baselines: {name} is {value!r}, which does not exist; expected a records.jsonl")
        return name, read_records(value, make())
    name, score = name.split(":", 1)
    try:
        return name, {score: float(value)}
    except ValueError:
        raise ValueError(f"baselines: {entry!r} gives {value!r} for a score, expected a number") from None
