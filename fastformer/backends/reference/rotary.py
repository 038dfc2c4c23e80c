"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in plain PyTorch; the formula is in fastformer.h."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
FEATURES: frozenset[str] = frozenset()


def forward(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offset: int,
    batch_offset: int,
    interleaved: bool,
    inverse: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    """q, k (B, H, S, D) or None, cos, sin (positions, rotary_dim / 2), position_ids (B, S) int64 or None: the rotated.

    Without ids, position s of sequence b has row offset + b * batch_offset + s. With ``inverse`` rotates back, which is
    the gradient. Raises ValueError for a position outside the tables on the CPU; elsewhere its heads become NaN.
    """
    batch, seqlen, positions = q.shape[0], q.shape[2], len(cos)
    if position_ids is None:
        start = offset + batch_offset * torch.arange(batch, device=q.device)
        position_ids = start[:, None] + torch.arange(seqlen, device=q.device)
    inside = (position_ids >= 0) & (position_ids < positions)
    if not q.is_cuda and not inside.all():
        b, s = (~inside).nonzero()[0].tolist()
        raise ValueError(f"position_ids: {int(position_ids[b, s])} at ({b}, {s}) is not in [0, {positions})")
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = position_ids.where(inside, 0)
    c = cos[rows].to(acc).where(inside[..., None], torch.nan)[:, None]
    s_ = sin[rows].to(acc)[:, None] * (-1 if inverse else 1)
    half = cos.shape[1]
    outputs: list[Tensor | None] = []
    for x in (q, k):
        if x is None:
            outputs.append(None)
            continue
        first, second = (
            (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
        )
        x0, x1 = x[..., first].to(acc), x[..., second].to(acc)
        out = x if inplace else x.clone()
        out[..., first], out[..., second] = (x0 * c - x1 * s_).to(x.dtype), (x1 * c + x0 * s_).to(x.dtype)
        outputs.append(out)
    assert outputs[0] is not None
    return outputs[0], outputs[1]
