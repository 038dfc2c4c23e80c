"""What ``generate`` returns with ``return_dict_in_generate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..models.outputs import ModelOutput


@dataclass
class GenerateOutput(ModelOutput):
    """The fields of ``transformers``; those not asked for, or not of this strategy, are None.

    Args:
        sequences: ``(B * num_return_sequences, S + new)`` int64, as without ``return_dict_in_generate``.
        sequences_scores: ``(B * num_return_sequences)``, of beam search: log-probability / length ** length_penalty.
        scores: per step ``(rows, V)`` float32: logits (log-probabilities in beam search) after the processors. Rows are
            ``B * num_return_sequences``, or ``B * num_beams``.
        logits: per step ``(rows, V)``: those of the model.
        beam_indices: ``(B * num_return_sequences, new)``, of beam search: the row of ``scores`` each token came from,
            -1 behind the end.
        past_key_values: the cache, where the decoder has one.
    """

    sequences: Tensor | None = None
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    past_key_values: Any = None
