"""Cleaning as a list of steps, and a report of what each of them did.

    pipeline = Pipeline([NormalizeUnicode(), RepairEncoding(), FilterLanguage("en"), RemoveNearDuplicates()])
    report = CleaningReport()
    for document in pipeline.run(open_source("raw.jsonl"), report):
        ...
    print(report)

Documents stream through in batches of a megabyte, in their order; memory is what the steps remember (see
:mod:`.cleaning_steps`), not the corpus. The same list can be written in YAML::

    steps:
      - normalize_unicode
      - filter_language: {language: en, minimum_probability: 0.8}
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import time
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..extras import require
from ..models.pretrained import replaced
from . import cleaning_steps
from .cleaning_steps import Removed, Step
from .corpora import Document
from .pii import MaskPII
from .sources import Source, open_source

BATCH_CHARACTERS, BATCH_DOCUMENTS = 1 << 20, 1024
EXAMPLES = 3  # shown of what a step removed or changed
_AROUND = 30  # characters shown before and after the first difference

STEPS: dict[str, type[Step]] = {
    re.sub("(?<=[a-z])(?=[A-Z])", "_", step.__name__).lower(): step
    for step in (
        cleaning_steps.NormalizeUnicode,
        cleaning_steps.RepairEncoding,
        cleaning_steps.RemoveControlCharacters,
        cleaning_steps.RemoveMarkup,
        cleaning_steps.FilterLanguage,
        cleaning_steps.FilterLength,
        cleaning_steps.RemoveExactDuplicates,
        cleaning_steps.RemoveNearDuplicates,
        cleaning_steps.NormalizeSpelling,
        MaskPII,
    )
}
DEFAULT_STEPS = (
    "repair_encoding",
    "normalize_unicode",
    "remove_control_characters",
    "remove_markup",
    "filter_length",
    "remove_exact_duplicates",
    "remove_near_duplicates",
)


@dataclass
class Example:
    """What a step did to one document: the reason it was removed for, or its text around the first change."""

    document: str
    removed: str | None = None
    before: str = ""
    after: str = ""

    def __str__(self) -> str:
        return f"{self.document}: {self.removed or f'{self.before!r} → {self.after!r}'}"


@dataclass
class StepReport:
    """What one step did; sizes in characters, ``changed`` in documents that stayed."""

    step: str
    documents_in: int = 0
    documents_out: int = 0
    characters_in: int = 0
    characters_out: int = 0
    changed: int = 0
    seconds: float = 0.0
    examples: list[Example] = field(default_factory=list)
    repeats: list[tuple[str, str, float]] = field(default_factory=list)
    """(removed document, the document it repeats, their similarity), all of them."""

    def add(self, before: Sequence[Document], after: Sequence[Document | Removed], seconds: float) -> None:
        """Counts one batch."""
        self.seconds += seconds
        self.documents_in += len(before)
        for old, new in zip(before, after):
            self.characters_in += len(old.text)
            if isinstance(new, Removed):
                if new.repeats is not None:
                    self.repeats.append((old.name, new.repeats, new.similarity))
            else:
                self.documents_out += 1
                self.characters_out += len(new.text)
                if new.text == old.text:
                    continue
                self.changed += 1
            if len(self.examples) < EXAMPLES:
                self.examples.append(_example(old, new))


@dataclass
class CleaningReport:
    """What a pipeline did, step by step; ``print`` shows a table and the examples."""

    steps: list[StepReport] = field(default_factory=list)

    @property
    def documents_in(self) -> int:
        """Documents read."""
        return self.steps[0].documents_in

    @property
    def documents_out(self) -> int:
        """Documents left."""
        return self.steps[-1].documents_out

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    def to_markdown(self) -> str:
        """The table and the examples, as Markdown."""
        head, *rows = self._table()
        lines = ["# What cleaning did", "", _markdown_row(head), "|---|" + "---:|" * (len(head) - 1)]
        lines += [_markdown_row(row) for row in rows]
        for step in self.steps:
            if step.examples:
                lines += ["", f"## {step.step}", "", *(f"- {_escape(str(example))}" for example in step.examples)]
        return "\n".join(lines) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes ``path`` with the suffixes .json (everything) and .md (to read)."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        for suffix, content in ((".json", text), (".md", self.to_markdown())):
            with replaced(Path(path).with_suffix(suffix)) as temporary:
                _write(temporary, [content])

    def __str__(self) -> str:
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
            )
            for row in table
        ]
        for step in self.steps:
            lines += [f"{step.step}: {example}" for example in step.examples]
        return "\n".join(lines)

    def _table(self) -> list[list[str]]:
        rows = [["step", "documents in", "out", "changed", "characters in", "out", "seconds"]]
        for s in self.steps:
            counts = (s.documents_in, s.documents_out, s.changed, s.characters_in, s.characters_out)
            rows.append([s.step, *(f"{count:,}" for count in counts), f"{s.seconds:.2f}"])
        return rows


class Pipeline:
    """Steps, applied one after another.

    Args:
        steps: at least one.

    Raises:
        ValueError: no steps.
        TypeError: something that is none.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        if not self.steps:
            raise ValueError(f"steps: got none, expected some of {', '.join(STEPS)}")
        for step in self.steps:
            if not isinstance(step, Step):
                raise TypeError(f"steps: got {step!r}, expected instances of Step such as NormalizeUnicode()")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Pipeline:
        """The pipeline of ``{"steps": [name, {name: settings}, …]}``.

        Raises:
            ValueError: an unknown step or setting (the message names the nearest), or a value it does not take.
        """
        if not isinstance(config, Mapping) or not isinstance(config.get("steps"), list) or len(config) > 1:
            raise ValueError(f"config: expected a list of steps under the one key 'steps', got {config!r}")
        return cls([_build(entry) for entry in config["steps"]])

    @classmethod
    def from_yaml(cls, path: str | Path) -> Pipeline:
        """The pipeline in a YAML file; as :meth:`from_dict`.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: not YAML, or not a pipeline; the message names the file.
        """
        yaml = require("yaml", "reading a config file", "data")
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"config: {path} does not exist")
        try:
            return cls.from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def run(self, documents: Iterable[Document], report: CleaningReport | None = None) -> Iterator[Document]:
        """Yields what is left of ``documents``, cleaned, in their order.

        Args:
            documents: a source, or any documents.
            report: counts what each step does while the documents are read; what it held before is lost.
        """
        report = CleaningReport() if report is None else report
        report.steps = [StepReport(_name(step)) for step in self.steps]
        for step in self.steps:
            step.begin()
        for batch in _batches(documents):
            for step, counts in zip(self.steps, report.steps):
                started = time.perf_counter()
                done = step.process(batch)
                counts.add(batch, done, time.perf_counter() - started)
                batch = [document for document in done if not isinstance(document, Removed)]
                if not batch:
                    break
            yield from batch


def clean(source: Any, out: str | Path, pipeline: Pipeline | None = None) -> CleaningReport:
    """Cleans a corpus into a JSON Lines file, which is written whole or not at all.

    Args:
        source: as for :func:`open_source`.
        out: a ``.jsonl``; each line has the document's name, its metadata, and its text.
        pipeline: default: every step that has no question to ask, :data:`DEFAULT_STEPS`.

    Returns:
        The report, which is also beside ``out``, as ``.report.json`` and ``.report.md``.

    Raises:
        ValueError: ``out`` has another suffix, or nothing is left of the corpus (the message has the report).
    """
    out = Path(out)
    if out.suffix not in (".jsonl", ".ndjson"):
        raise ValueError(f"out: got {str(out)!r}, expected a file name that ends in .jsonl")
    pipeline = pipeline or Pipeline.from_dict({"steps": list(DEFAULT_STEPS)})
    source = source if isinstance(source, Source) else open_source(source)
    report = CleaningReport()
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced(out) as temporary:
        lines = (
            json.dumps({**d.metadata, "name": d.name, "text": d.text}, ensure_ascii=False, default=str) + "\n"
            for d in pipeline.run(source, report)
        )
        _write(temporary, lines)
        if not report.documents_out:
            raise ValueError(f"nothing is left of {source.name}:\n{report}")
    report.save(out.with_name(out.stem + ".report.json"))
    return report


@dataclass(frozen=True)
class CleanConfig:
    """Clean a corpus into a JSON Lines file, with a report of what each step did."""

    source: str
    """A text, .jsonl(.gz) or .parquet file, a directory of them, hf:NAME, shakespeare or python."""
    out: str
    """The .jsonl to write; its .report.json and .report.md come beside it."""
    config: str | None = None
    """A YAML file with the steps; without one, all that have no question to ask."""
    text_field: str = "text"
    """The field of a record that holds its text."""
    split: str = "train"
    """Of a data set on the hub."""
    undecodable: typing.Literal["error", "guess"] = "error"
    """What to do about bytes that are not UTF-8: stop, or guess their encoding."""


def run_clean(config: CleanConfig) -> CleaningReport:
    """What ``fastformer clean`` does."""
    pipeline = Pipeline.from_yaml(config.config) if config.config else None
    source = open_source(
        config.source, text_field=config.text_field, split=config.split, undecodable=config.undecodable
    )
    return clean(source, config.out, pipeline)


def _build(entry: Any) -> Step:
    """The step that one entry of a config stands for."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ValueError(f"steps: got {entry!r}, expected a step's name, alone or with its settings")
    ((name, settings),) = entry.items()
    if name not in STEPS:
        raise ValueError(f"steps: there is no step {name!r}{_nearest(name, STEPS)}; there are {', '.join(STEPS)}")
    kind = STEPS[name]
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        raise ValueError(f"{name}: got {settings!r}, expected a mapping of settings")
    fields = typing.get_type_hints(kind)
    for key, value in settings.items():
        if key not in fields:
            has = f"it has {', '.join(fields)}" if fields else "it has none"
            raise ValueError(f"{name} has no setting {key!r}{_nearest(key, fields)}; {has}")
        if not _fits(value, fields[key]):
            raise ValueError(f"{name}.{key}: got {value!r}, expected {_describe(fields[key])}")
    try:
        return kind(**settings)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error


def _fits(value: Any, kind: Any) -> bool:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    classes = tuple(typing.get_origin(option) or option for option in options)
    if isinstance(value, bool):
        return bool in classes
    if isinstance(value, str):
        return str in classes  # a text is a Sequence as well, but not the one that is meant
    return isinstance(value, classes) or (float in classes and isinstance(value, int))


def _describe(kind: Any) -> str:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    names = {types.NoneType: "null", Sequence: "a list", Mapping: "a mapping"}
    return " or ".join(names.get(typing.get_origin(o) or o, getattr(o, "__name__", str(o))) for o in options)


def _nearest(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _name(step: Step) -> str:
    """A step's name in a config; a class of the user's own has its own name."""
    return next((name for name, kind in STEPS.items() if kind is type(step)), type(step).__name__)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _example(old: Document, new: Document | Removed) -> Example:
    """Why it was removed, or the two texts around where they first differ."""
    if isinstance(new, Removed):
        return Example(old.name, removed=new.reason)
    pairs = enumerate(zip(old.text, new.text))
    start = next((i for i, (a, b) in pairs if a != b), min(len(old.text), len(new.text)))
    left, right = max(0, start - _AROUND), start + _AROUND
    shown = [("…" * (left > 0)) + text[left:right] + ("…" * (right < len(text))) for text in (old.text, new.text)]
    return Example(old.name, None, *shown)


def _write(path: Path, pieces: Iterable[str]) -> None:
    """Writes and waits until the disk has it; lone surrogates, which UTF-8 has no bytes for, become question marks."""
    with path.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)
