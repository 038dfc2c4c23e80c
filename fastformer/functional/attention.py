"""Exact attention without the score matrix: out = softmax(scale q k^T + mask) v (Vaswani et al. 2017, equation 1).

Blocks of keys stream past a block of queries while a running maximum and sum rescale the partial result (Dao et al.
2022, arXiv:2205.14135, algorithm 1), so memory is linear in the sequence. Forward saves one log-sum-exp per query;
backward recomputes the probabilities from it.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import registry
from . import _checks
from ._doors import needs_grad, operator, register, register_autograd, through_operator

MAX_HEAD_DIM = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention.

    Args:
        q: ``(B, Hq, Sq, D)``, D from 1 to 256; float32, bfloat16, float16 or (CPU) float64.
        k: ``(B, Hkv, Sk, D)``, Hq a multiple of Hkv: query head h reads key/value head h // (Hq / Hkv).
        v: ``(B, Hkv, Sk, Dv)``.
        causal: query i sees keys j <= i + Sk - Sq (aligned at the bottom right).
        scale: multiplies the scores; default 1 / sqrt(D).
        key_padding_mask: ``(B, Sk)`` bool, True = ignored, as in ``torch.nn.MultiheadAttention``.
        return_lse: also return the log-sum-exp of the scores, ``(B, Hq, Sq)`` in float32 (float64 for float64).

    Returns:
        ``(B, Hq, Sq, Dv)`` in q's dtype. A query that sees no key gives zeros (and lse = -inf). The memory layout is
        (B, Sq, Hq, Dv), so merging the heads afterwards costs nothing.

    Raises:
        TypeError, ValueError: arguments that do not fit together, naming the argument.
    """
    _check(q, k, v, key_padding_mask)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    if through_operator(q, k, v, key_padding_mask):
        out, lse = operator("attention", q, k, v, scale, causal, key_padding_mask)
    elif needs_grad(q, k, v):
        out, lse = _Attention.apply(q, k, v, scale, causal, key_padding_mask)
    else:
        out, lse = _forward(q, k, v, scale, causal, key_padding_mask)
    return (out, lse) if return_lse else out


def attention_qkvpacked(
    qkv: Tensor, *, causal: bool = False, scale: float | None = None, key_padding_mask: Tensor | None = None
) -> Tensor:
    """:func:`attention` on the output of one fused projection, with one fused gradient.

    Args:
        qkv: ``(B, S, 3, H, D)``.
        causal, scale, key_padding_mask: as in :func:`attention`.

    Returns:
        ``(B, S, H, D)``, contiguous.
    """
    _checks.tensor("qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv: shape {tuple(qkv.shape)} is not (B, S, 3, H, D)")
    batch, length, _, heads, head_dim = qkv.shape
    if heads == 0:
        raise ValueError("qkv: has no heads")
    _check_head_dim("qkv", head_dim)
    _check_padding(key_padding_mask, batch, length, "qkv", qkv)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    if through_operator(qkv, key_padding_mask):
        out = operator("attention", *_unpack(qkv), scale, causal, key_padding_mask)[0]
    elif needs_grad(qkv):
        return _AttentionPacked.apply(qkv, scale, causal, key_padding_mask)
    else:
        out = _forward(*_unpack(qkv), scale, causal, key_padding_mask)[0]
    return out.transpose(1, 2)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Same arguments and result as ``torch.nn.functional.scaled_dot_product_attention``.

    Runs the fused kernel for 4-D inputs without an explicit mask or dropout; what it does not cover yet runs torch's
    own function, with a warning once (an error under :func:`fastformer.strict`).
    """
    unfused = None
    if attn_mask is not None:
        unfused = "attn_mask"
    elif dropout_p > 0:
        unfused = "dropout"
    elif query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or query.shape[0] != key.shape[0]:
        unfused = "inputs that are not (B, H, S, D)"
    elif is_causal and query.shape[2] != key.shape[2]:
        unfused = "is_causal with Sq != Sk (aligned at the top left)"
    elif query.shape[3] > MAX_HEAD_DIM or value.shape[3] > MAX_HEAD_DIM:
        unfused = f"head_dim over {MAX_HEAD_DIM}"
    elif not (query.is_floating_point() and query.dtype == key.dtype == value.dtype):
        unfused = "mixed dtypes"
    elif not enable_gqa and query.shape[1] != key.shape[1]:
        unfused = "broadcast heads"
    if unfused is not None:
        registry.report_unfused("attention", unfused)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    out = attention(query, key, value, causal=is_causal, scale=scale)
    assert isinstance(out, Tensor)
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(name, t)
        if t.dim() != 4:
            raise ValueError(f"{name}: shape {tuple(t.shape)} is not (B, H, S, D)")
        _check_head_dim(name, t.shape[3])
    for name, t in (("k", k), ("v", v)):
        _checks.same_dtype(name, t, "q", q)
        _checks.same_device(name, t, "q", q)
        if t.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: batch {t.shape[0]} is not q's {q.shape[0]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: head_dim {k.shape[3]} is not q's {q.shape[3]}")
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(f"v: heads and length {tuple(v.shape[1:3])} are not k's {tuple(k.shape[1:3])}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: {k.shape[1]} heads do not divide q's {q.shape[1]}")
    _check_padding(key_padding_mask, k.shape[0], k.shape[2], "q", q)


def _check_head_dim(name: str, head_dim: int) -> None:
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: head_dim {head_dim} is not in [1, {MAX_HEAD_DIM}]")


def _check_padding(mask: Tensor | None, batch: int, keys: int, name: str, like: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask: expected a bool tensor, got {getattr(mask, 'dtype', None)}")
    if mask.shape != (batch, keys):
        raise ValueError(f"key_padding_mask: shape {tuple(mask.shape)} is not (B, Sk) = {(batch, keys)}")
    _checks.same_device("key_padding_mask", mask, name, like)


def _unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, S, 3, H, D) -> q, k, v (B, H, S, D)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def _select(q: Tensor, k: Tensor, causal: bool, key_padding_mask: Tensor | None) -> ModuleType:
    features: tuple[str, ...] = ("causal",) if causal else ()
    if key_padding_mask is not None:
        features += ("key_padding_mask",)
    if q.shape[1] != k.shape[1]:
        features += ("grouped_heads",)
    return registry.select("attention", q.device.type, q.dtype, features)


def _inner_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def _forward(q, k, v, scale, causal, key_padding_mask):
    kernels = _select(q, k, causal, key_padding_mask)
    return kernels.forward(
        _inner_contiguous(q), _inner_contiguous(k), _inner_contiguous(v), scale, causal, key_padding_mask
    )


def _backward(dout, dlse, q, k, v, out, lse, scale, causal, key_padding_mask, dq=None, dk=None, dv=None, kernels=None):
    kernels = kernels or _select(q, k, causal, key_padding_mask)
    return kernels.backward(
        _inner_contiguous(dout),
        None if dlse is None else dlse.contiguous(),
        _inner_contiguous(q),
        _inner_contiguous(k),
        _inner_contiguous(v),
        out,
        lse,
        scale,
        causal,
        key_padding_mask,
        dq,
        dk,
        dv,
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, causal, key_padding_mask):
        out, lse = _forward(q, k, v, scale, causal, key_padding_mask)
        ctx.save_for_backward(q, k, v, out, lse, key_padding_mask)
        ctx.scale, ctx.causal, ctx.kernels = scale, causal, _select(q, k, causal, key_padding_mask)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, mask = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        dq, dk, dv = _backward(dout, dlse, q, k, v, out, lse, ctx.scale, ctx.causal, mask, kernels=ctx.kernels)
        return dq, dk, dv, None, None, None


class _AttentionPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, scale, causal, key_padding_mask):
        q, k, v = _unpack(qkv)
        out, lse = _forward(q, k, v, scale, causal, key_padding_mask)
        ctx.save_for_backward(qkv, out, lse, key_padding_mask)
        ctx.scale, ctx.causal, ctx.kernels = scale, causal, _select(q, k, causal, key_padding_mask)
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        qkv, out, lse, mask = ctx.saved_tensors
        dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        grads = _unpack(dqkv)
        _backward(dout.transpose(1, 2), None, *_unpack(qkv), out, lse, ctx.scale, ctx.causal, mask, *grads, ctx.kernels)
        return dqkv, None, None, None


# ---- the registered operator -----------------------------------------------------------------------------------------


def _fake(q, k, v, scale, causal, key_padding_mask):
    b, h, sq, _ = q.shape
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(b, sq, h, v.shape[3]).transpose(1, 2), q.new_empty((b, h, sq), dtype=acc)


def _contiguous_grads(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]


def _operator_backward(dout, dlse, q, k, v, out, lse, scale, causal, key_padding_mask):
    return _backward(dout, dlse, q, k, v, out, lse, scale, causal, key_padding_mask, *_contiguous_grads(q, k, v))


register(
    "attention(Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor? key_padding_mask) -> (Tensor, Tensor)",
    _forward,
    _fake,
)
register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale,"
    " bool causal, Tensor? key_padding_mask) -> (Tensor, Tensor, Tensor)",
    _operator_backward,
    lambda dout, dlse, q, k, v, *_: tuple(_contiguous_grads(q, k, v)),
)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.causal, mask = inputs
    ctx.save_for_backward(q, k, v, *output, mask)


def _autograd(ctx, dout, dlse):
    q, k, v, out, lse, mask = ctx.saved_tensors
    dq, dk, dv = operator("attention_backward", dout, dlse, q, k, v, out, lse, ctx.scale, ctx.causal, mask)
    return dq, dk, dv, None, None, None


register_autograd("attention", _autograd, _setup_context)
