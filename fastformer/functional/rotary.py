"""Rotary position embedding (Su, Lu, Pan, Murtadha, Wen, Liu 2021, arXiv:2104.09864, section 3.2).

Pairs of elements of a query or key are turned by an angle that grows with its position, so that q · k depends on the
distance of the two alone. One pass over q and k: PyTorch's ``q * cos + rotate_half(q) * sin`` makes four of q's size in
between. The gradient is the rotation backwards, so nothing but the table is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import registry
from ..backends.layout import dense_like
from . import _checks
from ._doors import needs_grad, operator, register, register_autograd, through_operator


def rotary_embedding(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    position_offset: int | Tensor = 0,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotates queries and keys by their positions.

    With R = 2 * cos.shape[-1] rotated dimensions, element i is paired with element i + R / 2 (Llama, GPT-NeoX), or 2 i
    with 2 i + 1 if ``interleaved`` (GPT-J); elements from R on stay as they are. For flash_attn's ``(B, S, H, D)`` pass
    ``q.transpose(1, 2)``: any strides do, and the results have those of their inputs.

    Args:
        q: ``(B, Hq, S, D)`` or ``(Hq, S, D)``; float32, bfloat16, float16 or (CPU) float64.
        k: ``(B, Hkv, S, D)`` or ``(Hkv, S, D)`` of the same dtype, or None.
        cos, sin: ``(positions, R / 2)``, a row per position, in q's dtype, or float32 beside half precision; or
            ``(B, S, R / 2)`` or ``(1, S, R / 2)``, a row per token. They get no gradient. (transformers repeats each
            angle: pass ``cos[..., : R // 2]``, or ``[..., ::2]`` where it repeats neighbours.)
        position_ids: rows of cos and sin, int64 or int32, broadcastable to ``(B, S)``.
        position_offset: the position of the first token where there are no ``position_ids``; ``(B)`` int64 or int32 for
            one per sequence. The length of a key/value cache.
        interleaved: which elements form a pair; see above.
        inplace: write into q and k and return them.

    Returns:
        ``(q, k)``, rotated; k is None if it was.

    Raises:
        TypeError, ValueError: arguments that do not fit, naming the argument.
        IndexError: a position outside the table (on a GPU: NaN in its heads instead, to avoid waiting).
    """
    _check(q, k, cos, sin, position_ids, position_offset)
    if inplace:
        _check_writable("q", q)
        if k is not None:
            _check_writable("k", k)
    batched = q.dim() == 4
    q4 = q if batched else q.unsqueeze(0)
    k4 = k if batched or k is None else k.unsqueeze(0)
    batch, seqlen, offset, batch_offset = q4.shape[0], q4.shape[2], 0, 0
    ids = None
    if cos.dim() == 3:
        batch_offset = seqlen if cos.shape[0] > 1 else 0
        cos, sin = cos.reshape(-1, cos.shape[2]), sin.reshape(-1, sin.shape[2])
    elif position_ids is not None:
        ids = position_ids
    elif isinstance(position_offset, Tensor):
        ids = position_offset[:, None] + torch.arange(seqlen, device=q.device)
    else:
        offset = position_offset
        if offset + seqlen > cos.shape[0] and batch and seqlen:
            raise IndexError(f"position_ids: {offset + seqlen} positions, but cos and sin have {cos.shape[0]} rows")
    if ids is not None:
        ids = ids.to(torch.int64)
    cos, sin = (t if t.stride(1) == 1 else t.contiguous() for t in (cos.detach(), sin.detach()))
    tables = (cos, sin, ids, offset, batch_offset, interleaved)
    if through_operator(q4, k4, cos, sin, ids):
        out, k_out = operator("rotary", q4, k4, *tables, False)
        if inplace:
            q4.copy_(out)
            if k4 is not None:
                k4.copy_(k_out)
        elif k4 is None:
            k_out = None
    elif needs_grad(q4, k4):
        out, k_out = _recorded(q4, k4, tables, False, inplace)
    else:
        out, k_out = _rotate(q4, k4, tables, False, inplace)
    if inplace:
        return q, k
    return (out, k_out) if batched else (out.squeeze(0), None if k_out is None else k_out.squeeze(0))


def _check(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    position_offset: int | Tensor,
) -> None:
    _checks.tensor("q", q)
    if q.dim() not in (3, 4):
        raise ValueError(f"q: expected (B, H, S, D) or (H, S, D), got shape {tuple(q.shape)}")
    batch, (_, seqlen, head_dim) = q.shape[0] if q.dim() == 4 else 1, q.shape[-3:]
    if k is not None:
        _checks.tensor("k", k)
        _checks.same_dtype("k", k, "q", q)
        _checks.same_device("k", k, "q", q)
        if k.dim() != q.dim() or k.shape[-2:] != q.shape[-2:] or k.shape[:-3] != q.shape[:-3]:
            raise ValueError(f"k: shape {tuple(k.shape)} is not q's {tuple(q.shape)} but for the heads")
    for name, table in (("cos", cos), ("sin", sin)):
        _checks.tensor(name, table)
        _checks.parameter(name, table, cos.shape, "q", q)
        if table.requires_grad:
            raise ValueError(f"{name}: requires a gradient, and gets none here")
    if cos.dim() not in (2, 3) or (cos.dim() == 3 and (cos.shape[0] not in (1, batch) or cos.shape[1] != seqlen)):
        raise ValueError(
            f"cos: shape {tuple(cos.shape)} is neither (positions, R / 2) nor ({batch} or 1, {seqlen}, R / 2)"
        )
    if not 0 < 2 * cos.shape[-1] <= head_dim:
        raise ValueError(f"cos: {cos.shape[-1]} angles turn {2 * cos.shape[-1]} elements, of a head_dim of {head_dim}")
    per_sequence = isinstance(position_offset, Tensor)
    if not per_sequence and position_offset < 0:
        raise ValueError(f"position_offset: {position_offset} is negative")
    if per_sequence or position_offset != 0:
        if position_ids is not None or cos.dim() == 3:
            raise ValueError("position_offset: given beside position_ids, or beside a row of cos for every token")
    if position_ids is not None and cos.dim() == 3:
        raise ValueError("position_ids: given beside a row of cos for every token")
    for name, ids, shape in (
        ("position_ids", position_ids, (batch, seqlen)),
        ("position_offset", position_offset, (batch,)),
    ):
        if ids is None or (name == "position_offset" and not per_sequence):
            continue
        if not isinstance(ids, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(ids).__name__}")
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: dtype {ids.dtype} is not int64 or int32")
        _checks.same_device(name, ids, "q", q)
        padded = (1,) * (len(shape) - ids.dim()) + tuple(ids.shape)
        exact = name == "position_offset"
        if len(padded) != len(shape) or any(n != w and (exact or n != 1) for n, w in zip(padded, shape, strict=True)):
            raise ValueError(f"{name}: shape {tuple(ids.shape)} is not {'' if exact else 'broadcastable to '}{shape}")


def _check_writable(name: str, x: Tensor) -> None:
    if x.stride(-1) != 1 or any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(f"{name}: strides {x.stride()} cannot be written in place; the last has to be 1 and none 0")


def _rotate(q, k, tables, inverse, inplace):
    kernels = registry.select("rotary", q.device.type, q.dtype)
    if not inplace:
        q, k = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin, ids, *options = tables
    if ids is not None:
        ids = ids.expand(q.shape[0], q.shape[2])
    try:
        return kernels.forward(q, k, cos, sin, ids, *options, inverse, inplace)
    except ValueError as error:
        raise (IndexError(str(error)) if str(error).startswith("position_ids") else error) from None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, tables, inverse, inplace):
        ctx.save_for_backward(*tables[:3])
        ctx.options, ctx.inverse = tables[3:], inverse
        ctx.set_materialize_grads(False)
        if inplace:
            ctx.mark_dirty(q)
        out, k_out = _rotate(q, k, tables, inverse, inplace)
        return out if k is None else (out, k_out)

    @staticmethod
    def backward(ctx, dq, dk=None):
        dq, dk = _recorded(dq, dk, (*ctx.saved_tensors, *ctx.options), not ctx.inverse, False)
        return dq, dk, None, None, None


def _recorded(q, k, tables, inverse, inplace):
    """q and k rotated, either of them None, recorded by autograd where it has to be."""
    if q is None or k is None or inplace:  # autograd takes one output of a function that writes into views
        rotate = lambda x: None if x is None else _recorded_one(x, tables, inverse, inplace)  # noqa: E731
        return rotate(q), rotate(k)
    return _Rotary.apply(q, k, tables, inverse, False) if needs_grad(q, k) else _rotate(q, k, tables, inverse, False)


def _recorded_one(x, tables, inverse, inplace):
    if needs_grad(x):
        return _Rotary.apply(x, None, tables, inverse, inplace)
    return _rotate(x, None, tables, inverse, inplace)[0]


# ---- the registered operator -----------------------------------------------------------------------------------------


def _operator(q, k, cos, sin, ids, offset, batch_offset, interleaved, inverse):
    out, k_out = _rotate(q, k, (cos, sin, ids, offset, batch_offset, interleaved), inverse, False)
    return out, q.new_empty(0) if k_out is None else k_out


def _like(x: Tensor) -> Tensor:
    return dense_like(x if x.stride(-1) == 1 else x.contiguous())


register(
    "rotary(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? position_ids, SymInt offset, SymInt batch_offset,"
    " bool interleaved, bool inverse) -> (Tensor, Tensor)",
    _operator,
    lambda q, k, *_: (_like(q), q.new_empty(0) if k is None else _like(k)),
)


def _setup_context(ctx, inputs, output):
    _, k, cos, sin, ids, *ctx.options, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, ids)
    ctx.has_k = k is not None


def _autograd(ctx, dq, dk):
    cos, sin, ids = ctx.saved_tensors
    dq, dk = operator("rotary", dq, dk if ctx.has_k else None, cos, sin, ids, *ctx.options, not ctx.inverse)
    return dq, dk if ctx.has_k else None, None, None, None, None, None, None, None


register_autograd("rotary", _autograd, _setup_context)
