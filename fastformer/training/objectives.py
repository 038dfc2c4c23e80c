"""What is minimised: an objective is a loss of a model's answers to a batch, and how many targets that is the mean of.

    causal_lm                the next token at every position
    instruction              the same, on the answers only
    masked_lm                the words behind [MASK]
    seq2seq                  the decoder's tokens
    token_classification     a label per token
    sequence_classification  a label, several, or a number per text
    question_answering       where an answer begins and ends

``model(**batch).loss`` is that mean for every model of ``fastformer.models`` and of ``transformers``. The count comes
from the batch before it goes to the device, so that nothing waits there; accumulation and data parallel training weigh
by it. Where the logits of a language model would be large they are never made (``linear_cross_entropy``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch

# Above so many logits (16 MiB in float32) the loss without them is no slower, and soon faster.
MOST_LOGITS = 1 << 22


@dataclass(frozen=True)
class Objective:
    """``objective(model, batch)`` is (loss, count).

    Attributes:
        loss: of a model and a batch on its device, the mean over the targets that are scored; a float32 scalar.
        count: of a batch, how many these are.
    """

    loss: Callable[[nn.Module, Batch], Tensor]
    count: Callable[[Batch], int]

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return self.loss(model, batch), self.count(batch)


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """``model(**batch).loss``, without a cache, and without the logits where a model can do that and they are large.

    Raises:
        ValueError: the batch has no labels.
    """
    inputs = {name: value for name, value in batch.items() if not name.startswith("_")}
    accepted = _arguments(type(unwrap(model)))
    if "shift_labels" in inputs and "shift_labels" not in accepted:
        inputs["labels"] = inputs["shift_labels"]  # transformers' models pass them on, but only beside labels
    if "use_cache" in accepted:
        inputs.setdefault("use_cache", False)
    if "skip_logits" in accepted:
        spread = getattr(unwrap(model), "spread_vocabulary", False)  # no process has all logits
        inputs.setdefault("skip_logits", spread or _logits(unwrap(model), inputs) > MOST_LOGITS)
    loss = model(**inputs).loss
    if loss is None:
        raise ValueError(f"batch: has {', '.join(batch)}; there is nothing that the model scores, such as labels")
    return loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss


def instruction_loss(model: nn.Module, batch: Batch) -> Tensor:
    """:func:`model_loss` on the tokens that ``answer_mask`` (B, S) marks with 1; without one, on ``labels``."""
    return model_loss(model, _answers(batch))


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, ``torch.compile`` or peft."""
    for name in ("module", "_orig_mod"):
        if isinstance(inner := getattr(model, name, None), nn.Module):
            return unwrap(inner)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_classes(labels: Iterable[int], num_labels: int | None = None) -> None:
    """Raises ValueError unless ``labels`` (-100 aside) are of two classes or more, each in [0, num_labels)."""
    classes = {int(label) for label in labels} - {-100}
    if not classes:
        raise ValueError("labels: there are none to learn from")
    if len(classes) == 1:
        raise ValueError(f"labels: every one is {classes.pop()}; a classifier needs two classes or more to learn from")
    outside = [c for c in classes if c < 0 or (num_labels is not None and c >= num_labels)]
    if outside:
        raise ValueError(f"labels: {min(outside)} is not in [0, {num_labels or 'number of classes'})")


def _answers(batch: Batch) -> Batch:
    if "answer_mask" not in batch:
        return batch
    inputs = {name: value for name, value in batch.items() if name != "answer_mask"}
    inputs["labels"] = batch["input_ids"].masked_fill(batch["answer_mask"] == 0, -100)
    return inputs


def _scored(labels: Tensor) -> int:
    return int((labels != -100).sum())


def _next_tokens(batch: Batch) -> int:
    if "shift_labels" in batch:
        return _scored(batch["shift_labels"])
    return _scored(_labels(batch)[:, 1:])  # nothing comes before the first token to tell it from


def _positions(batch: Batch) -> int:
    return _scored(_labels(batch))


def _texts(batch: Batch) -> int:
    labels = _labels(batch)
    return _scored(labels) if labels.dim() == 1 and not labels.is_floating_point() else len(labels)


def _spans(batch: Batch) -> int:
    if "start_positions" not in batch or "end_positions" not in batch:
        raise ValueError(f"batch: has {', '.join(batch)}; question answering needs start_positions and end_positions")
    return len(batch["start_positions"])


def _labels(batch: Batch) -> Tensor:
    if "labels" not in batch:
        raise ValueError(f"batch: has {', '.join(batch)}; the objective needs labels")
    return batch["labels"]


@functools.lru_cache
def _arguments(model: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


def _logits(model: nn.Module, inputs: dict[str, Any]) -> int:
    """How many logits the model makes for these inputs."""
    positions = next((inputs[name] for name in ("labels", "shift_labels", "input_ids") if name in inputs), None)
    return 0 if positions is None else positions.numel() * getattr(model.config, "vocab_size", 0)


causal_lm = Objective(model_loss, _next_tokens)
instruction = Objective(instruction_loss, lambda batch: _next_tokens(_answers(batch)))
masked_lm = Objective(model_loss, _positions)
seq2seq = Objective(model_loss, _positions)
token_classification = Objective(model_loss, _positions)
sequence_classification = Objective(model_loss, _texts)
question_answering = Objective(model_loss, _spans)

OBJECTIVES = {
    "causal_lm": causal_lm,
    "instruction": instruction,
    "masked_lm": masked_lm,
    "seq2seq": seq2seq,
    "token_classification": token_classification,
    "sequence_classification": sequence_classification,
    "question_answering": question_answering,
}
