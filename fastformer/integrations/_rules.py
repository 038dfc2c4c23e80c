"""Which class a module's class may become, and the proof.

    torch.nn     the class itself, or a subclass that changes nothing but its constructor: ours of the same name
    any library  a class whose code has the fingerprint of a fused layer (_layers*.py)
    transformers classes whose code is right but calls a function that has a fused kernel: the same code calls ours

:data:`rules` is open: ``rules[MyNorm] = Rule(MyFusedNorm, "layer_norm")``, with a subclass that needs no other state.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional, nn
from ..backends import matmul
from ..functional.attention import MAX_HEAD_DIM
from ..nn.submodules import is_plain
from . import _layers, _layers_bert, _layers_blocks
from ._parts import DTYPES, Fused, activation_name, feed_forward, fits, provable_activation
from ._proof import fingerprint, rebound


@dataclass(frozen=True)
class Rule:
    """What a class becomes."""

    replacement: type[torch.nn.Module]
    """A subclass (or a class made of one by :func:`fused_class`): only the class of an instance changes."""
    operations: str
    """For the report: what computes it then."""
    unless: Callable[[torch.nn.Module], str | None] = lambda module: None
    """Why an instance is left, None if it is not; an empty string leaves it without a word."""


def rule_for(cls: type) -> Rule | str | None:
    """The rule for instances of exactly this class, why there is none, or None: nothing here knows it."""
    if cls in rules:
        return rules[cls]
    for base in cls.__mro__[1:]:
        if base in rules and base is not torch.nn.Sequential:
            if not _changes_only_the_constructor(cls, base):
                return f"a subclass of {base.__module__.split('.')[0]}'s {base.__name__} with methods of its own"
            rule = rules[base]
            return Rule(fused_class(cls, rule.replacement), rule.operations, rule.unless)
    return _proved(cls, getattr(cls, "forward", None))


# What may differ in a subclass whose forward is inherited.
_HARMLESS = {"__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__static_attributes__"}
_HARMLESS |= {"__firstlineno__", "__annotate__", "__parameters__", "__repr__", "extra_repr", "reset_parameters"}


def _changes_only_the_constructor(cls: type, base: type) -> bool:
    between = cls.__mro__[: cls.__mro__.index(base)]
    return all(issubclass(c, base) and not set(vars(c)) - _HARMLESS for c in between)


@functools.cache
def fused_class(cls: type, first: type, forward: Callable[..., Any] | None = None) -> type:
    """``cls`` with the methods of ``first`` before its own. Its name stays: libraries know their classes by it."""
    members = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "optimized_from": cls,
    }
    if forward is not None:
        members["forward"] = forward
    return type(cls)(cls.__name__, (first, cls), members)


def _reduce(module: torch.nn.Module, protocol: int) -> tuple[Any, ...]:
    """For pickle and copy, which cannot find a class that was made here."""
    state = module.__getstate__() if hasattr(module, "__getstate__") else module.__dict__
    return _rebuild, (type(module).optimized_from,), state


def _rebuild(cls: type) -> torch.nn.Module:
    rule = rule_for(cls)
    made = rule.replacement if isinstance(rule, Rule) else cls
    return made.__new__(made)


@functools.cache
def _proved(cls: type, forward: object) -> Rule | None:  # forward: a class whose method is replaced is another one
    for layer in (*_layers.LAYERS, *_layers_bert.LAYERS, *_layers_blocks.LAYERS):
        if all(fingerprint(getattr(cls, method, None)) in known for method, known in layer.proof.items()):
            return Rule(fused_class(cls, layer), layer.operations, layer.unless)
    return _with_rotary_embedding(cls) or _with_loss(cls)


# ---- code that calls what has a fused kernel -------------------------------------------------------------------------

_ROTARY = {"aea60553d63e2661": False, "f1fae18a44664ae4": True, "0da6b8cbd91fb921": True}  # Llama, GPT-NeoX, Phi-3
_ROTARY_TABLES = {"667c96d81da31da5", "a8a467671624df2a"}  # LlamaRotaryEmbedding, Gemma3RotaryEmbedding


def _globals_of(cls: type, name: str) -> dict[str, Any] | None:
    """What ``forward`` sees, if it reads ``name`` there."""
    forward = inspect.unwrap(getattr(cls, "forward", _rebuild))
    code = getattr(forward, "__code__", None)
    return forward.__globals__ if code is not None and name in code.co_names else None


def _with(cls: type, operations: str, **names: object) -> Rule | None:
    forward = rebound(cls.forward, names)
    return None if forward is None else Rule(fused_class(cls, Fused, forward), operations)


def _with_rotary_embedding(cls: type) -> Rule | None:
    """Attention whose file rotates pairs of halves, by angles that it repeats in both halves."""
    name = "apply_rotary_pos_emb"
    scope = _globals_of(cls, name)
    known = None if scope is None else fingerprint(scope.get(name))
    if scope is None or known not in _ROTARY:
        return None
    tables = [value for key, value in scope.items() if key.endswith("RotaryEmbedding") and isinstance(value, type)]
    if not tables or any(fingerprint(inspect.unwrap(table.forward)) not in _ROTARY_TABLES for table in tables):
        return None
    return _with(cls, "rotary_embedding", **{name: _Rotary(scope[name], _ROTARY[known])})


class _Rotary:
    """``apply_rotary_pos_emb`` by :func:`fastformer.functional.rotary_embedding`."""

    def __init__(self, original: Callable[..., tuple[Tensor, Tensor]], partial: bool) -> None:
        self.original, self.partial = original, partial  # partial: there may be fewer angles than dimensions

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        alike = q.dtype == k.dtype == cos.dtype == sin.dtype and q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3
        grad = cos.requires_grad or sin.requires_grad
        sizes = cos.shape[-1] == q.shape[-1] or (self.partial and cos.shape[-1] < q.shape[-1])
        if not (alike and sizes and unsqueeze_dim in (1, 2) and fits(q)) or grad:
            return self.original(q, k, cos, sin, unsqueeze_dim)
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
        if unsqueeze_dim == 1:
            return functional.rotary_embedding(q, k, cos, sin)
        q, k = functional.rotary_embedding(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)


def _with_loss(cls: type) -> Rule | None:
    """Models of transformers that make a ``CrossEntropyLoss`` in their forward."""
    scope = _globals_of(cls, "CrossEntropyLoss")
    if scope is None or scope.get("CrossEntropyLoss") is not torch.nn.CrossEntropyLoss:
        return None
    if not any((b.__module__, b.__name__) == ("transformers.modeling_utils", "PreTrainedModel") for b in cls.__mro__):
        return None
    return _with(cls, "cross_entropy", CrossEntropyLoss=nn.CrossEntropyLoss)


# ---- torch.nn --------------------------------------------------------------------------------------------------------


class Sequential(torch.nn.Sequential):
    """Every ``Linear, activation, Linear``, with or without a Dropout before the last, is one operation."""

    def forward(self, input: Tensor) -> Tensor:
        modules = list(self)
        at = 0
        while at < len(modules):
            length = _feed_forward_at(modules, at, activation_name)
            out = None
            if length:
                drop = modules[at + 2] if length == 4 else None
                p = drop.p if drop is not None and drop.training else 0.0
                out = feed_forward(input, modules[at], modules[at + 1], modules[at + length - 1], dropout_p=p)
            if out is None:
                out, length = modules[at](input), 1
            input, at = out, at + length
        return input


def _feed_forward_at(modules: list[torch.nn.Module], at: int, name: Callable[[object], str | None]) -> int:
    """How many modules from ``at`` on are a feed-forward block: 3, 4 or 0."""
    linear = (torch.nn.Linear, nn.Linear)
    if len(modules) < at + 3 or type(modules[at]) not in linear or name(modules[at + 1]) is None:
        return 0
    if type(modules[at + 2]) in linear:
        return 3
    with_dropout = len(modules) > at + 3 and type(modules[at + 3]) in linear
    return 4 if with_dropout and is_plain(modules[at + 2], torch.nn.Dropout) else 0


def _unless_no_feed_forward(module: torch.nn.Module) -> str | None:
    modules = list(module.children())
    return None if any(_feed_forward_at(modules, at, provable_activation) for at in range(len(modules))) else ""


def _unless_embedding(module: torch.nn.Module) -> str | None:
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, option):
            return f"{option} has no fused kernel"
    return None


def _unless_attention(module: torch.nn.Module) -> str | None:
    return f"head_dim {module.head_dim} is over {MAX_HEAD_DIM}" if module.head_dim > MAX_HEAD_DIM else None


def _unless_linear(module: torch.nn.Module) -> str | None:
    weight = module.weight
    # float32 is half precision under autocast.
    dtypes = (*matmul.FEW_ROWS, torch.float32) if matmul.CONVERTED else matmul.FEW_ROWS
    ours = weight.dtype in dtypes and weight.device.type == "cpu"
    return None if ours else "its matmul is the vendor library's either way"


def _unless_layer(module: torch.nn.Module) -> str | None:
    return _unless_attention(module.self_attn) if isinstance(module.self_attn, torch.nn.MultiheadAttention) else None


rules: dict[type, Rule] = {torch.nn.Sequential: Rule(Sequential, "feed_forward", _unless_no_feed_forward)}
for _name, _operations, _unless in (
    ("LayerNorm", "layer_norm", None),
    ("RMSNorm", "rms_norm", None),
    ("Softmax", "softmax", None),
    ("LogSoftmax", "log_softmax", None),
    ("GELU", "gelu", None),
    ("SiLU", "silu", None),
    ("ReLU", "relu", None),
    ("Embedding", "embedding", _unless_embedding),
    ("Linear", "linear", _unless_linear),
    ("CrossEntropyLoss", "cross_entropy", None),
    ("MultiheadAttention", "attention", _unless_attention),
    ("TransformerEncoderLayer", "attention, feed_forward, add_layer_norm", _unless_layer),
    ("TransformerDecoderLayer", "attention, feed_forward, add_layer_norm", _unless_layer),
    ("TransformerEncoder", "add_layer_norm across layers", None),
    ("TransformerDecoder", "add_layer_norm across layers", None),
    ("Transformer", "its encoder and decoder", None),
):
    if hasattr(nn, _name):
        rules[getattr(torch.nn, _name)] = Rule(
            getattr(nn, _name), _operations, *(() if _unless is None else (_unless,))
        )
if hasattr(torch.nn, "LinearCrossEntropyLoss"):  # torch 2.13
    rules[torch.nn.LinearCrossEntropyLoss] = Rule(
        fused_class(torch.nn.LinearCrossEntropyLoss, nn.LinearCrossEntropyLoss), "linear_cross_entropy"
    )


def unless_parameters(module: torch.nn.Module) -> str | None:
    """Why a module's own parameters keep it from being swapped."""
    for parameter in module.parameters(recurse=False):
        if parameter.dtype not in DTYPES:
            return f"its parameters are {parameter.dtype}"
        if parameter.device.type not in ("cpu", "cuda", "meta"):
            return f"it is on {parameter.device}"
        if type(parameter) not in (torch.nn.Parameter, torch.nn.parameter.UninitializedParameter):
            return f"its parameters are {type(parameter).__name__}s"
    return None
