"""Loss modules over :mod:`fastformer.functional`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``logsumexp(logits) - logits[target]``, without ever storing the probabilities.

    Constructor and forward as in ``torch.nn.CrossEntropyLoss``: class weights, ``ignore_index``, ``label_smoothing``,
    ``reduction``, targets as class indices or as probabilities. ``z_loss`` as in :func:`functional.cross_entropy`.
    """

    z_loss: float = 0.0  # also of an instance of torch's class that became one of this

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``, target its shape without C in int64, or its shape."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )


class LinearCrossEntropyLoss(torch.nn.modules.loss._WeightedLoss):
    """A linear layer and the cross-entropy of its output, without ever storing the logits.

    Constructor, forward and state_dict keys (``linear.weight``, ``linear.bias``, ``weight``) as in
    ``torch.nn.LinearCrossEntropyLoss`` (torch 2.13), and ``z_loss`` as in ``functional.linear_cross_entropy``.
    """

    z_loss: float = 0.0

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: object = None,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(weight=weight, reduction=reduction)
        if weight is not None and tuple(weight.shape) != (num_classes,):
            raise ValueError(f"weight: shape {tuple(weight.shape)} is not ({num_classes},)")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not in [0, 1]")
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.options, self.z_loss = options, z_loss
        rows = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input ``(*, in_features)``, target as in ``functional.linear_cross_entropy``."""
        shape = (self.num_classes, *self.out_features)
        weight: Tensor = self.linear.weight
        bias: Tensor | None = self.linear.bias
        if self.out_features:
            weight = weight.view(*shape, self.linear.in_features)
            bias = None if bias is None else bias.view(shape)
        return functional.linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            z_loss=self.z_loss,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes},"
            f" out_features={self.out_features}, bias={self.linear.bias is not None}, reduction={self.reduction},"
            f" ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, options={self.options}"
        )
