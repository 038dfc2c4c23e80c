"""What a run writes while it goes: one JSON line a step, TensorBoard scalars, and a progress line on the terminal.

In a terminal the progress is one line that updates; in a file or a pipe it is a line now and then.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from ..extras import require

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a run's ``metrics.jsonl``: ``{"step", "loss", ...}`` and ``{"step", "validation_loss"}``.

    A last line that is cut off, by the end of the process that wrote it, is left out.
    """
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]


class MetricsLog:
    """metrics.jsonl and, if asked for, TensorBoard's event file, in the run's directory.

    Args:
        directory: of the run; made if missing.
        first_step: steps that a resumed run has behind it. Records of later ones, written after its checkpoint by the
            run that ended, are dropped: they are about to be made again.
        tensorboard: write ``directory/tensorboard``.
    """

    def __init__(self, directory: str | Path, first_step: int = 0, tensorboard: bool = True) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        kept = read_metrics(path) if first_step and path.exists() else []
        # By a rename, so that a run killed here still has its log.
        fresh = path.with_suffix(".writing")
        fresh.write_text("".join(json.dumps(r) + "\n" for r in kept if r["step"] <= first_step), encoding="utf-8")
        os.replace(fresh, path)
        self._file = path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard:
            require("tensorboard", "the TensorBoard log (run.tensorboard)")
            from torch.utils.tensorboard import SummaryWriter

            events = directory / "tensorboard"
            if not first_step:
                for stale in events.glob("events.out.tfevents.*"):
                    stale.unlink()
            self._writer = SummaryWriter(str(events), purge_step=first_step + 1 if first_step else None)

    def write(self, records: list[dict[str, Any]]) -> None:
        """Appends records, null for a number that is not finite; the last goes to TensorBoard, number by number."""
        for record in records:
            line = {name: _finite(value) for name, value in record.items()}
            self._file.write(json.dumps(line, default=str) + "\n")
        try:
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, f"could not write the log: {error.strerror}", self._file.name) from error
        if self._writer is not None and records:
            step = records[-1]["step"]
            for name, value in records[-1].items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been said
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """One line: step, bar, training loss, validation loss, tokens/s, time left.

    Args:
        max_steps: the schedule's length.
        quiet: print nothing.
        every_seconds: pause between two lines where the output is not a terminal.
    """

    def __init__(self, max_steps: int, quiet: bool = False, every_seconds: float = 15.0) -> None:
        self.max_steps = max_steps
        self._every = every_seconds
        self._last_line = time.monotonic()
        self._validation = ""
        self._bar = None
        self._quiet = quiet
        if not quiet and sys.stdout.isatty():
            bar = require("rich.progress", "the progress bar")
            self._bar = bar.Progress(
                bar.TextColumn("[bold]step {task.fields[step]}[/]"),
                bar.BarColumn(bar_width=None),
                bar.TextColumn("loss [bold]{task.fields[loss]}[/]{task.fields[validation]}"),
                bar.TextColumn("{task.fields[speed]}"),
                bar.TextColumn("{task.fields[left]}"),
            )
            self._task = self._bar.add_task("", total=1.0, step="0", loss="–", validation="", speed="", left="")
            self._bar.start()

    def update(
        self, step: int, share: float, loss: float, tokens_per_second: float, seconds_left: float, mfu: float = math.nan
    ) -> None:
        """``share`` of the run that is done, in [0, 1]; the other numbers as they stand after ``step``. ``mfu``, the
        share of the machine's arithmetic in use, is left out where it is NaN."""
        left = f"{int(seconds_left) // 60}:{int(seconds_left) % 60:02d} left"
        speed = f"{tokens_per_second:,.0f} tokens/s" + (f", {mfu:.0%} MFU" if math.isfinite(mfu) else "")
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=share,
                step=f"{step}/{self.max_steps}",
                loss=f"{loss:.3f}",
                validation=self._validation,
                speed=speed,
                left=left,
            )
        elif not self._quiet and time.monotonic() - self._last_line >= self._every:
            self._last_line = time.monotonic()
            print(f"  step {step}/{self.max_steps}  loss {loss:.3f}{self._validation}  {speed}  {left}", flush=True)

    def validation(self, loss: float) -> None:
        self._validation = f"  validation {loss:.3f}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
