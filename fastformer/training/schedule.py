"""Learning rate over a run: a linear warm-up, then one of five shapes.

    constant       1
    cosine         final + (1 - final) (1 + cos(pi done)) / 2     SGDR, arXiv:1608.03983, eq. 5, without restarts
    linear         final + (1 - final) (1 - done)
    inverse_sqrt   sqrt(warmup / step)                            Attention Is All You Need, section 5.3
    wsd            1 until the last part of the run, there        MiniCPM, arXiv:2404.06395, section 4: warm-up,
                   final^(share of that part), or linear to 0     stable, decay

``done`` is the share of the steps after the warm-up. The factor is a closed form of the position in the run, so there
is no state to save and none to resume wrongly.
"""

from __future__ import annotations

import math

KINDS = ("cosine", "linear", "constant", "inverse_sqrt", "wsd")


def learning_rate_factor(
    kind: str,
    position: float,
    total: float,
    *,
    warmup: float = 0.0,
    final_ratio: float = 0.1,
    decay_fraction: float = 0.1,
) -> float:
    """Share of the peak learning rate at ``position``.

    Args:
        kind: the shape after the warm-up: ``"cosine"``, ``"linear"``, ``"constant"``, ``"inverse_sqrt"`` or ``"wsd"``.
        position: steps done before this one, 0 … total; may be fractional, and is held at ``total`` beyond it, but for
            ``"inverse_sqrt"``, which has no end.
        total: steps in the whole run, warm-up included.
        warmup: steps over which the rate rises linearly; step 0 already gets 1 / (warmup + 1), never nothing.
        final_ratio: share of the peak at ``total``, for the shapes that decay to an end.
        decay_fraction: share of the run at its end over which ``"wsd"`` decays.

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
    if not 0.0 < decay_fraction <= 1.0:
        raise ValueError(f"schedule.decay_fraction: got {decay_fraction}, expected in (0, 1]")
    if position < warmup:
        return (position + 1.0) / (warmup + 1.0)
    if kind == "constant":
        return 1.0
    if kind == "inverse_sqrt":
        return math.sqrt((warmup + 1.0) / (position + 1.0))
    # Where the decay begins; what lies before it is the peak.
    start = max(warmup, total * (1.0 - decay_fraction)) if kind == "wsd" else warmup
    done = min(1.0, max(0.0, position - start) / max(total - start, 1e-12))
    if kind == "wsd" and final_ratio > 0.0:
        return final_ratio**done
    remaining = 0.5 * (1.0 + math.cos(math.pi * done)) if kind == "cosine" else 1.0 - done
    return final_ratio + (1.0 - final_ratio) * remaining
