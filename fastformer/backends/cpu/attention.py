"""Attention on the CPU (csrc/cpu/attention.cpp, attention_backward.cpp). Signatures: backends/attention_options.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ..attention_call import extras, sizes
from ..attention_options import FEATURES as ALL_FEATURES
from ..attention_options import Gradients, Options, empty_like_input, empty_out
from ._call import DTYPE, DTYPES, acc_dtype, pointer

FEATURES = frozenset(ALL_FEATURES)
__all__ = ["DTYPES", "FEATURES", "backward", "forward", "plain"]


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq)."""
    common = (DTYPE[q.dtype], sizes(q, k, v, options), options.scale, options.causal)
    more = extras(q, k, options)
    out = empty_out(q, v)
    lse = torch.empty(q.shape[:3], dtype=acc_dtype(q.dtype))
    _C.attention_forward(
        *common,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        q.stride(),
        k.stride(),
        v.stride(),
        out.stride(),
        more,
    )
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
    dq = empty_like_input(q) if dq is None else dq
    dk = empty_like_input(k) if dk is None else dk
    dv = empty_like_input(v) if dv is None else dv
    dbias = ddistance = None
    if needs[0]:
        assert options.bias is not None
        dbias = torch.zeros(options.bias.shape, dtype=acc_dtype(q.dtype))
    if needs[1]:
        assert options.distance_bias is not None
        ddistance = torch.zeros_like(options.distance_bias)
    common = (DTYPE[q.dtype], sizes(q, k, v, options), options.scale, options.causal)
    more = extras(q, k, options, dbias, ddistance)
    _C.attention_backward(
        *common,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        q.stride(),
        k.stride(),
        v.stride(),
        out.stride(),
        dout.data_ptr(),
        pointer(dlse),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        dout.stride(),
        dq.stride(),
        dk.stride(),
        dv.stride(),
        more,
    )
    return Gradients(dq, dk, dv, dbias, ddistance)


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor | None:
    """``forward``'s output where there is nothing beside q, k and v; None if anything about them is unusual or wrong.

    For calls so small that the Python of the general way would take longer than the kernel.
    """
    if not _EXCHANGE or q.dim() != 4 or v.dim() != 4:
        return None
    b, h, s, _ = q.shape
    out = torch.empty((b, s, h, v.shape[3]), dtype=q.dtype).transpose(1, 2)
    return out if _C.attention_plain(q, k, v, out, scale, causal) else None


# Whether torch (2.10 and newer) lets C++ look at its tensors without its headers.
_EXCHANGE = hasattr(Tensor, "__dlpack_c_exchange_api__") and _C.use_exchange(Tensor.__dlpack_c_exchange_api__)
