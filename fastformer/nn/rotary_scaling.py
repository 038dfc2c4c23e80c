"""The angles of rotary position embeddings, and what stretches them over longer texts than a model was trained on.

The keys of ``scaling`` are those of ``rope_scaling`` in transformers' configurations:

    linear    all frequencies divided by ``factor`` (Chen et al. 2023, arXiv:2306.15595)
    dynamic   a base that grows with the length beyond ``max_position_embeddings`` ("NTK-aware", bloc97 2023)
    yarn      high frequencies kept, low ones divided, a ramp between them; cos and sin scaled by an attention factor
              (Peng et al. 2023, arXiv:2309.00071, section 3)
    llama3    likewise, with a ramp over wavelengths (Llama 3.1)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_OPTIONAL = {
    "yarn": (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
_EVERYWHERE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


def scaling_type(scaling: Mapping[str, Any] | None) -> str:
    """The checked type of a ``scaling``, "default" for none.

    Raises:
        ValueError: an unknown type, or a key that is missing or that the type does not have.
    """
    if scaling is None:
        return "default"
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in REQUIRED:
        raise ValueError(f"scaling: rope_type {kind!r} is not one of {', '.join(map(repr, REQUIRED))}")
    missing = [key for key in REQUIRED[kind] if scaling.get(key) is None]
    if missing:
        raise ValueError(f"scaling: {kind!r} needs {', '.join(missing)}")
    known = (*REQUIRED[kind], *_OPTIONAL.get(kind, ()), *_EVERYWHERE)
    unknown = [key for key in scaling if key not in known]
    if unknown:
        raise ValueError(f"scaling: {kind!r} has no {', '.join(unknown)}")
    return kind


def inverse_frequencies(
    dim: int,
    base: float,
    scaling: Mapping[str, Any] | None,
    max_position_embeddings: int,
    length: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, float]:
    """Angles per position, and the factor of cos and sin.

    Args:
        dim: rotated dimensions.
        base: theta; pair i turns by ``base^(-2 i / dim)`` per position before any scaling.
        scaling: see the top of this file.
        max_position_embeddings: the length the model was trained on.
        length: of the text, for "dynamic".
        dtype: float32, in which transformers computes, or float64.

    Returns:
        ``(dim / 2)`` inverse frequencies on the CPU, and a float.
    """
    kind = scaling_type(scaling)
    options: Mapping[str, Any] = scaling or {}
    factor = float(options.get("factor") or 1.0)
    if kind == "dynamic":
        length = max(length, max_position_embeddings)
        base *= (factor * length / max_position_embeddings - (factor - 1)) ** (dim / (dim - 2))
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2).to(dtype) / dim)
    trained = options.get("original_max_position_embeddings") or max_position_embeddings
    if kind == "linear":
        return frequencies / factor, 1.0
    if kind == "llama3":
        low, high = options["low_freq_factor"], options["high_freq_factor"]
        turns = trained / (2 * math.pi / frequencies)  # within the length trained on
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / factor), 1.0
    if kind == "yarn":
        # The dimension that turns so many times within the length trained on.
        at = lambda turns: dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))  # noqa: E731
        first, last = at(options.get("beta_fast") or 32), at(options.get("beta_slow") or 1)
        if options.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        ramp = (torch.arange(dim // 2).to(dtype) - first) / ((last - first) or 0.001)
        kept = 1 - ramp.clamp(0, 1)
        return frequencies * (kept + (1 - kept) / factor), _attention_factor(options, factor)
    return frequencies, 1.0


def _attention_factor(options: Mapping[str, Any], factor: float) -> float:
    given = options.get("attention_factor")
    if given is not None:
        return float(given)
    grown = lambda m: 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0  # noqa: E731
    if options.get("mscale") and options.get("mscale_all_dim"):
        return grown(options["mscale"]) / grown(options["mscale_all_dim"])
    return grown(1.0)
