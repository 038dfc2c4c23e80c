"""Options of an attention call as the extension modules take them (csrc/python/attention_args.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_options import Options, acc_dtype, sequences

# The values of ff_dtype in csrc/include/fastformer.h.
DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_NO_STRIDES = (0, 0, 0, 0)


def sizes(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[int, ...]:
    """(B, Hq, Hkv, Sq, Sk, D, Dv) of ff_attention_args."""
    batch, seqlen_q, seqlen_k = sequences(options, q, k)
    return batch, q.shape[1], k.shape[1], seqlen_q, seqlen_k, q.shape[3], v.shape[3]


def extras(
    q: Tensor, k: Tensor, options: Options, dbias: Tensor | None = None, ddistance_bias: Tensor | None = None
) -> tuple | None:
    """What a call has beside q, k, v, scale and causal; None if that is nothing.

    The tuple holds addresses: the tensors of ``options`` have to outlive the call, and are not copied.
    """
    if _plain(options):
        return None
    _, seqlen_q, seqlen_k = sequences(options, q, k)
    full = (q.shape[0], q.shape[1], seqlen_q, seqlen_k)
    padding, mask, bias = options.key_padding_mask, options.mask, options.bias
    distance, slopes, cu_q, cu_k = (
        options.distance_bias, options.alibi_slopes, options.cu_seqlens_q, options.cu_seqlens_k,
    )  # fmt: skip
    acc = acc_dtype(q.dtype)
    if bias is not None and bias.dtype not in (q.dtype, acc):
        raise TypeError(f"bias: dtype {bias.dtype} is neither {q.dtype} nor {acc}")
    return (
        _pointer(padding),
        0 if padding is None else padding.stride(0),
        int(options.top_left),
        options.window_left,
        options.window_right,
        options.softcap,
        options.dropout_p,
        options.seed,
        _pointer(mask),
        _strides(mask, full),
        _pointer(bias),
        0 if bias is None else DTYPE[bias.dtype],
        _strides(bias, full),
        _pointer(distance),
        0 if distance is None else distance.shape[1] // 2,
        _pointer(slopes),
        0 if slopes is None or len(slopes) == 1 else slopes.stride(0),
        _pointer(cu_q),
        _pointer(cu_k),
        q.shape[2],
        k.shape[2],
        _pointer(dbias),
        _strides(dbias, full),
        _pointer(ddistance_bias),
    )


def _plain(o: Options) -> bool:
    return (
        o.key_padding_mask is None
        and o.mask is None
        and o.bias is None
        and o.distance_bias is None
        and o.alibi_slopes is None
        and o.cu_seqlens_q is None
        and not (o.top_left or o.softcap or o.dropout_p)
        and o.window_left < 0
        and o.window_right < 0
    )


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _strides(t: Tensor | None, full: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of ``t`` broadcast to ``full``: 0 where it has one element and the other more."""
    if t is None:
        return _NO_STRIDES
    return (*(0 if n == 1 else s for n, s in zip(t.shape[:3], t.stride())), 1)
