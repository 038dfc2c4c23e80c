"""Exponential moving average of the weights, ema = decay ema + (1 - decay) w after every step.

Polyak averaging with a horizon of about 1 / (1 - decay) steps: the average of the noisy weights at the end of training
is usually better than the last of them, and can be evaluated at any time. The first steps use the smaller decay
(1 + step) / (10 + step), so that the random initial weights are soon forgotten. The average lives beside the model, in
one update over all tensors; the model's code knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .parallel import Parallel, Part, read_missing


class Ema:
    """The average of the parameters of ``model`` that require a gradient.

    Args:
        model: its present weights are where the average begins.
        decay: in (0, 1), weight of the average so far.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay: got {decay}, expected in (0, 1)")
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the weights after ``step`` (from 1) into the average."""
        decay = min(self.decay, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the average as its weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_dict(self, parallel: Parallel | None = None) -> dict[str, Tensor | None]:
        """The average by parameter name; None where ``parallel`` ranks have :meth:`parts` of it."""
        parallel = parallel or Parallel()
        return {
            name: None if parallel.holds_part() else parallel.whole(name, tensor)
            for name, tensor in self.average.items()
        }

    def parts(self, parallel: Parallel) -> dict[str, Part]:
        """What this rank has of the average."""
        return {f"average/{name}": parallel.part(name, tensor) for name, tensor in self.average.items()}

    def load_state_dict(
        self, state: dict[str, Tensor | None], parallel: Parallel | None = None, parts: Path | None = None
    ) -> None:
        """Continues from what :meth:`state_dict` returned, and from the directory ``parts`` what is None there.

        Raises:
            ValueError: it is of other parameters.
        """
        parallel = parallel or Parallel()
        if state.keys() != self.average.keys():
            raise ValueError(f"ema: saved for other parameters: {sorted(state.keys() ^ self.average.keys())[:5]}")
        for name, tensor in state.items():
            if tensor is not None:
                self.average[name].copy_(parallel.share(name, tensor, self.parameters[name]))
        mine = self.parts(parallel).items()
        read_missing({key: part for key, part in mine if state[key.split("/", 1)[1]] is None}, parts)

    @torch.no_grad()
    def _exchange(self) -> None:
        # Values and not memory: layers keep weights side by side for one matmul, and decoders keep their addresses.
        for name, parameter in self.parameters.items():
            weights = parameter.clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(weights)
