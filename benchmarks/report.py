"""Results for people and for machines: the printed table, ``results.json`` and ``results.md``; charts.py draws them.

``results.json`` is one table over time: a row is keyed by operation, shape, dtype, pass, variant, provider, machine,
versions and commit, and a newer row replaces an older one with the same key. A table shown to people only ever has
rows of one run in it: a peer measured on another day proves nothing."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import charts
from benchmarks.goals import Verdict, verdicts
from benchmarks.runner import OPS, Case

JSON, MARKDOWN = "results.json", "results.md"


class Results:
    """What one run has found so far.

    Args:
        about: machine, versions, commit, date (:func:`benchmarks.machine.describe`).
        ceilings: :func:`benchmarks.machine.ceilings`, or empty where they were not measured.
        command: what was typed.
    """

    def __init__(self, about: Mapping[str, Any], ceilings: Mapping[str, float], command: str) -> None:
        self.run: dict[str, Any] = {**about, "ceilings": dict(ceilings), "command": command, "notes": []}
        self.id = f"{about['date']} {about['commit']} {secrets.token_hex(3)}"
        self.rows: list[dict[str, Any]] = []
        self.unfinished: list[dict[str, Any]] = []  # of a case of long calls that is still being measured

    @property
    def ceilings(self) -> Mapping[str, float]:
        return self.run["ceilings"]

    def add(
        self, op: str, case: Case, rows: Iterable[dict[str, Any]], missing: Mapping[str, str], wrong: Mapping[str, str]
    ) -> None:
        """The rows of one case, why some providers have none, and which computed something else."""
        self.rows += rows
        self.unfinished = []
        for provider, reason in missing.items():
            self._note(op, case, provider, "failed" if reason.startswith("failed") else "not measured", reason)
        for provider, difference in wrong.items():
            self._note(op, case, provider, "wrong", difference)

    def skip(self, op: str, case: Case, reason: str) -> None:
        self._note(op, case, "", "skipped", reason)

    def fail(self, op: str, case: Case, error: BaseException) -> None:
        self.rows += self.unfinished
        self.unfinished = []
        self._note(op, case, "ours", "failed", f"{type(error).__name__}: {error}"[:500])

    def _note(self, op: str, case: Case, provider: str, kind: str, text: str) -> None:
        note = {"op": op, "case": case.id, "provider": provider, "kind": kind, "text": text}
        self.run["notes"].append(note)

    @property
    def broken(self) -> list[dict[str, str]]:
        """Where our own provider failed or disagreed with eager."""
        return [n for n in self.run["notes"] if n["provider"] == "ours" and n["kind"] in ("failed", "wrong")]

    def save(self, folder: Path, chart: bool = True) -> None:
        """Merges into ``folder``'s JSON, draws what was measured (which takes seconds) and writes the Markdown anew."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JSON
        stored = json.loads(path.read_text()) if path.exists() else {"runs": {}, "rows": []}
        merged = merge(stored, {"runs": {self.id: self.run}, "rows": self.rows + self.unfinished})
        partial = path.with_suffix(".json.new")
        partial.write_text(json.dumps(merged, indent=1, ensure_ascii=False) + "\n")
        partial.replace(path)
        if chart:
            charts.draw(merged, folder, {row["op"] for row in self.rows})
        (folder / MARKDOWN).write_text(markdown(merged, charts.drawn(folder)))


def key(row: Mapping[str, Any], runs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two rows the same measurement."""
    run = runs[row["run"]]
    case = tuple(row[name] for name in ("op", "shape", "dtype", "pass", "variant", "provider"))
    return (*case, run["machine"], json.dumps(run["versions"], sort_keys=True), run["commit"])


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``{"runs": ..., "rows": ...}`` of both; rows with the same :func:`key` are ``new``'s, unused runs are dropped."""
    runs = {**old["runs"], **new["runs"]}
    table = {key(row, runs): row for row in old["rows"]}
    for row in new["rows"]:
        table.pop(key(row, runs), None)  # so that it also moves to the end
        table[key(row, runs)] = row
    used = {row["run"] for row in table.values()} | set(new["runs"])
    return {"runs": {name: run for name, run in runs.items() if name in used}, "rows": list(table.values())}


# ---- tables ----------------------------------------------------------------------------------------------------------


def grouped(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[Case, dict[str, Mapping[str, Any]]]]:
    """Operation -> case -> provider -> row, in the order of :data:`OPS` and of measurement."""
    table: dict[str, dict[Case, dict[str, Mapping[str, Any]]]] = {}
    for row in rows:
        shape = tuple(int(n) for n in row["shape"].split("x"))
        case = Case(shape, row["dtype"], row["pass"] == "forward+backward", row["variant"])
        table.setdefault(row["op"], {}).setdefault(case, {})[row["provider"]] = row
    return {op: table[op] for op in sorted(table, key=lambda op: OPS.index(op) if op in OPS else len(OPS))}


def judged(op: str, case: Case, by_provider: Mapping[str, Mapping[str, Any]], device: str) -> list[Verdict]:
    """The verdicts on one case."""
    times = {name: row["median_s"] for name, row in by_provider.items()}
    share = by_provider.get("ours", {}).get("share_of_limit")
    return verdicts(op, device, case, times, share, items=by_provider.get("ours", {}).get("items") or 0)


def cells(op: str, cases: Mapping[Case, Mapping[str, Mapping[str, Any]]], device: str) -> list[list[str]]:
    """The table of one operation, header first. A peer's cell has its time and, as a factor, our speed over its."""
    providers = list(dict.fromkeys(name for by_provider in cases.values() for name in by_provider))
    judgements = {case: judged(op, case, by_provider, device) for case, by_provider in cases.items()}
    goals = list(dict.fromkeys(v.goal.text() for found in judgements.values() for v in found))
    limited = any(row["share_of_limit"] for by_provider in cases.values() for row in by_provider.values())
    header = ["case", *providers, *(["of the limit"] if limited else []), *goals]
    lines = [header]
    for case, by_provider in cases.items():
        ours = by_provider.get("ours")
        line = [case_text(case)]
        for name in providers:
            row = by_provider.get(name)
            if row is None:
                line.append("–")
            elif name == "ours" or ours is None:
                line.append(f"{_speed(row)} ±{row['spread']:.0%}")
            else:
                line.append(f"{_speed(row)} ({row['median_s'] / ours['median_s']:.2f}×)")
        if limited:
            share = (ours or {}).get("share_of_limit")
            line.append(f"{share:.0%} {ours['limited_by']}" if share else "–")
        found = {v.goal.text(): v for v in judgements[case]}
        line += [f"{found[g].measured} {'✓' if found[g].met else '✗ missed'}" if g in found else "" for g in goals]
        lines.append(line)
    return lines


def tables(rows: Iterable[Mapping[str, Any]], notes: Iterable[Mapping[str, str]], device: str) -> list[str]:
    """A run's rows as lines of text: one table per operation, then what is missing and why."""
    lines: list[str] = []
    for op, cases in grouped(rows).items():
        lines += ["", f"{op}   (medians; in brackets our speed over that peer's)", *_aligned(cells(op, cases, device))]
    return lines + [f"  {line}" for line in _notes_text(notes)]


def goal_lines(rows: Iterable[Mapping[str, Any]], device: str) -> list[str]:
    """How many goals are met, and every one that is not."""
    met, missed = 0, []
    for op, cases in grouped(rows).items():
        for case, by_provider in cases.items():
            for verdict in judged(op, case, by_provider, device):
                met += verdict.met
                if not verdict.met:
                    missed.append(
                        f"  missed: {op} {case_text(case)}: {verdict.goal.text()}, measured {verdict.measured}"
                    )
    return [f"Goals: {met} met, {len(missed)} missed.", *missed]


def ceiling_text(ceilings: Mapping[str, float]) -> str:
    """The machine's limits in one line."""
    if not ceilings:
        return "ceilings not measured"
    parts = [
        f"clone() {ceilings['clone'] / 1e9:.1f} GB/s",
        f"copy into mapped memory {ceilings['copy'] / 1e9:.1f} GB/s",
    ]
    parts += [
        f"{n.removeprefix('matmul_')} matmul {v / 1e9:,.0f} GFLOP/s" for n, v in ceilings.items() if "matmul" in n
    ]
    return ", ".join(parts)


def markdown(stored: Mapping[str, Any], pictures: Mapping[str, str] | None = None) -> str:
    """The newest run of every operation as Markdown, with where and how it was measured.

    Args:
        pictures: operation -> address of its chart; "" -> that of the summary.
    """
    pictures = pictures or {}
    lines, described = ["# Benchmark results", ""], None
    if "" in pictures:
        lines += [f"![Speed relative to PyTorch eager, every operation]({pictures['']})", ""]
    newest = newest_rows(stored)
    for op, cases in grouped(newest).items():
        name = next(row["run"] for row in newest if row["op"] == op)
        run = stored["runs"][name]
        if name != described:
            described = name
            lines += _description(run)
        header, *body = cells(op, cases, run["device"])
        lines += [f"### {op}", ""]
        lines += [f"[Chart]({pictures[op]})", ""] if op in pictures else []
        lines += [_row(header), _row(["---"] * len(header)), *map(_row, body), ""]
        notes = _notes_text([n for n in run["notes"] if n["op"] == op])
        lines += [*(f"- {note}" for note in notes), ""] if notes else []
    return "\n".join(lines).rstrip() + "\n"


def _description(run: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return [
        f"## {run['machine']}, {run['date']}",
        "",
        f"- machine: {run['machine_details']}",
        f"- measured limits: {ceiling_text(run['ceilings'])}",
        f"- versions: {versions}",
        f"- commit: {run['commit']}",
        f"- command: `{run['command']}`",
        "",
        "Medians; ± is the interquartile range. A peer's cell: its time, and our speed over its. All providers of a "
        "case ran in one process on the same inputs, taking turns.",
        "",
    ]


def _notes_text(notes: Iterable[Mapping[str, str]]) -> list[str]:
    """Failures one by one; providers that were simply not there once per reason."""
    lines, absent = [], {}
    for note in notes:
        if note["kind"] == "not measured":
            if "main cases" not in note["text"] and note["text"] != "measured on GPUs":
                absent.setdefault((note["op"], note["provider"], note["text"]), None)
        else:
            lines.append(f"{note['op']} {note['case']} {note['provider']} {note['kind'].upper()}: {note['text']}")
    return lines + [f"{op}: {provider} not measured: {text}" for op, provider, text in absent]


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths)))
        for line in lines
    ]
    return [text[0].rstrip(), "  " + "─" * (len(text[0]) - 2), *(t.rstrip() for t in text[1:])]


def _row(line: list[str]) -> str:
    return "| " + " | ".join(line) + " |"


def case_text(case: Case) -> str:
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}.get(case.dtype, case.dtype)
    passes = "fwd+bwd" if case.backward else "fwd"
    return " ".join(filter(None, ("×".join(map(str, case.shape)), short, passes, case.variant)))


def _speed(row: Mapping[str, Any]) -> str:
    return f"{row['items'] / row['median_s']:,.0f} tokens/s" if row["items"] else _time(row["median_s"])


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:.0f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def newest_rows(stored: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of every operation, the rows of the last run that measured it."""
    newest: dict[str, str] = {}
    for row in stored["rows"]:
        date = stored["runs"][row["run"]]["date"]
        if row["op"] not in newest or date >= stored["runs"][newest[row["op"]]]["date"]:
            newest[row["op"]] = row["run"]
    return [row for row in stored["rows"] if newest[row["op"]] == row["run"]]
