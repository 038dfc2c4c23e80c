"""What ``generate`` is given, checked and completed: prompts, masks, the length limit, the special tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.generation_config import GenerationConfig

DEFAULT_NEW_TOKENS = 20  # as in transformers


def check_ids(name: str, ids: Any, device: torch.device) -> Tensor:
    """Token ids ``(B, S)`` as int64, or an error that calls them ``name``."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected an int64 tensor, got {getattr(ids, 'dtype', type(ids).__name__)}")
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"{name}: shape {tuple(ids.shape)} is not (B, S) with S >= 1")
    if ids.device != device:
        raise ValueError(f"{name}: is on {ids.device}, but the model is on {device}")
    return ids.long()


@dataclass
class Inputs:
    """What the model reads before it writes: ids and mask ``(B, S)``, the latter None where nothing is padded."""

    batch: int
    ids: Tensor | None  # None where the encoder's output is given instead
    attention_mask: Tensor | None
    has_encoder: bool


def inputs_for(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    encoder_outputs: Any,
    config: GenerationConfig,
    end_tokens: Sequence[int],
) -> Inputs:
    """The inputs, checked."""
    has_encoder = bool(getattr(model.config, "is_encoder_decoder", False))
    if input_ids is None and encoder_outputs is not None:
        hidden = encoder_outputs[0]
        if attention_mask is not None and attention_mask.shape != hidden.shape[:2]:
            raise ValueError(
                f"attention_mask: shape {tuple(attention_mask.shape)} is not encoder_outputs' {tuple(hidden.shape[:2])}"
            )
        mask = None if attention_mask is None else (attention_mask != 0).long()
        return Inputs(len(hidden), None, mask, has_encoder)
    if input_ids is None:
        input_ids = first_token(model, config.bos_token_id)
    input_ids = check_ids("input_ids", input_ids, model.device)
    mask = attention_mask_for(input_ids, attention_mask, config.pad_token_id, end_tokens)
    return Inputs(len(input_ids), input_ids, mask, has_encoder)


def contents(*texts: tuple[Tensor | None, Tensor | None]) -> list[list[int]]:
    """The tokens of each row of the texts, (ids, mask) each, without padding."""
    rows: list[list[int]] = []
    for ids, mask in texts:
        if ids is None:
            continue
        kept = (ids if mask is None else ids.masked_fill(mask == 0, -1)).tolist()
        parts = [[token for token in row if token >= 0] for row in kept]
        rows = [[*before, -1, *part] for before, part in zip(rows, parts)] if rows else parts
    return rows


def first_token(model: Any, bos_token_id: int | None) -> Tensor:
    """The prompt ``(1, 1)`` where none is given."""
    if bos_token_id is None:
        raise ValueError("input_ids: needed, as the configuration names no bos_token_id")
    return torch.tensor([[bos_token_id]], device=model.device)


def check_tokens(name: str, tokens: int | Sequence[int] | Tensor | None) -> list[int]:
    """One token or several as a list."""
    if tokens is None:
        return []
    if isinstance(tokens, Tensor):
        tokens = tokens.tolist()
    listed = [tokens] if isinstance(tokens, int) else list(tokens)
    if not all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in listed):
        raise ValueError(f"{name}: expected tokens, 0 or above, got {tokens!r}")
    return listed


def attention_mask_for(
    ids: Tensor,
    attention_mask: Tensor | None,
    pad_token_id: int | None,
    end_tokens: Sequence[int],
    name: str = "attention_mask",
) -> Tensor | None:
    """The mask ``(B, S)`` as int64, or None where nothing is padded.

    Without one, the padding token is taken for padding wherever it stands, unless it is an end token as well.
    """
    if attention_mask is None:
        if pad_token_id is None or pad_token_id in end_tokens:
            return None
        attention_mask = ids != pad_token_id
    elif attention_mask.shape != ids.shape:
        raise ValueError(f"{name}: shape {tuple(attention_mask.shape)} is not {tuple(ids.shape)}")
    mask = (attention_mask != 0).long()
    return None if bool(mask.all()) else mask


def check_left_padding(name: str, mask: Tensor | None) -> None:
    """Raises ValueError unless padding comes before all tokens and every row has one."""
    if mask is not None and (not bool(mask[:, -1].all()) or bool((mask[:, 1:] < mask[:, :-1]).any())):
        raise ValueError(f"{name}: padding after the first token of a prompt; pad prompts on the left only")


def decoder_prompts(
    model: Any,
    batch: int,
    start: int | None,
    decoder_input_ids: Tensor | None,
    decoder_attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """What the decoder of an encoder-decoder model begins from: ids ``(B, S)``, mask or None.

    That is ``start``, which is put before the ids that are given unless one of them begins with it.
    """
    if start is None:
        raise ValueError("decoder_start_token_id: needed, as the configuration names neither it nor bos_token_id")
    first = torch.full((batch, 1), start, device=model.device)
    if decoder_input_ids is None:
        return first, None
    ids = check_ids("decoder_input_ids", decoder_input_ids, model.device)
    if len(ids) != batch:
        raise ValueError(f"decoder_input_ids: {len(ids)} rows for {batch} inputs")
    mask = attention_mask_for(ids, decoder_attention_mask, None, (), "decoder_attention_mask")
    if bool((ids[:, 0] != start).all()):
        ids = torch.cat((first, ids), 1)
        mask = None if mask is None else torch.cat((torch.ones_like(first), mask), 1)
    return ids, mask


def length_limit(room: float, length: int, max_new_tokens: int | None, max_length: int | None) -> int:
    """Tokens of prompt and continuation together, at most ``room``, the positions that the model has."""
    if max_new_tokens is not None:
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: {max_new_tokens} is negative")
        name, limit = "max_new_tokens", length + max_new_tokens
    elif max_length is not None:
        if max_length < length:
            raise ValueError(f"max_length: {max_length} is less than the prompt's {length} tokens")
        name, limit = "max_length", max_length
    else:
        name, limit = "input_ids", int(max(length, min(length + DEFAULT_NEW_TOKENS, room)))
    if limit > room:
        raise ValueError(f"{name}: {limit} tokens in all, the model has {room} positions")
    return limit


def positions_of(model: Any) -> float:
    """How many positions the model has; infinity where its positions are relative, rotary ones among them."""
    if getattr(model.config, "rope_parameters", None):
        return math.inf
    return getattr(model.config, "max_position_embeddings", None) or math.inf
