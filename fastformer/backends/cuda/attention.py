"""Attention by csrc/cuda/attention.cu, in half precision. Signatures: backends/attention_options.py.

Kernels read and write rows 16 bytes at a time: what does not start there is copied first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_options import FEATURES as ALL_FEATURES
from ..attention_options import Gradients, Options, empty_like_input, empty_out
from ._call import empty, library, on_device, stream

DTYPES = frozenset({torch.bfloat16, torch.float16})
FEATURES = frozenset(ALL_FEATURES) - {"unaligned"}
__all__ = ["DTYPES", "FEATURES", "backward", "forward"]


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq) float32."""
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    out = empty_out(q, v)
    lse = empty(q, *q.shape[:3], dtype=torch.float32)
    with on_device(q):
        library().attention_forward((q, k, v, out, lse), options, stream(q))
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    needs: tuple[bool, bool] = (False, False),
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> Gradients:
    """Gradients of q, k and v, written into dq, dk, dv where given, and of the bias and the distance bias if needed."""
    q, k, v, out, dout = _aligned(q), _aligned(k), _aligned(v), _aligned(out), _aligned(dout)
    asked = (dq, dk, dv)
    dq, dk, dv = (_gradient_buffer(g, t) for g, t in zip(asked, (q, k, v), strict=True))
    dbias = ddistance = None
    if needs[0]:
        assert options.bias is not None
        dbias = torch.zeros(options.bias.shape, dtype=torch.float32, device=q.device)
    if needs[1]:
        assert options.distance_bias is not None
        ddistance = torch.empty_like(options.distance_bias)
    arguments = ((q, k, v, out, lse), options, (dout, dlse, dq, dk, dv, dbias, ddistance))
    with on_device(q):
        workspace = empty(q, library().attention_backward_workspace(*arguments), dtype=torch.uint8)
        library().attention_backward(*arguments, workspace, stream(q))
    for wanted, written in zip(asked, (dq, dk, dv), strict=True):
        if wanted is not None and wanted is not written:
            wanted.copy_(written)
    return Gradients(*(w if a is None else a for a, w in zip(asked, (dq, dk, dv), strict=True)), dbias, ddistance)


def _is_aligned(t: Tensor) -> bool:
    batch, head, position, _ = t.stride()
    return (batch | head | position) % 8 == 0 and t.data_ptr() % 16 == 0 and t.stride(3) == 1


def _aligned(t: Tensor) -> Tensor:
    """``t``, or a copy of it, with rows that start at multiples of 16 bytes."""
    if _is_aligned(t):
        return t
    copy = t.contiguous()
    return copy if _is_aligned(copy) else copy.clone(memory_format=torch.contiguous_format)


def _gradient_buffer(asked: Tensor | None, of: Tensor) -> Tensor:
    if asked is not None and _is_aligned(asked):
        return asked
    return empty_like_input(of)
