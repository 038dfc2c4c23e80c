"""Drawing the next token from logits: temperature, then the k largest, then the smallest set of probability top_p.

Top-p is nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751). With top_k only the k candidates are ever sorted,
exponentiated and drawn from, so the cost after one top-k pass does not depend on the vocabulary. The draw is an
exponential race, argmax p_i / e_i with e_i ~ Exp(1): the winner is i with probability p_i / sum(p).
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError, naming the argument, unless temperature > 0, top_k >= 0 and 0 < top_p <= 1."""
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} is not positive; for the likeliest token use do_sample=False")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k: {top_k} is negative; 0 or None keeps every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p} is not in (0, 1]")


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row.

    Args:
        logits: ``(B, V)``, any floating dtype.
        temperature: divides the logits; > 0.
        top_k: keep the k largest logits; 0 or None keeps all.
        top_p: of those, keep the largest whose probabilities add up to top_p, at least one; 1 or None keeps all.
        generator: source of randomness, on the device of ``logits``; default torch's global one.

    Returns:
        ``(B)`` int64.

    Raises:
        ValueError: an argument out of range; on the CPU also a row without a finite probability (NaN, or all -inf).
    """
    check_sampling(temperature, top_k, top_p)
    if logits.dim() != 2:
        raise ValueError(f"logits: shape {tuple(logits.shape)} is not (B, V)")
    nucleus = top_p is not None and top_p < 1
    candidates = None
    if top_k and top_k < logits.shape[1]:
        logits, candidates = logits.topk(top_k, sorted=nucleus)
    elif nucleus:
        logits, candidates = logits.sort(descending=True)
    logits = logits.float()
    probability = torch.softmax(logits if temperature == 1 else logits / temperature, 1)
    if probability.device.type == "cpu" and not torch.isfinite(probability.sum()):
        raise ValueError("logits: a row has no finite probability (NaN, or every logit is -inf)")
    if nucleus:
        before = probability.cumsum(1) - probability  # the mass of all likelier tokens
        probability = probability.masked_fill(before >= top_p, 0.0)
    race = torch.empty_like(probability).exponential_(generator=generator)
    choice = (probability / race).argmax(1, keepdim=True)
    return (choice if candidates is None else candidates.gather(1, choice))[:, 0]
