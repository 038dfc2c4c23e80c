"""Checks that all models share, before anything runs."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from ..functional._doors import through_operator


def one_of(**given: Tensor | None) -> None:
    """Raises ValueError unless exactly one of two arguments is given, such as ``input_ids`` and ``inputs_embeds``."""
    if sum(value is not None for value in given.values()) != 1:
        first, second = given
        raise ValueError(f"{first}: give either {first} or {second}, not both or neither")


def check_indices(name: str, indices: Tensor, size: int) -> None:
    """``indices`` are ``(B, S)`` integers in [0, size)."""
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected an int64 tensor, got {getattr(indices, 'dtype', type(indices).__name__)}")
    if indices.dim() != 2:
        raise ValueError(f"{name}: shape {tuple(indices.shape)} is not (B, S)")
    # On a GPU this would wait for the device; torch's embedding kernel asserts there. A tracer has no values.
    if indices.device.type == "cpu" and indices.numel() and not through_operator(indices):
        low, high = torch.aminmax(indices)
        if low < 0 or high >= size:
            raise ValueError(f"{name}: values {int(low)} to {int(high)} are not all in [0, {size})")


def check_embeds(name: str, embeds: Tensor, width: int) -> None:
    """``embeds`` are ``(B, S, width)``."""
    if not isinstance(embeds, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(embeds).__name__}")
    if embeds.dim() != 3 or embeds.shape[2] != width:
        raise ValueError(f"{name}: shape {tuple(embeds.shape)} is not (B, S, {width})")


def padding_mask(
    attention_mask: Tensor | None, batch: int, length: int, device: torch.device, name: str = "attention_mask"
) -> Tensor | None:
    """``transformers``' mask ``(B, S)``, 0 at padding, as the kernels' ``(B, S)`` bool, True = ignored."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, length):
        raise ValueError(f"{name}: shape {tuple(attention_mask.shape)} is not {(batch, length)}")
    if attention_mask.device != device:
        raise ValueError(f"{name}: is on {attention_mask.device}, but the input is on {device}")
    return attention_mask == 0


class PackedArguments(TypedDict, total=False):
    """How ``transformers`` describes texts that lie end to end in a row (its flash attention's keyword arguments).

    ``cu_seq_lens_q``, ``cu_seq_lens_k``: ``(texts + 1)`` int32, where each text begins, and the end; the two are the
    same. ``max_length_q``, ``max_length_k``: the longest text; left out, it is looked up.
    """

    cu_seq_lens_q: Tensor
    cu_seq_lens_k: Tensor
    max_length_q: int
    max_length_k: int


class PackedTexts(NamedTuple):
    """``cu_seqlens (texts + 1)`` int32 and the longest text, for :func:`fastformer.functional.attention_varlen`."""

    cu_seqlens: Tensor
    max_length: int | None


def packed_texts(given: PackedArguments, batch: int, **others: Any) -> PackedTexts | None:
    """What a model's ``**packed`` says; None if nothing.

    Args:
        given: the keyword arguments that the model does not name itself.
        batch: rows of the input, which must be one.
        others: what cannot be had for packed texts, by name; may be None or False.

    Raises:
        TypeError: a keyword argument that there is not.
        ValueError: arguments that do not fit together.
    """
    if not given:
        return None
    unknown = given.keys() - PackedArguments.__annotations__.keys()
    if unknown:
        raise TypeError(f"forward() got an unexpected keyword argument {min(unknown)!r}")
    starts, keys = given.get("cu_seq_lens_q"), given.get("cu_seq_lens_k")
    if starts is None and keys is None:
        return None
    same = starts is not None and keys is not None and starts.shape == keys.shape
    if same and starts is not keys and keys.device.type == "cpu" and not through_operator(keys):
        same = torch.equal(starts, keys)  # a GPU would be waited for
    if not same:
        raise ValueError("cu_seq_lens_k: expected the same as cu_seq_lens_q; a text attends to itself")
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q: describes one row of packed texts, but input_ids has {batch} rows")
    for name, value in others.items():
        if value is not None and value is not False:
            raise ValueError(f"{name}: not available for packed texts (cu_seq_lens_q)")
    return PackedTexts(starts, given.get("max_length_q"))


def packed_mask(position_ids: Tensor) -> Tensor | None:
    """Which tokens of a row belong to one text, ``(B, 1, S, S)`` bool, for positions ``(B, S)``; None if all do.

    A text begins where a position is not the one before it plus one.
    """
    begins = position_ids.diff(dim=1) != 1
    if not torch.compiler.is_compiling() and not bool(begins.any()):
        return None
    text = torch.nn.functional.pad(begins.cumsum(1), (1, 0))
    return text[:, None, :, None] == text[:, None, None, :]
