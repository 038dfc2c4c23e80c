"""The angles of rotary position embeddings, and what stretches them over longer texts than a model was trained on.

The keys of ``scaling`` are those of ``rope_scaling`` in transformers' configurations:

    linear        all frequencies divided by ``factor`` (Chen et al. 2023, arXiv:2306.15595)
    dynamic       a base that grows with the length beyond ``max_position_embeddings`` ("NTK-aware", bloc97 2023)
    yarn          high frequencies kept, low ones divided, a ramp between them; cos and sin scaled by an attention
                  factor (Peng et al. 2023, arXiv:2309.00071, section 3)
    llama3        likewise, with a ramp over wavelengths (Llama 3.1)
    longrope      each frequency divided by a factor of its own, from one list for texts up to the length trained on
                  and from another beyond (Ding et al. 2024, arXiv:2402.13753)
    proportional  only the first ``partial_rotary_factor`` of the pairs turn, the others stand still

The float32 frequencies are transformers' to the last bit: at position 100,000 a frequency that is rounded otherwise is
another angle in the third decimal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
}
_OPTIONAL = {
    "yarn": (
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "attention_factor"),
    "proportional": ("factor",),
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
    unknown = unknown_keys(scaling)
    if unknown:
        raise ValueError(f"scaling: {kind!r} has no {', '.join(unknown)}")
    return kind


def unknown_keys(scaling: Mapping[str, Any]) -> list[str]:
    """Keys that the type of ``scaling``, one of ``REQUIRED``, does not have."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    known = (*REQUIRED[kind], *_OPTIONAL.get(kind, ()), *_EVERYWHERE)
    return [key for key in scaling if key not in known]


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
        length: of the text, for "dynamic" and "longrope".
        dtype: float32, in which transformers computes, or float64.

    Returns:
        ``(dim / 2)`` inverse frequencies on the CPU, and a float.
    """
    kind = scaling_type(scaling)
    options: Mapping[str, Any] = scaling or {}
    trained = options.get("original_max_position_embeddings") or max_position_embeddings
    grown = max_position_embeddings / trained
    factor = float(options.get("factor") or (grown if kind in ("yarn", "longrope") else 1.0))
    powers: Callable[[int], Tensor] = lambda turning: (  # noqa: E731
        base ** (torch.arange(0, turning, 2).to(dtype) / dim)  # their inverses are the unscaled frequencies
    )
    if kind == "dynamic" and length > max_position_embeddings:
        stretch = factor * torch.tensor(length, dtype=dtype) / max_position_embeddings - (factor - 1)
        return 1.0 / (base * stretch ** (dim / (dim - 2))) ** (torch.arange(0, dim, 2).to(dtype) / dim), 1.0
    if kind == "linear":
        return 1.0 / powers(dim) / factor, 1.0
    if kind == "proportional":
        turning = int(options.get("partial_rotary_factor", 1.0) * dim // 2)
        still = torch.zeros(dim // 2 - turning, dtype=dtype)
        return torch.cat((1.0 / powers(2 * turning), still)) / factor, 1.0
    if kind == "longrope":
        divisors = torch.tensor(options["long_factor" if length > trained else "short_factor"], dtype=dtype)
        return 1.0 / (divisors * powers(dim)), _attention_factor(options, factor, trained)
    if kind == "llama3":
        low, high = options["low_freq_factor"], options["high_freq_factor"]
        frequencies = 1.0 / powers(dim)
        turns = trained / (2 * math.pi / frequencies)  # within the length trained on
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequencies / factor + kept * frequencies, 1.0
    if kind == "yarn":
        # The dimension that turns so many times within the length trained on.
        at = lambda turns: dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))  # noqa: E731
        first, last = at(options.get("beta_fast") or 32), at(options.get("beta_slow") or 1)
        if options.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        ramp = (torch.arange(dim // 2).to(dtype) - first) / ((last - first) or 0.001)
        kept = 1 - ramp.clamp(0, 1)
        frequencies = 1.0 / (factor * powers(dim)) * (1 - kept) + 1.0 / powers(dim) * kept
        return frequencies, _attention_factor(options, factor, None)
    return 1.0 / powers(dim), 1.0


def _attention_factor(options: Mapping[str, Any], factor: float, trained: int | None) -> float:
    """Of "longrope" where the length trained on is given, else of "yarn"."""
    given = options.get("attention_factor")
    if given is not None:
        return float(given)
    if factor <= 1:
        return 1.0
    if trained is not None:
        return math.sqrt(1 + math.log(factor) / math.log(trained))
    grown = lambda m: 0.1 * m * math.log(factor) + 1  # noqa: E731
    if options.get("mscale") and options.get("mscale_all_dim"):
        return grown(options["mscale"]) / grown(options["mscale_all_dim"])
    return grown(1.0)
