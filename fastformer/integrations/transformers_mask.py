"""The mask of one forward pass of a Hugging Face model, described instead of stored wherever that is exact.

transformers asks for the (B, 1, Sq, Sk) table of which query may look at which key. Nearly all of them are a few
numbers and one row per sequence: causal, a window, padding, the bounds of packed documents. attention's kernels take
those as they are, so that what travels through the model here is a tensor of that shape without a table behind it
(:class:`StructuredMask`). A model that does anything with it, slices it, adds to it, gets the table instead; so does a
pattern that is not known for certain. It is there in the plainest case as well, where "sdpa" has None and relies on
what each layer says of itself: not every layer does so rightly.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import masking_utils as masking
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.import_utils import is_tracing

from .flash_attn import MANY_ROWS


class Pattern(NamedTuple):
    """What :func:`fastformer.functional.attention` is told in place of a table."""

    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    keys: int | None = None
    """The first so many keys count, positions aligned at the last of them; the others are hidden from every query (the
    room that a static cache has left). None = all."""
    key_padding_mask: Tensor | None = None
    """``(B, keys)`` bool, True = ignored."""
    span: tuple[Tensor, Tensor] | None = None
    """The same as two ``(B)`` int32, the first key that counts and the first behind them, for so few queries that
    :func:`fastformer.functional.decode_attention` is the faster one; None if the keys that count are not in a row."""
    cu_seqlens: Tensor | None = None
    """``(N + 1)`` int32: bounds of the documents in the B * S positions, none of which sees another."""


class StructuredMask(Tensor):
    """A ``(B, 1, Sq, Sk)`` bool mask, True = may look, stored only once something other than attention reads it."""

    pattern: Pattern

    @staticmethod
    def __new__(cls, pattern: Pattern, make: Callable[[], Tensor], shape: tuple[int, ...], device: Any):
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=torch.device(device))

    def __init__(self, pattern: Pattern, make: Callable[[], Tensor], shape: tuple[int, ...], device: Any):
        self.pattern = pattern
        self._make = make
        self._table: Tensor | None = None

    def table(self) -> Tensor:
        """It as a plain tensor, the same one at every call, so that writing into it (or a slice of it) lasts."""
        if self._table is None:
            self._table = self._make()
        return self._table

    def untouched(self) -> bool:
        """Whether the pattern still describes it: nothing was written into it, or into a slice of it."""
        return self._table is None or (not self.is_inference() and self._version == 0)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls.table, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo):
        return self.table().clone()

    def __reduce_ex__(self, protocol):
        return self.table().__reduce_ex__(protocol)

    def __repr__(self):
        return f"StructuredMask({tuple(self.shape)}, {self.pattern})"


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward pass, with the arguments of transformers' ``sdpa_mask``.

    Args:
        batch_size, q_length, kv_length: B, Sq, Sk.
        q_offset, kv_offset: positions of the first query and the first key.
        mask_function: (b, h, q, k) -> whether the query at position q may look at the key at position k.
        attention_mask: ``(B, positions)`` bool, False = padding.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether the caller can do with less than a table.
        local_size, use_vmap, device, kwargs: as transformers passes them.

    Returns:
        A :class:`StructuredMask`, or a bool table ``(B, 1, Sq, Sk)``, True = may look. While a compiler traces, the
        table, or None as with "sdpa".

    Raises:
        ValueError: the model would not ask for the attention that this mask is for.
    """
    declared = declared_by(type(kwargs["config"])) if "config" in kwargs else "sdpa"
    if declared == "eager":
        raise ValueError(
            f"attn_implementation: models of a {type(kwargs['config']).__name__} have no other attention than their"
            ' own, "eager"; they would ask "fastformer" for a mask only'
        )
    make = functools.partial(
        masking.sdpa_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        device=device,
    )
    if is_tracing(attention_mask):
        # None is then causal if the layer says so, which those of models with "sdpa" do rightly. With room in a static
        # cache it would be aligned at the first key, here it is at the last.
        none = declared == "sdpa" and (q_length == 1 or q_length == kv_length)
        return make(
            allow_is_causal_skip=allow_is_causal_skip and none,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip and declared == "sdpa",
        )
    table = functools.partial(make, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    pattern = recognise(mask_function)
    # Where None is not allowed and nothing is packed, the caller wants a table: it compiles, or changes it.
    if pattern is None or not (allow_is_causal_skip or allow_is_bidirectional_skip or pattern.cu_seqlens is not None):
        return table()
    pattern = place(pattern, q_length, kv_length, q_offset, kv_offset, attention_mask)
    if pattern is None:
        return table()
    return StructuredMask(pattern, table, (batch_size, 1, q_length, kv_length), device)


def place(
    pattern: Pattern,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    attention_mask: Tensor | None,
) -> Pattern | None:
    """``pattern`` for queries and keys at these positions, without what makes no difference there; None if attention,
    which aligns both at their last position, cannot express it."""
    if pattern.causal or pattern.window != (-1, -1):
        if isinstance(q_offset, Tensor):
            if q_offset.device.type != "cpu":  # reading it would make the host wait
                return None
            q_offset = int(q_offset)
        keys = q_offset + q_length - kv_offset  # up to the last query's own
        if keys > kv_length or (keys < kv_length and not pattern.causal):
            return None
        window = (-1, -1) if pattern.window[0] >= keys - 1 else pattern.window  # reaches every key from everywhere
        pattern = pattern._replace(keys=keys if keys < kv_length else None, window=window)
    if attention_mask is not None:
        keys = kv_length if pattern.keys is None else pattern.keys
        visible = attention_mask[:, kv_offset : kv_offset + keys].to(torch.bool)
        visible = torch.nn.functional.pad(visible, (0, keys - visible.shape[1]))
        if not visible.all():
            pattern = pattern._replace(key_padding_mask=~visible)
            if q_length < MANY_ROWS:
                pattern = pattern._replace(span=_span(visible, aligned=pattern.causal or pattern.window != (-1, -1)))
    return pattern


def _span(visible: Tensor, aligned: bool) -> tuple[Tensor, Tensor] | None:
    """Where the True of each row begin and end, if there is no False between them, and with ``aligned`` none behind."""
    keys, count = visible.shape[1], visible.sum(1)
    begin = visible.to(torch.int32).argmax(1)
    last = keys - visible.flip(1).to(torch.int32).argmax(1)
    if not ((last - begin == count) & ((last == keys) | (not aligned))).all():
        return None
    return begin.to(torch.int32), last.to(torch.int32)


# ---- which models would ask for a mask and then not for attention ----------------------------------------------------

_declared: dict[type, str] = {}


@torch.compiler.assume_constant_result
def declared_by(config: type) -> str:
    """What the models of a configuration class declare beside their own attention: "sdpa", "other", or "eager": none.

    A model with none, or one that does not go through transformers' attention interface, would add the mask that it
    gets here to its scores, or go without causality where there is none. transformers refuses it "sdpa" and the like by
    name, but not a name that it does not know.
    """
    if config not in _declared:
        models = [model for base in config.__mro__ for model in _models_of(base)]
        asking = [model for model in models if model._can_set_attn_implementation()]
        if not models or any(model._supports_sdpa for model in asking):
            _declared[config] = "sdpa"
        else:
            others = any(model._supports_flash_attn or model._supports_flex_attn for model in asking)
            _declared[config] = "other" if others else "eager"
    return _declared[config]


def _models_of(config: type) -> list[type[PreTrainedModel]]:
    """The model classes beside a configuration class, in the modules of its package that have been imported."""
    package = config.__module__.rpartition(".")[0]
    modules = [m for name, m in sys.modules.items() if package and name.startswith(f"{package}.modeling_")]
    classes = [c for m in modules for c in vars(m).values() if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    return [c for c in classes if c.__module__.startswith(package) and getattr(c, "config_class", None) is config]


# ---- which pattern a mask function is --------------------------------------------------------------------------------

# A function that one of transformers' factories returned has the factory's code object and, in its closure, what the
# factory was given: that says what it computes. Whatever else there is gets a table.
_AND = masking.and_masks(masking.causal_mask_function).__code__
_WINDOW = masking.sliding_window_overlay(1).__code__
_WINDOW_BOTH = masking.sliding_window_bidirectional_overlay(1).__code__
_PACKED = masking.packed_sequence_mask_function(torch.zeros(1, 1)).__code__
_WITHIN = masking.remap_positions_for_packed_sequence(masking.causal_mask_function, torch.zeros(1, 1)).__code__


def recognise(function: Callable) -> Pattern | None:
    """What ``function`` computes, if it is one that transformers builds for causal, windowed or packed attention."""
    if function is masking.causal_mask_function:
        return Pattern(causal=True)
    if function is masking.bidirectional_mask_function:
        return Pattern()
    if not isinstance(function, FunctionType) or function.__code__ is not _AND:
        return None
    parts = _given(function)["mask_functions"]
    if len(parts) != 2 or not all(isinstance(part, FunctionType) for part in parts):
        return None
    first, second = parts
    if first.__code__ is _WINDOW and second is masking.causal_mask_function:
        return _windowed(_given(first)["sliding_window"], causal=True)
    if first.__code__ is _WINDOW_BOTH and second is masking.bidirectional_mask_function:
        return _windowed(_given(first)["sliding_window"], causal=False)
    if first.__code__ is _PACKED and second.__code__ is _WITHIN:
        # Positions count up by one within a document, so that distances are those between the places in the row.
        inner = recognise(_given(second)["mask_function"])
        if inner is not None and inner.cu_seqlens is None:
            return inner._replace(cu_seqlens=bounds(_given(first)["packed_sequence_mask"]))
    return None


def bounds(documents: Tensor) -> Tensor:
    """``(B, S)`` numbers of documents -> where each begins in the B * S positions, and the end."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    places = begins.flatten().nonzero().flatten()
    return torch.cat((places, places.new_tensor([documents.numel()]))).to(torch.int32)


def _windowed(size: Any, causal: bool) -> Pattern | None:
    if not isinstance(size, int) or size < 1:
        return None
    return Pattern(causal, (size - 1, 0) if causal else (size, size))


def _given(function: FunctionType) -> dict[str, Any]:
    """The values in a function's closure, by name."""
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))
