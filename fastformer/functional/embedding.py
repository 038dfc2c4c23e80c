"""Embedding: rows of a table by index; and a transformer's first layer, the sum of token, position and segment tables.

:func:`embedding` has torch's signature. :func:`transformer_embedding` is what models begin with:

    out = dropout(layer_norm(scale * token[input_ids] + position[position_ids] + token_type[token_type_ids]))

PyTorch gathers every table into a tensor of its own and then adds, normalises and drops out in further passes; here
each row is gathered, added up and finished in one. Backward gathers again instead of keeping the sum. Each table's
gradient is summed by the owners of its rows in a fixed order, so it repeats bit for bit, on a GPU too.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import registry
from ..backends.embedding_table import Table
from . import _checks
from ._doors import needs_grad, new_seed, once_differentiable, operator, register, register_autograd, through_operator


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``weight[input]``; same arguments and result as ``torch.nn.functional.embedding``.

    Args:
        input: indices of any shape, int64 or int32.
        weight: ``(num_embeddings, embedding_dim)``; float32, bfloat16, float16 or (CPU) float64.
        padding_idx: the row whose gradient is zero; negative counts from the end.
        max_norm, norm_type, scale_grad_by_freq, sparse: no fused kernel covers these; torch's own function runs.

    Returns:
        ``(*input.shape, embedding_dim)`` in the dtype of ``weight``.

    Raises:
        TypeError, ValueError: arguments that do not fit, naming the argument.
        IndexError: an index outside [0, num_embeddings) (on a GPU: a NaN row instead, to avoid waiting).
    """
    _check_table("weight", weight)
    _check_ids("input", input, "weight", weight)
    padding = _padding_row(padding_idx, weight)
    unfused = [
        name
        for name, used in (
            ("max_norm", max_norm is not None),
            ("scale_grad_by_freq", scale_grad_by_freq),
            ("sparse", sparse),
        )
        if used
    ]
    if unfused or weight.shape[1] == 0:
        if unfused:
            registry.report_unfused("embedding", ", ".join(unfused))
        return torch.nn.functional.embedding(
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    return _embed(input, (weight, None, None), (None, 0, None), padding, 1.0, None, None, None, 0.0, "input")


def transformer_embedding(
    input_ids: Tensor,
    token_weight: Tensor,
    position_weight: Tensor | None = None,
    token_type_weight: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    position_offset: int = 0,
    token_type_ids: Tensor | None = None,
    scale: float = 1.0,
    padding_idx: int | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``dropout(layer_norm(scale * token + position + token_type))`` of the rows the ids name, in one pass.

    GPT-2 is ``transformer_embedding(ids, wte, wpe, position_offset=past, dropout_p=0.1)``, T5 has neither positions nor
    a norm, BERT has everything (Devlin et al. 2018, section 3), the original transformer ``scale=d_model ** 0.5``
    (Vaswani et al. 2017, section 3.4).

    Args:
        input_ids: ``(*, S)`` int64 or int32.
        token_weight: ``(vocabulary, E)``; float32, bfloat16, float16 or (CPU) float64.
        position_weight: ``(positions, E)`` in the same dtype, or None.
        token_type_weight: ``(types, E)`` likewise: BERT's segments.
        position_ids: broadcastable to ``input_ids``; None for ``position_offset``, ``position_offset + 1``, ...
        position_offset: the position of the first column, the length of a key/value cache.
        token_type_ids: broadcastable to ``input_ids``; None for row 0 everywhere.
        scale: factor of the token rows alone.
        padding_idx: row of ``token_weight`` whose gradient is zero; negative counts from the end.
        norm_weight, norm_bias: ``(E)`` or None; in token_weight's dtype, or float32 beside half precision.
        norm_eps: switches the layer norm on.
        dropout_p: probability of zeroing an element of the result; the rest is scaled by 1 / (1 - dropout_p).
        training: False switches dropout off.

    Returns:
        ``(*, S, E)`` in the dtype of ``token_weight``.

    Raises:
        TypeError, ValueError: arguments that do not fit, naming the argument.
        IndexError: an index outside its table (on a GPU: a NaN row instead, to avoid waiting).
    """
    _check_table("token_weight", token_weight)
    _check_ids("input_ids", input_ids, "token_weight", token_weight)
    if input_ids.dim() == 0:
        raise ValueError("input_ids: expected (*, S), got a scalar")
    for name, table, ids_name, ids in (
        ("position_weight", position_weight, "position_ids", position_ids),
        ("token_type_weight", token_type_weight, "token_type_ids", token_type_ids),
    ):
        if table is not None:
            _check_table(name, table)
            _checks.same_dtype(name, table, "token_weight", token_weight)
            _checks.same_device(name, table, "token_weight", token_weight)
            if table.shape[1] != token_weight.shape[1]:
                raise ValueError(f"{name}: rows of {table.shape[1]} beside token_weight's {token_weight.shape[1]}")
        if ids is not None:
            if table is None:
                raise ValueError(f"{ids_name}: given without {name}")
            _check_ids(ids_name, ids, name, table)
            _check_broadcast(ids_name, ids, input_ids)
    if position_offset < 0 or (position_offset and position_ids is not None):
        raise ValueError(f"position_offset: {position_offset} is negative, or given beside position_ids")
    if position_offset and position_weight is None:
        raise ValueError("position_offset: given without position_weight")
    if position_weight is not None and position_ids is None:
        needed = position_offset + input_ids.shape[-1]
        if needed > position_weight.shape[0]:
            raise IndexError(f"position_weight: has {position_weight.shape[0]} rows, and {needed} positions are needed")
    if norm_eps is None and (norm_weight is not None or norm_bias is not None):
        raise ValueError("norm_eps: needed beside norm_weight or norm_bias, to switch the norm on")
    if norm_eps is not None and norm_eps < 0:
        raise ValueError(f"norm_eps: {norm_eps} is negative")
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        _checks.parameter(name, parameter, token_weight.shape[1:], "token_weight", token_weight)
    _checks.probability("dropout_p", dropout_p)
    if token_weight.shape[1] == 0:
        raise ValueError("token_weight: rows of no elements")
    weights = (token_weight, position_weight, token_type_weight)
    named = (position_ids, position_offset, token_type_ids)
    p = float(dropout_p) if training else 0.0
    padding = _padding_row(padding_idx, token_weight)
    return _embed(input_ids, weights, named, padding, float(scale), norm_weight, norm_bias, norm_eps, p)


def _check_table(name: str, table: Tensor) -> None:
    _checks.tensor(name, table)
    if table.dim() != 2:
        raise ValueError(f"{name}: expected (rows, columns), got shape {tuple(table.shape)}")


def _check_ids(name: str, ids: Tensor, table_name: str, table: Tensor) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: dtype {ids.dtype} is not int64 or int32")
    _checks.same_device(name, ids, table_name, table)


def _check_broadcast(name: str, ids: Tensor, input_ids: Tensor) -> None:
    wanted = tuple(input_ids.shape)
    padded = (1,) * (len(wanted) - ids.dim()) + tuple(ids.shape)
    if len(padded) != len(wanted) or any(n not in (1, w) for n, w in zip(padded, wanted, strict=True)):
        raise ValueError(f"{name}: shape {tuple(ids.shape)} does not broadcast to input_ids' {wanted}")


def _padding_row(padding_idx: int | None, weight: Tensor) -> int:
    if padding_idx is None:
        return -1
    rows = weight.shape[0]
    if not -rows <= padding_idx < rows:
        raise ValueError(f"padding_idx: {padding_idx} is not in [-{rows}, {rows})")
    return padding_idx % rows


def _embed(input_ids, weights, ids, padding, scale, norm_weight, norm_bias, eps, p, name="input_ids"):
    if through_operator(input_ids, *weights, norm_weight, norm_bias):
        seed = new_seed() if p > 0 else None
        return operator("embedding", input_ids, *weights, *ids, padding, scale, norm_weight, norm_bias, eps, p, seed)[0]
    kernels = _select(weights[0], eps, p)
    tables = _tables(input_ids, weights, ids, padding, name)
    options = _Options(input_ids.shape, scale, eps, p, int(new_seed()) if p > 0 else 0)
    if needs_grad(*weights, norm_weight, norm_bias):
        return _Embedding.apply(*weights, norm_weight, norm_bias, tables, options, kernels)
    return _forward(kernels, tables, options, norm_weight, norm_bias, statistics=False)[0]


class _Options(NamedTuple):
    """What a call asks for beside its tables and the norm's parameters."""

    shape: torch.Size
    """Of input_ids."""
    scale: float
    eps: float | None
    p: float
    seed: int


def _select(weight: Tensor, eps: float | None, p: float) -> ModuleType:
    features: tuple[str, ...] = () if eps is None else ("norm",)
    if p > 0:
        features += ("dropout",)
    return registry.select("embedding", weight.device.type, weight.dtype, features)


def _tables(
    input_ids: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor | None],
    ids: tuple[Tensor | None, int, Tensor | None],
    padding: int,
    name: str = "input_ids",
) -> tuple[Table, ...]:
    """The tables as kernels take them (backends/embedding_table.py). Indices alike in every sequence stay short."""
    token, position, token_type = weights
    count = input_ids.numel()
    first = Table(_readable(token), _indices(input_ids), count, 0, padding, name)
    if position is None and token_type is None:
        return (first,)
    position_ids, offset, type_ids = ids
    shape, tables = input_ids.shape, [first]
    last = shape[-1]

    def table(weight: Tensor, ids: Tensor, name: str) -> Table:
        if ids.numel() == last and ids.shape[-1:] == shape[-1:]:
            return Table(_readable(weight), _indices(ids), last, 0, -1, name)
        return Table(_readable(weight), _indices(ids.expand(shape)), count, 0, -1, name)

    if position is not None and position_ids is not None:
        tables.append(table(position, position_ids, "position_ids"))
    elif position is not None:
        tables.append(Table(_readable(position), None, last, offset, -1, "position_ids"))
    if token_type is not None and type_ids is not None:
        tables.append(table(token_type, type_ids, "token_type_ids"))
    elif token_type is not None:
        tables.append(Table(_readable(token_type), None, 1, 0, -1, "token_type_ids"))
    return tuple(tables)


def _indices(ids: Tensor) -> Tensor:
    if ids.dtype is not torch.int64:
        ids = ids.to(torch.int64)
    return ids.contiguous()


def _readable(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.detach().contiguous()


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _forward(kernels, tables, options, norm_weight, norm_bias, statistics=True):
    shape, scale, eps, p, seed = options
    norm = (eps is not None, _contiguous(norm_weight), _contiguous(norm_bias), eps or 0.0)
    try:
        return kernels.forward(tables, shape, scale, *norm, p, seed, statistics)
    except ValueError as error:
        for i, table in enumerate(tables):
            if str(error).startswith(f"tables[{i}].ids: "):
                raise IndexError(str(error).replace(f"tables[{i}].ids", table.name)) from None
        raise


def _backward(kernels, dout, tables, options, norm_weight, mean, rstd, needs, need_dweight, need_dbias, param_dtype):
    """``needs`` of the three tables -> their three gradients, and the norm's two."""
    _, scale, eps, p, seed = options
    gradients, dweight, dbias = kernels.backward(
        _checks.as_rows(dout, dout.shape[-1]),
        tables,
        scale,
        eps is not None,
        _contiguous(norm_weight),
        mean,
        rstd,
        p,
        seed,
        needs,
        need_dweight,
        need_dbias,
        param_dtype,
    )
    return gradients, dweight, dbias


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, position, token_type, norm_weight, norm_bias, tables, options, kernels):
        out, mean, rstd = _forward(kernels, tables, options, norm_weight, norm_bias)
        # Without a norm backward reads nothing of the tables, so they may change or go before it runs.
        weights = (token, position, token_type) if options.eps is not None else ()
        ctx.save_for_backward(norm_weight, mean, rstd, *weights)
        ctx.tables, ctx.options, ctx.kernels = tables, options, kernels
        ctx.present = [w is not None for w in (token, position, token_type)]
        ctx.param_dtype = _param_dtype(token, norm_weight, norm_bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        norm_weight, mean, rstd, *_ = ctx.saved_tensors
        needs = [need for need, there in zip(ctx.needs_input_grad[:3], ctx.present, strict=True) if there]
        found, dweight, dbias = _backward(
            ctx.kernels, dout, ctx.tables, ctx.options, norm_weight, mean, rstd, tuple(needs),
            *ctx.needs_input_grad[3:5], ctx.param_dtype,
        )  # fmt: skip
        remaining = iter(found)
        return *(next(remaining) if there else None for there in ctx.present), dweight, dbias, None, None, None


def _param_dtype(token: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> torch.dtype:
    return next((p.dtype for p in (norm_weight, norm_bias) if p is not None), token.dtype)


# ---- the registered operator -----------------------------------------------------------------------------------------


def _operator(
    input_ids, token, position, token_type, position_ids, offset, type_ids, padding, scale, norm_weight, norm_bias,
    eps, p, seed,
):  # fmt: skip
    tables = _tables(input_ids, (token, position, token_type), (position_ids, offset, type_ids), padding)
    options = _Options(input_ids.shape, scale, eps, p, 0 if seed is None else int(seed))
    out, mean, rstd = _forward(_select(token, eps, p), tables, options, norm_weight, norm_bias)
    return out, _or_empty(mean, token), _or_empty(rstd, token)


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t


def _fake(input_ids, token, *arguments):
    out = token.new_empty((*input_ids.shape, token.shape[1]))
    if arguments[-3] is None:  # no norm
        return out, token.new_empty(0), token.new_empty(0)
    mean = token.new_empty(input_ids.numel(), dtype=torch.float64 if token.dtype == torch.float64 else torch.float32)
    return out, mean, torch.empty_like(mean)


def _operator_backward(
    dout, input_ids, token, position, token_type, position_ids, offset, type_ids, padding, scale, norm_weight, mean,
    rstd, eps, p, seed, needs, param_dtype,
):  # fmt: skip
    weights = (token, position, token_type)
    tables = _tables(input_ids, weights, (position_ids, offset, type_ids), padding)
    options = _Options(input_ids.shape, scale, eps, p, 0 if seed is None else int(seed))
    wanted = tuple(need for need, w in zip(needs[:3], weights, strict=True) if w is not None)
    found, dweight, dbias = _backward(
        _select(token, eps, p), dout, tables, options, norm_weight, mean, rstd, wanted, *needs[3:], param_dtype
    )
    remaining = iter(found)
    gradients = [next(remaining) if w is not None else None for w in weights]
    return tuple(_or_empty(g, token) for g in (*gradients, dweight, dbias))


def _fake_backward(dout, input_ids, token, position, token_type, *arguments):
    needs, param_dtype = arguments[-2:]
    tables = [
        token.new_empty(w.shape) if need and w is not None else token.new_empty(0)
        for need, w in zip(needs[:3], (token, position, token_type), strict=True)
    ]
    norm = [token.new_empty(token.shape[1], dtype=param_dtype) if need else token.new_empty(0) for need in needs[3:]]
    return (*tables, *norm)


_TABLES = (
    "Tensor input_ids, Tensor token, Tensor? position, Tensor? token_type, Tensor? position_ids,"
    " SymInt position_offset, Tensor? token_type_ids, int padding_idx, float scale, Tensor? norm_weight"
)
register(
    f"embedding({_TABLES}, Tensor? norm_bias, float? norm_eps, float dropout_p, Tensor? seed)"
    " -> (Tensor, Tensor, Tensor)",
    _operator,
    _fake,
)
register(
    f"embedding_backward(Tensor dout, {_TABLES}, Tensor mean, Tensor rstd, float? norm_eps, float dropout_p,"
    " Tensor? seed, bool[] needs, ScalarType param_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _operator_backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    ids, token, position, token_type, position_ids, ctx.offset, type_ids, ctx.padding, ctx.scale, *rest = inputs
    norm_weight, norm_bias, ctx.eps, ctx.p, seed = rest
    _, mean, rstd = output
    ctx.save_for_backward(ids, token, position, token_type, position_ids, type_ids, norm_weight, mean, rstd, seed)
    ctx.param_dtype = _param_dtype(token, norm_weight, norm_bias)
    needs = [ctx.needs_input_grad[i] for i in (1, 2, 3, 9, 10)]
    ctx.needs = [
        bool(n and t is not None) for n, t in zip(needs, (token, position, token_type, norm_weight, norm_bias))
    ]
    ctx.mark_non_differentiable(mean, rstd)


def _autograd(ctx, dout, _dmean, _drstd):
    ids, token, position, token_type, position_ids, type_ids, norm_weight, mean, rstd, seed = ctx.saved_tensors
    found = operator(
        "embedding_backward", dout, ids, token, position, token_type, position_ids, ctx.offset, type_ids, ctx.padding,
        ctx.scale, norm_weight, mean, rstd, ctx.eps, ctx.p, seed, ctx.needs, ctx.param_dtype,
    )  # fmt: skip
    dtoken, dposition, dtype_, dweight, dbias = (g if n else None for g, n in zip(found, ctx.needs, strict=True))
    return None, dtoken, dposition, dtype_, None, None, None, None, None, dweight, dbias, None, None, None


register_autograd("embedding", _autograd, _setup_context)
