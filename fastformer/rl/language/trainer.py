"""The trainer of fastformer.training, with what alignment adds: notes of the loss and of rollouts, and a guard.

Optimiser, schedule, precision, checkpoints and the check of each loss are the trainer's own; rollouts are its batches.
"""

from __future__ import annotations

from typing import Any

from ...training.trainer import Step, Trainer
from .experience import Experience
from .losses import Noted, Notes

GUARDED = ("rollout_kl_k3", "kl_k3")


class AlignTrainer(Trainer):
    """Writes the notes of each step to the log, and ends the run where the policy has strayed too far.

    Args:
        noted: the loss that is trained on, whose objective this is given; None where it notes nothing.
        kl_limit: largest k3 estimate of the KL divergence to the reference, a token's mean; 0: any.
        arguments: the trainer's.
    """

    def __init__(self, *arguments: Any, noted: Noted | None = None, kl_limit: float = 0.0, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.noted, self.kl_limit = noted, kl_limit
        self._unwritten: list[tuple[int, Notes]] = []

    def train_step(self) -> Step:
        """One update, and what was noted on the way."""
        done = super().train_step()
        notes: Notes = {}
        if isinstance(self.loader, Experience):
            for of_rollout in self.loader.notes:
                notes |= of_rollout
            self.loader.notes.clear()
        if self.noted is not None:
            notes |= self.noted.take()
        if notes:
            self._unwritten.append((done.number, notes))
        if self.kl_limit and not self.stopped and max(notes.get(name, 0.0) for name in GUARDED) > self.kl_limit:
            self.stopped = "kl"
        return done

    def _record(self) -> None:
        super()._record()
        unwritten, self._unwritten = self._unwritten, []
        if self.log is not None:
            for step, notes in unwritten:
                self.log.write([{"step": step, **notes}])
