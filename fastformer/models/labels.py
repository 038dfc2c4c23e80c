"""What a configuration says of the classes that a model with a head tells apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .losses import PROBLEM_TYPES
from .pretrained import PreTrainedConfig


@dataclass
class LabelledConfig(PreTrainedConfig):
    """Classes and their names, as in ``transformers``.

    ``num_labels`` (default 2) is the number of entries of ``id2label``; setting it to another number names the labels
    anew. A subclass has ``extra`` for its last field, and ends its ``__post_init__`` with :meth:`_name_labels`.
    """

    derived_fields: ClassVar[dict[str, tuple[str, ...]]] = {
        "num_labels": ("id2label", "label2id"),
        "id2label": ("label2id", "num_labels"),
    }

    id2label: dict[int, str] | None = field(default=None, kw_only=True)
    label2id: dict[str, int] | None = field(default=None, kw_only=True)
    num_labels: int | None = field(default=None, kw_only=True)
    problem_type: str | None = field(default=None, kw_only=True)

    def _name_labels(self) -> None:
        """Brings id2label, label2id and num_labels into agreement."""
        count = self.num_labels
        if count is not None and count < 1:
            raise ValueError(f"num_labels: {count} is not positive")
        if self.id2label is None and self.label2id is not None:
            self.id2label = {i: label for label, i in self.label2id.items()}
        if self.id2label is None:
            self.id2label = {i: f"LABEL_{i}" for i in range(2 if count is None else count)}
        elif count is not None and count != len(self.id2label):
            raise ValueError(f"num_labels: {count} beside an id2label of {len(self.id2label)}")
        else:
            self.id2label = {int(i): label for i, label in self.id2label.items()}  # strings in config.json
        if self.label2id is None:
            self.label2id = {label: i for i, label in self.id2label.items()}
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"problem_type: {self.problem_type!r} is not one of {', '.join(PROBLEM_TYPES)}")
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError("problem_type: single_label_classification takes at least two labels")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if "extra" not in self.__dict__:  # the constructor has not set every field yet
            return
        if name == "id2label":
            super().__setattr__("num_labels", len(value))
        elif name == "num_labels" and value != len(self.id2label or ()):
            super().__setattr__("id2label", {i: f"LABEL_{i}" for i in range(value)})
            super().__setattr__("label2id", {f"LABEL_{i}": i for i in range(value)})

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, where id2label stands for num_labels."""
        return {name: value for name, value in super().to_dict().items() if name != "num_labels"}


@dataclass
class LabelledDecoderConfig(LabelledConfig):
    """The same for a decoder, whose configuration in ``transformers`` need not have ``classifier_dropout``."""

    classifier_dropout: float | None = field(default=None, kw_only=True)

    def _name_labels(self) -> None:
        if self.classifier_dropout is not None and not 0 <= self.classifier_dropout <= 1:
            raise ValueError(f"classifier_dropout: {self.classifier_dropout} is not in [0, 1]")
        super()._name_labels()

    @property
    def head_dropout(self) -> float:
        """Dropout before the classifier of tokens: classifier_dropout, else hidden_dropout, else 0.1."""
        given = (self.classifier_dropout, self.extra.get("hidden_dropout"))
        return next((p for p in given if p is not None), 0.1)

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json; without classifier_dropout where there is none."""
        values = super().to_dict()
        if self.classifier_dropout is None:
            del values["classifier_dropout"]
        return values
