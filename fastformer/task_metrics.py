"""What fine-tuning measures beside the loss, by ``fastformer.evaluation``: of labels, and of answers' spans.

It sits above both because training does not import evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .data import Batch, to_device

if TYPE_CHECKING:
    from .training.finetune import PreparedTask


def task_metrics(data: PreparedTask, batch_size: int) -> Callable[[nn.Module], dict[str, float]] | None:
    """The function that a trainer calls for its metrics: accuracy and macro F1 of labels (of tokens where each has
    one), exact match and F1 of spans; None for tasks that are written, whose loss says enough while they are learnt.
    Each process of ``data.parallel`` runs its share of the samples, and all get the metrics of a single one."""
    from .evaluation import Classification, evaluate

    batches = data.validation_batches(batch_size)
    gather = data.parallel.gather
    if data.labels:

        def of_labels(model: nn.Module) -> dict[str, float]:
            scores = evaluate(model, batches, Classification(data.labels), worst=0, gather=gather).scores()
            return {"accuracy": scores["accuracy"], "macro_f1": scores["F1 macro"]}

        return of_labels
    if data.encoder.task == "question_answering":
        return lambda model: span_scores(model, batches, gather)
    return None


@torch.no_grad()
def span_scores(
    model: nn.Module, batches: Iterable[Batch], gather: Callable[[Any], list[Any]] | None = None
) -> dict[str, float]:
    """Of the likeliest spans: the share that is exact, and the mean F1 of their tokens (a window without an answer has
    its first token for one). ``gather`` as in :func:`fastformer.evaluation.evaluate`."""
    device = next(model.parameters()).device
    exact: list[bool] = []
    f1: list[float] = []
    for batch in batches:
        wanted = (batch["start_positions"], batch["end_positions"])
        positions = ("start_positions", "end_positions")
        inputs = {name: v for name, v in batch.items() if name not in positions and not name.startswith("_")}
        output = model(**to_device(inputs, device))
        spans = likeliest_spans(output.start_logits.float(), output.end_logits.float())
        first, last = (t.cpu() for t in spans)
        overlap = (torch.minimum(last, wanted[1]) - torch.maximum(first, wanted[0]) + 1).clamp(min=0)
        if "_dropped" not in batch:
            f1 += (2 * overlap / ((last - first + 1) + (wanted[1] - wanted[0] + 1))).tolist()
            exact += ((first == wanted[0]) & (last == wanted[1])).tolist()
    parts = [(exact, f1)] if gather is None else gather((exact, f1))
    total = sum(len(found) for found, _ in parts)
    # Exact sums do not depend on who has which sample.
    return {
        "exact": sum(sum(found) for found, _ in parts) / total,
        "f1": math.fsum(value for _, values in parts for value in values) / total,
    }


def likeliest_spans(start_logits: torch.Tensor, end_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, last) ``(B)``: the span with the largest start + end that does not end before it begins.

    Args:
        start_logits, end_logits: ``(B, S)``.
    """
    length = start_logits.shape[1]
    scores = (start_logits[:, :, None] + end_logits[:, None, :]).masked_fill(
        torch.ones(length, length, dtype=torch.bool, device=start_logits.device).tril(-1), -torch.inf
    )
    best = scores.flatten(1).argmax(dim=1)
    return best // length, best % length
