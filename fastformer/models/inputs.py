"""Checks that all models share, before anything runs."""

from __future__ import annotations

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


def packed_mask(position_ids: Tensor) -> Tensor | None:
    """Which tokens of a row belong to one text, ``(B, 1, S, S)`` bool, for positions ``(B, S)``; None if all do.

    A text begins where a position is not the one before it plus one.
    """
    begins = position_ids.diff(dim=1) != 1
    if not torch.compiler.is_compiling() and not bool(begins.any()):
        return None
    text = torch.nn.functional.pad(begins.cumsum(1), (1, 0))
    return text[:, None, :, None] == text[:, None, None, :]
