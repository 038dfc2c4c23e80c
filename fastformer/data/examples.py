"""Labelled examples: rows with named columns, from JSON Lines, CSV, TSV or Python, checked and split.

A column that is not there is an error that has the nearest name, and an example that does not fit one that says which.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .sources import JSON_SUFFIXES

Example = Mapping[str, Any]
SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_examples(source: str | Path | Iterable[Example], name: str = "data") -> list[dict[str, Any]]:
    """The examples of a file (.jsonl, .ndjson: an object a line; .csv, .tsv: columns named in the first row), or of
    Python mappings.

    Args:
        name: what a message calls them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a line that is no example, or none at all.
    """
    if not isinstance(source, str | Path):
        examples = list(map(dict, source))
        where = name
    else:
        path = Path(source).expanduser()
        where = f"{name}: {path}"
        if not path.is_file():
            raise FileNotFoundError(f"{name}: {str(path)!r} does not exist")
        if path.suffix.lower() in SEPARATORS:
            examples = _read_table(path, where)
        elif path.suffix.lower() in JSON_SUFFIXES:
            examples = _read_json(path, where)
        else:
            known = ", ".join((*JSON_SUFFIXES, *SEPARATORS))
            raise ValueError(f"{where}: expected the suffix {known}")
    if not examples:
        raise ValueError(f"{where} is empty; there is nothing to learn from")
    return examples


def check_columns(examples: Sequence[Example], columns: Mapping[str, str], name: str = "data") -> None:
    """Raises ValueError unless every example has every column.

    Args:
        columns: setting -> the column it names.
    """
    for index, example in enumerate(examples):
        for setting, column in columns.items():
            if example.get(column) is None:
                near = difflib.get_close_matches(column, [str(key) for key in example if key != column], 1, 0.4)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"{setting}: {name} example {index} has no {column!r}{hint} It has {', '.join(map(str, example))}"
                )


def split_examples(
    examples: Sequence[dict[str, Any]], fraction: float, seed: int = 0, label: str | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rest, held out), drawn at random, both in their old order.

    Args:
        fraction: share that is held out, in (0, 1); at least one example on either side.
        label: a column whose values have about that share each.

    Raises:
        ValueError: too few examples.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"validation_fraction: got {fraction}, expected a number between 0 and 1")
    if len(examples) < 2:
        raise ValueError(f"data: {len(examples)} example cannot be split; give validation examples of their own")
    order = np.random.default_rng(seed).permutation(len(examples))
    if label is not None:
        # Every n-th of them is held out, so of each label its share.
        order = np.array(sorted(order, key=lambda i: str(examples[i].get(label))))
    count = min(max(round(fraction * len(examples)), 1), len(examples) - 1)
    spread = ((np.arange(count) + 0.5) * len(order) / count).astype(int)
    held_out = set(order[spread].tolist())
    return (
        [example for i, example in enumerate(examples) if i not in held_out],
        [example for i, example in enumerate(examples) if i in held_out],
    )


def _read_json(path: Path, where: str) -> list[dict[str, Any]]:
    examples = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                example = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}, line {number} is not JSON: {error}") from error
            if not isinstance(example, dict):
                raise ValueError(f"{where}, line {number} is not an object with keys: {line.strip()[:60]}")
            examples.append(example)
    return examples


def _read_table(path: Path, where: str) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter=SEPARATORS[path.suffix.lower()])
        examples = []
        for row in rows:
            if None in row or None in row.values():
                columns = ", ".join(rows.fieldnames or ())
                raise ValueError(f"{where}, line {rows.line_num} has not one field for each of the columns {columns}")
            examples.append(dict(row))
    return examples
