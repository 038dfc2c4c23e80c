"""Collects what the benchmark tests of one pytest session measure, prints a table after each operation, and saves."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

from benchmarks import machine, report
from benchmarks.runner import Case

PLUGIN = "fastformer-benchmarks"


class Recorder:
    """A pytest plugin, registered as :data:`PLUGIN`.

    Args:
        device: "cpu" or "cuda".
        quick: the tiny cases, two rounds; default from $FASTFORMER_BENCH_QUICK.
        seconds: timed seconds per case.
        deadline: ``time.perf_counter()`` after which cases are skipped; 0 = none.
        ops: how many operations there will be: each has its part of the time left until the deadline.
        results: where rows go; default a new one without ceilings.
        folder: where they are written; None = nowhere.
        live: print progress and tables while running; else only a summary at the end.
    """

    def __init__(
        self,
        device: str = "cpu",
        quick: bool | None = None,
        seconds: float = 2.0,
        deadline: float = 0.0,
        ops: int = 1,
        results: report.Results | None = None,
        folder: Path | None = None,
        live: bool = False,
    ) -> None:
        self.quick = os.environ.get("FASTFORMER_BENCH_QUICK") == "1" if quick is None else quick
        self.device, self.seconds, self.deadline, self.ops = device, seconds, deadline, ops
        self.results = results or report.Results(machine.describe(device), {}, "python -m pytest benchmarks")
        self.folder, self.live = folder, live
        self.__name__ = PLUGIN  # what pytest.main(plugins=[...]) registers it as
        self._op = ""
        self._until = deadline
        self._started = time.perf_counter()

    def left(self) -> float:
        """Seconds that the operation has left, negative once it has none."""
        return self._until - time.perf_counter() if self.deadline else math.inf

    def begin(self, op: str, case: Case) -> None:
        """Before a case is set up."""
        if op != self._op:
            self._finish_op()
            self._op = op
            now = time.perf_counter()
            self._until = now + (self.deadline - now) / max(self.ops, 1)
            self.ops -= 1
        if self.live and sys.stdout.isatty():
            print(f"\r\033[K{op} {case.id}", end="", flush=True)

    def end(self) -> None:
        """After a case, whatever became of it: what is there is on disk, should a later case crash or hang."""
        if self.folder:
            self.results.save(self.folder, chart=False)

    def _finish_op(self) -> None:
        if not self._op:
            return
        if self.live:
            rows = [row for row in self.results.rows if row["op"] == self._op]
            notes = [note for note in self.results.run["notes"] if note["op"] == self._op]
            clear = "\r\033[K" if sys.stdout.isatty() else ""
            print(clear + "\n".join(report.tables(rows, notes, self.results.run["device"])))
            print(f"  ({time.perf_counter() - self._started:.0f} s)", flush=True)
        self._op, self._started = "", time.perf_counter()

    def pytest_report_teststatus(self) -> tuple[str, str, str] | None:
        return ("", "", "") if self.live else None  # the tables are the output, not a dot per case

    def pytest_sessionfinish(self) -> None:
        self._finish_op()
        if self.folder and (self.results.rows or self.results.run["notes"]):
            self.results.save(self.folder)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if not self.live:
            for line in report.tables(self.results.rows, self.results.run["notes"], self.results.run["device"]):
                terminalreporter.write_line(line)
