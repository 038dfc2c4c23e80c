"""A model's outputs on a sample batch before and after its layers were swapped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# How far apart the outputs of one model may be, relative to their largest element, if only roundings differ.
TOLERANCE = {
    torch.float64: 1e-5,  # transformers computes its RMS norms in float32 whatever the model's dtype
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


@torch.no_grad()
def outputs(model: torch.nn.Module, batch: Any) -> Any:
    """What the model returns in eval mode; its modes and the random numbers are as before."""
    training = [module for module in model.modules() if module.training]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            if isinstance(batch, Mapping):
                return model(**batch)
            return model(*batch) if isinstance(batch, list | tuple) else model(batch)
    finally:
        for module in training:
            module.training = True


def difference(before: Any, after: Any, tolerance: float | None) -> str | None:
    """How two outputs differ, None if they do not."""
    first, second = dict(_tensors(before, "output", set())), dict(_tensors(after, "output", set()))
    if first.keys() != second.keys():
        return f"other tensors: {', '.join(sorted(first.keys() ^ second.keys()))}"
    for name, a in first.items():
        b = second[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{name}: {tuple(b.shape)} {b.dtype} instead of {tuple(a.shape)} {a.dtype}"
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"{name}: other {a.dtype} values"
            continue
        # Rows that are masked entirely are NaN in PyTorch and zeros here.
        kept = a.isfinite()
        a, b = a[kept].double(), b[kept].double()
        if a.numel() == 0:
            continue
        allowed = TOLERANCE.get(first[name].dtype, 1e-1) if tolerance is None else tolerance
        error, scale = (a - b).abs().max().item(), a.abs().max().item()
        if not error <= allowed * max(scale, 1e-6):
            return f"{name}: off by {error:.3g} of {scale:.3g}, more than the tolerance {allowed:g}"
    return None


def _tensors(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested mappings, sequences and objects (key/value caches), by their path."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}", seen)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}[{i}]", seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module) and id(value) not in seen:
        seen.add(id(value))
        yield from _tensors(vars(value), name, seen)
