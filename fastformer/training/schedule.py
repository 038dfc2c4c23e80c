"""Learning rate over a run: a linear warm-up, then constant, linear or cosine decay (SGDR, arXiv:1608.03983, eq. 5,
without restarts) down to a share of the peak.

The factor is a closed form of the position in the run, so there is no state to save and none to resume wrongly.
"""

from __future__ import annotations

import math

KINDS = ("cosine", "linear", "constant")


def learning_rate_factor(
    kind: str, position: float, total: float, *, warmup: float = 0.0, final_ratio: float = 0.1
) -> float:
    """Share of the peak learning rate at ``position``.

    Args:
        kind: ``"cosine"``, ``"linear"`` or ``"constant"``: the shape after the warm-up.
        position: steps done before this one, 0 … total; may be fractional, and is held at ``total`` beyond it.
        total: steps in the whole run, warm-up included.
        warmup: steps over which the rate rises linearly; step 0 already gets 1 / (warmup + 1), never nothing.
        final_ratio: share of the peak at ``total``, for the shapes that decay.

    Returns:
        A number in (0, 1]; 0 only where ``final_ratio`` is 0 at the very end.

    Raises:
        ValueError: an unknown ``kind``, or a length or ratio out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"schedule.kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if total <= 0 or warmup < 0 or position < 0 or not 0.0 <= final_ratio <= 1.0:
        raise ValueError(
            f"expected total > 0, warmup >= 0, position >= 0 and 0 <= final_ratio <= 1; got total = {total}, "
            f"warmup = {warmup}, position = {position}, final_ratio = {final_ratio}"
        )
    if position < warmup:
        return (position + 1.0) / (warmup + 1.0)
    if kind == "constant":
        return 1.0
    done = min(1.0, (position - warmup) / max(total - warmup, 1e-12))
    remaining = 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return final_ratio + (1.0 - final_ratio) * remaining
