"""How every attention function calls a backend: eager with one thin autograd function, or the registered operator.

The public functions are in attention.py, attention_varlen.py and scaled_dot_product_attention.py; they check their
arguments and put them into :class:`Options` (backends/attention_options.py).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..backends import registry
from ..backends.attention_options import Options, acc_dtype, empty_out
from ..backends.cpu import attention as _cpu
from ._doors import needs_grad, new_seed, once_differentiable, operator, register, register_autograd, through_operator

# Where these stand among the fields of Options.
_BIAS, _DISTANCE = Options._fields.index("bias"), Options._fields.index("distance_bias")


def run(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """out (B, Hq, Sq, Dv), with derivatives, of checked arguments. Draws the seed for dropout."""
    if (
        q.is_cpu
        and not needs_grad(q, k, v, options.bias, options.distance_bias)
        and not through_operator(q, k, v, *options.tensors())
        and select(q, k, v, options) is _cpu
    ):
        if options.dropout_p > 0:
            options = options._replace(seed=int(new_seed()))
        return _cpu.forward_only(_inner_contiguous(q), _inner_contiguous(k), _inner_contiguous(v), _laid_out(options))
    return run_with_lse(q, k, v, options)[0]


def run_with_lse(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """:func:`run`, and lse (B, Hq, Sq)."""
    if through_operator(q, k, v, *options.tensors()):
        seed = new_seed() if options.dropout_p > 0 else None
        return operator("attention", q, k, v, *options._replace(seed=seed))[:2]  # type: ignore[arg-type]
    if options.dropout_p > 0:
        options = options._replace(seed=int(new_seed()))
    if needs_grad(q, k, v, options.bias, options.distance_bias):
        return _Attention.apply(q, k, v, options.bias, options.distance_bias, options)
    return forward(select(q, k, v, options), q, k, v, options)


def run_plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor | None:
    """:func:`run` for an eager CPU call without options, unchecked arguments included; None if this is not one. What a
    call costs beside its kernel is then a few microseconds."""
    derivatives = False
    for t in (q, k, v):
        if type(t) is not Tensor or not t.is_cpu:
            return None
        derivatives = derivatives or t.requires_grad
    if through_operator() or registry.overridden() not in (None, "cpu"):
        return None
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if derivatives and torch.is_grad_enabled():
        return _PlainAttention.apply(q, k, v, scale, bool(causal))
    found = _cpu.plain(q, k, v, scale, bool(causal), False)
    return None if found is None else found[0]


def run_packed(qkv: Tensor, options: Options) -> Tensor:
    """(B, S, 3, H, D) -> (B, S, H, D), with one gradient for all three."""
    table = options.distance_bias
    if options.bias is None and needs_grad(qkv, table) and not through_operator(qkv, *options.tensors()):
        if options.dropout_p > 0:
            options = options._replace(seed=int(new_seed()))
        return _AttentionPacked.apply(qkv, table, options)
    return run(*unpack(qkv), options).transpose(1, 2)


def unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, S, 3, H, D) -> q, k, v (B, H, S, D)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def select(q: Tensor, k: Tensor, v: Tensor, options: Options) -> ModuleType:
    """The backend for this call."""
    return registry.select("attention", q.device.type, q.dtype, options.features(q, k, v))


def _inner_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def _laid_out(options: Options) -> Options:
    """The options with tensors as kernels read them: contiguous, those with a row per query or sequence by rows."""
    tensors = options.tensors()
    for t in tensors:  # a loop, not any(): this runs on every eager call
        if t is not None:
            break
    else:
        return options
    rows = [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors[:3]]
    return options.with_tensors([*rows, *(t if t is None else t.contiguous() for t in tensors[3:])])


def forward(kernels: ModuleType, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    return kernels.forward(_inner_contiguous(q), _inner_contiguous(k), _inner_contiguous(v), _laid_out(options))


def backward(kernels, dout, dlse, q, k, v, out, lse, options, needs=(False, False), dq=None, dk=None, dv=None):
    return kernels.backward(
        _inner_contiguous(dout),
        None if dlse is None else dlse.contiguous(),
        _inner_contiguous(q),
        _inner_contiguous(k),
        _inner_contiguous(v),
        out,
        lse,
        _laid_out(options),
        needs,
        dq,
        dk,
        dv,
    )


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)


def _detached(options: Options) -> tuple[Options, tuple[Tensor | None, ...]]:
    """The options without their tensors, and those, which autograd keeps."""
    tensors = options.tensors()
    for t in tensors:  # a loop, not any(): this runs on every eager call
        if t is not None:
            return options.with_tensors(()), tensors
    return options, ()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, distance_bias, options):
        ctx.kernels = select(q, k, v, options)
        out, lse = forward(ctx.kernels, q, k, v, options)
        ctx.options, tensors = _detached(options)
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        options = ctx.options.with_tensors(tensors) if tensors else ctx.options
        if dout is None:
            dout = torch.zeros_like(out)
        g = backward(ctx.kernels, dout, dlse, q, k, v, out, lse, options, ctx.needs_input_grad[3:5])
        return *g[:3], _cast(g.dbias, options.bias), _cast(g.ddistance_bias, options.distance_bias), None


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, causal):
        found = _cpu.plain(q, k, v, scale, causal, True)
        if found is None:
            return None
        out, lse = found
        ctx.options = Options(scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv, *_ = _cpu.backward(_inner_contiguous(dout), None, q, k, v, out, lse, ctx.options)
        return dq, dk, dv, None, None


class _AttentionPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, distance_bias, options):
        q, k, v = unpack(qkv)
        ctx.kernels = select(q, k, v, options)
        out, lse = forward(ctx.kernels, q, k, v, options)
        ctx.options, tensors = _detached(options)
        ctx.save_for_backward(qkv, out, lse, *tensors)
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, out, lse, *tensors = ctx.saved_tensors
        options = ctx.options.with_tensors(tensors) if tensors else ctx.options
        # In qkv's own layout, (S, B, ...) for one: the projection it comes from then takes it without a copy.
        dqkv = torch.empty_like(qkv if qkv.stride(-1) == 1 else qkv.contiguous())
        grads, needs = unpack(dqkv), (False, ctx.needs_input_grad[1])
        g = backward(ctx.kernels, dout.transpose(1, 2), None, *unpack(qkv), out, lse, options, needs, *grads)
        return dqkv, _cast(g.ddistance_bias, options.distance_bias), None


# ---- the registered operator -----------------------------------------------------------------------------------------

# Options, with its defaults.
_SCHEMA = (
    "float scale, bool causal=False, Tensor? key_padding_mask=None, Tensor? mask=None, Tensor? bias=None,"
    " Tensor? distance_bias=None, Tensor? alibi_slopes=None, bool top_left=False, int window_left=-1,"
    " int window_right=-1, float softcap=0.0, float dropout_p=0.0, Tensor? seed=None, Tensor? cu_seqlens_q=None,"
    " Tensor? cu_seqlens_k=None, SymInt max_seqlen_q=0, SymInt max_seqlen_k=0"
)


def _options(fields: tuple) -> Options:
    options = Options(*fields)
    return options._replace(seed=int(options.seed)) if isinstance(options.seed, Tensor) else options._replace(seed=0)


def _operator(q, k, v, *fields):
    options = _options(fields)
    return forward(select(q, k, v, options), q, k, v, options)


def _fake(q, k, v, *fields):
    return empty_out(q, v), q.new_empty(q.shape[:3], dtype=acc_dtype(q.dtype))


def _operator_backward(dout, dlse, q, k, v, out, lse, needs_bias, needs_distance, *fields):
    options = _options(fields)
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    needs = (needs_bias, needs_distance)
    g = backward(select(q, k, v, options), dout, dlse, q, k, v, out, lse, options, needs, *grads)
    # an operator returns tensors, whether they are asked for or not
    absent = q.new_empty(0)
    dbias = absent if g.dbias is None else g.dbias.to(options.bias.dtype).contiguous()
    ddistance = absent.clone() if g.ddistance_bias is None else g.ddistance_bias
    return *g[:3], dbias, ddistance


def _fake_backward(dout, dlse, q, k, v, out, lse, needs_bias, needs_distance, *fields):
    options = Options(*fields)
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    for needed, t in ((needs_bias, options.bias), (needs_distance, options.distance_bias)):
        grads.append(t.new_empty(t.shape) if needed else q.new_empty(0))
    return tuple(grads)


register(f"attention(Tensor q, Tensor k, Tensor v, {_SCHEMA}) -> (Tensor, Tensor)", _operator, _fake)
register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" bool needs_bias, bool needs_distance_bias, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _operator_backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    q, k, v, *fields = inputs
    ctx.fields = [None if isinstance(f, Tensor) else f for f in fields]
    ctx.tensors = [i for i, f in enumerate(fields) if isinstance(f, Tensor)]
    ctx.save_for_backward(q, k, v, *output, *(fields[i] for i in ctx.tensors))


def _autograd(ctx, dout, dlse):
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    fields = list(ctx.fields)
    for i, t in zip(ctx.tensors, tensors, strict=True):
        fields[i] = t
    needs = tuple(fields[i] is not None and ctx.needs_input_grad[3 + i] for i in (_BIAS, _DISTANCE))
    if dout is None:
        dout = torch.zeros_like(out)
    *grads, dbias, ddistance = operator("attention_backward", dout, dlse, q, k, v, out, lse, *needs, *fields)
    others: list[Tensor | None] = [None] * len(fields)
    others[_BIAS], others[_DISTANCE] = dbias if needs[0] else None, ddistance if needs[1] else None
    return *grads, *others


register_autograd("attention", _autograd, _setup_context)

__all__ = ["Options", "acc_dtype", "run", "run_packed", "run_plain", "run_with_lse", "select", "unpack"]
