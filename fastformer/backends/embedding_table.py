"""What the backends of embedding look rows up in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Table(NamedTuple):
    """One table: row r of the output takes its row ``ids[r % period]``, or ``offset + r % period`` without ids.

    The C++ bindings read the first five fields in this order.
    """

    weight: Tensor
    """(rows, cols), rows contiguous; a backward pass without a norm reads nothing but its shape."""
    ids: Tensor | None
    """int64, contiguous, of any shape with ``period`` elements."""
    period: int
    offset: int
    padding_idx: int
    """The row that gets no gradient, -1 for none."""
    name: str
    """What the public function calls the ids, for errors."""

    def indices(self) -> Tensor:
        """The (period) indices as a tensor."""
        if self.ids is not None:
            return self.ids.view(-1)
        return torch.arange(self.offset, self.offset + self.period, device=self.weight.device)
