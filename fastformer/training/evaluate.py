"""The validation loss: the objective's mean over finite batches, weighted by the targets each of them scores."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..data import Batch, to_device
from .objectives import Objective, causal_lm
from .parallel import Parallel


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    objective: Objective = causal_lm,
    dtype: torch.dtype = torch.float32,
    parallel: Parallel | None = None,
) -> float:
    """Mean loss over the scored targets of ``batches``, in evaluation mode; keeps no logits.

    Args:
        dtype: of the forward pass; float32, or half precision by autocast.
        parallel: the other processes of the job. Each has as many batches, but its own rows of them, as
            ``EvaluationWindows`` and ``EvaluationLoader`` give them by rank; the mean is over all.
    """
    parallel = parallel or Parallel()
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, targets = torch.zeros((), device=device, dtype=torch.float64), 0
    for batch in batches:
        count = 0 if "_dropped" in batch else objective.count(batch)
        if count or parallel.world_size > 1:  # ranks that share a model run it together
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = objective.loss(model, to_device(batch, device)).double()
            total += loss * count if count else 0.0
        targets += count
    model.train(was_training)
    return float(parallel.sum(total)) / max(1, parallel.total(targets))
