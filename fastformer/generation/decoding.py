"""The generation loop: prompt in, tokens out, one decoder step per token.

Everything that does not change from token to token (checks, masks, buffers, the choice of decoder) happens before the
loop. On a GPU the question whether all sequences have ended is asked every few tokens only, since the answer costs a
synchronisation; surplus columns are cut off at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from .decoder import decoder_for
from .sampling import check_sampling, sample

DEFAULT_NEW_TOKENS = 20  # as in transformers
STEPS_BETWEEN_CHECKS = {"cpu": 1}
STEPS_BETWEEN_CHECKS_ELSEWHERE = 16


class Streamer(Protocol):
    """Receives tokens as they are made; the streamers of ``transformers`` fit."""

    def put(self, value: Tensor) -> None:
        """First the prompts ``(B, S)``, then each step's tokens ``(B)``, on the CPU."""
        ...

    def end(self) -> None:
        """No more tokens follow."""
        ...


def generate(
    model: Any,
    input_ids: Tensor | None = None,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float | None = 1.0,
    num_return_sequences: int = 1,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    attention_mask: Tensor | None = None,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    streamer: Streamer | None = None,
) -> Tensor:
    """Continues each prompt until its end token or the length limit. Argument names and defaults are Hugging Face's.

    A model in training mode is put into evaluation mode for the call.

    Args:
        model: a causal language model such as :class:`fastformer.models.GPT2LMHeadModel`.
        input_ids: prompts ``(B, S)`` int64, shorter ones padded on the left; default one beginning-of-text token.
        max_new_tokens: how many tokens to add at most; default 20, or what ``max_length`` leaves.
        max_length: limit of prompt and new tokens together; max_new_tokens goes first where both are given.
        do_sample: draw from the distribution; False takes the likeliest token.
        temperature, top_k, top_p: shape the distribution, see :func:`sample`. Used with ``do_sample`` only.
        num_return_sequences: continuations per prompt, next to each other in the result; needs ``do_sample``.
        eos_token_id: token or tokens that end a text; default the configuration's, ``[]`` for none.
        pad_token_id: fills a text that ended before the others; default the configuration's, else the end token.
        attention_mask: ``(B, S)``, 0 at left padding. Default: all 1, or 0 where ``input_ids`` is the padding token, if
            that is not also an end token.
        use_cache: keep keys and values; False computes the whole text for every token, for comparison.
        generator, seed: randomness of ``do_sample``: a generator on the model's device, or a seed for one.
        streamer: receives the tokens as they are made; one prompt only for the streamers of ``transformers``.

    Returns:
        ``(B * num_return_sequences, S + new)`` int64: the prompts and their continuations.

    Raises:
        ValueError, TypeError: an argument that does not fit, or more positions than the model has; named.
    """
    input_ids = _prompts(model, input_ids)
    batch, length = input_ids.shape
    limit = _limit(model, length, max_new_tokens, max_length)
    end_tokens = _end_tokens(model, eos_token_id)
    if pad_token_id is None:
        pad_token_id = model.config.pad_token_id
    attention_mask = _mask(input_ids, attention_mask, pad_token_id, end_tokens)
    if pad_token_id is None:
        pad_token_id = end_tokens[0] if end_tokens else 0
    if do_sample:
        check_sampling(temperature, top_k, top_p)
    if num_return_sequences != 1:
        if num_return_sequences < 1 or not do_sample:
            raise ValueError(f"num_return_sequences: {num_return_sequences}; more than one needs do_sample=True")
        input_ids = input_ids.repeat_interleave(num_return_sequences, 0)
        attention_mask = None if attention_mask is None else attention_mask.repeat_interleave(num_return_sequences, 0)
        batch = len(input_ids)
    if seed is not None:
        if generator is not None:
            raise ValueError("seed: give either seed or generator, not both")
        generator = torch.Generator(input_ids.device).manual_seed(seed)

    tokens = input_ids.new_full((batch, limit), pad_token_id)
    tokens[:, :length] = input_ids
    if streamer is not None:
        streamer.put(input_ids.cpu())
    check_every = STEPS_BETWEEN_CHECKS.get(input_ids.device.type, STEPS_BETWEEN_CHECKS_ELSEWHERE)
    with torch.inference_mode(), _evaluating(model):
        ends = torch.tensor(end_tokens, device=input_ids.device)
        ended = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        decoder = decoder_for(model, batch, limit, use_cache) if limit > length else None
        for position in range(length, limit):
            assert decoder is not None
            if position == length:
                logits = decoder.prefill(input_ids, attention_mask)
            else:
                logits = decoder.step(token)  # noqa: F821 - bound in the first round
            if do_sample:
                token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            else:
                token = logits.argmax(1)
            if end_tokens:
                token = torch.where(ended, pad_token_id, token)
                ended |= token == ends if len(end_tokens) == 1 else torch.isin(token, ends)
            tokens[:, position] = token
            if streamer is not None:
                streamer.put(token.cpu())
            if end_tokens and (position - length) % check_every == 0 and bool(ended.all()):
                break
    if streamer is not None:
        streamer.end()
    return tokens[:, : length + _longest(tokens[:, length:], end_tokens)] if end_tokens else tokens


def _prompts(model: Any, input_ids: Tensor | None) -> Tensor:
    if input_ids is None:
        start = model.config.bos_token_id
        if start is None:
            raise ValueError("input_ids: needed, as the configuration names no bos_token_id")
        return torch.tensor([[start]], device=model.device)
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        given = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise TypeError(f"input_ids: expected an int64 tensor, got {given}")
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids: shape {tuple(input_ids.shape)} is not (B, S) with S >= 1")
    if input_ids.device != model.device:
        raise ValueError(f"input_ids: is on {input_ids.device}, but the model is on {model.device}")
    return input_ids.long()


def _limit(model: Any, length: int, max_new_tokens: int | None, max_length: int | None) -> int:
    room = model.config.max_position_embeddings
    if max_new_tokens is not None:
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: {max_new_tokens} is negative")
        name, limit = "max_new_tokens", length + max_new_tokens
    elif max_length is not None:
        if max_length < length:
            raise ValueError(f"max_length: {max_length} is less than the prompt's {length} tokens")
        name, limit = "max_length", max_length
    else:
        name, limit = "input_ids", max(length, min(length + DEFAULT_NEW_TOKENS, room))
    if limit > room:
        raise ValueError(f"{name}: {limit} tokens in all, the model has {room} positions")
    return limit


def _end_tokens(model: Any, eos_token_id: int | Sequence[int] | None) -> list[int]:
    if eos_token_id is None:
        eos_token_id = model.config.eos_token_id
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def _mask(
    input_ids: Tensor, attention_mask: Tensor | None, pad_token_id: int | None, end_tokens: list[int]
) -> Tensor | None:
    """The mask as int64, or None where nothing is padded."""
    if attention_mask is None:
        if pad_token_id is None or pad_token_id in end_tokens:
            return None
        attention_mask = input_ids != pad_token_id
    elif attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: shape {tuple(attention_mask.shape)} is not {tuple(input_ids.shape)}")
    mask = (attention_mask != 0).long()
    if bool(mask.all()):
        return None
    if not bool(mask[:, -1].all()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("attention_mask: padding after the first token of a prompt; pad prompts on the left only")
    return mask


def _longest(new: Tensor, end_tokens: list[int]) -> int:
    """Columns up to and including the end token of the text that ended last."""
    if new.shape[1] == 0:
        return 0
    is_end = torch.isin(new, torch.tensor(end_tokens, device=new.device))
    first = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, new.shape[1])
    return int(first.max())


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
