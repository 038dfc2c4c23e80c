"""``generate``: options and prompts are checked and completed, a decoder is chosen, and a search runs on it.

Everything that does not change from token to token (checks, masks, the choice of decoder and of processors) happens
here, before the loops of :class:`TokenByToken` and :class:`BeamSearch`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..models.generation_config import DEFAULTS, GenerationConfig
from . import prompts as given
from .beam import BeamSearch
from .decoder import decoder_for, encode
from .outputs import GenerateOutput
from .processors import Processor, Warp, processors_for
from .sampling import Sampler, SeededNoise, generator_noise, prompt_keys
from .stopping import Criterion, Stopping, check_stop_strings
from .token_by_token import Streamer, TokenByToken

# How often to ask whether all texts have ended: on a GPU the answer costs a synchronisation.
STEPS_BETWEEN_CHECKS = {"cpu": 1}
STEPS_BETWEEN_CHECKS_ELSEWHERE = 16


def generate(
    model: Any,
    input_ids: Tensor | None = None,
    *,
    inputs: Tensor | None = None,
    attention_mask: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    encoder_outputs: Any = None,
    generation_config: GenerationConfig | None = None,
    past_key_values: Any = None,
    logits_processor: Sequence[Processor] | None = None,
    stopping_criteria: Sequence[Criterion] | None = None,
    tokenizer: Any = None,
    streamer: Streamer | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    **options: Any,
) -> Tensor | GenerateOutput:
    """Continues each prompt until its end token or the length limit. Argument names and defaults are Hugging Face's.

    An encoder-decoder model answers each input: its encoder reads ``input_ids`` once, and its decoder begins from
    ``decoder_start_token_id``.

    Greedy and beam search give the tokens that ``transformers`` gives. A prompt gets the same text alone and in any
    batch, but for rounding; with ``do_sample`` that holds for a ``seed``. A model in training mode is put into
    evaluation mode for the call.

    Args:
        model: a causal language model such as :class:`fastformer.models.GPT2LMHeadModel`, or an encoder-decoder model
            (``config.is_encoder_decoder``) such as T5.
        input_ids: prompts ``(B, S)`` int64, shorter ones padded on the left (on either side for an encoder); default
            one beginning-of-text token. ``inputs`` is another name for it.
        attention_mask: ``(B, S)``, 0 at padding. Default: all 1, or 0 where ``input_ids`` is the padding token, if that
            is not also an end token.
        decoder_input_ids, decoder_attention_mask: what the decoder begins from ``(B, S)``, with the start token put
            before it if no row begins with one; shorter ones padded on the left.
        encoder_outputs: the encoder's output for ``input_ids``, with ``last_hidden_state (B, S, E)`` as its first
            field, instead of running it.
        generation_config: options for this call, over those of ``model.generation_config``.
        past_key_values: a cache of the first tokens of ``input_ids``, to go on from; the new ones are added to it.
        logits_processor: called in turn with the tokens ``(rows, S)`` and scores ``(rows, V)`` float32 of each step,
            and return new scores; after the ones that the options ask for, before temperature, top_k, top_p and min_p.
        stopping_criteria: called with the tokens ``(rows, S)`` and the scores so far, and return which texts end, bool
            ``(rows)``.
        tokenizer: for ``stop_strings``; of ``transformers``, ``tokenizers``, or :mod:`fastformer.data`.
        streamer: receives the tokens as they are made, the prompts first. Not with beam search.
        generator: randomness of ``do_sample``, on the model's device; default torch's global one.
        seed: randomness of ``do_sample`` that is a function of the seed and the prompt, and for several continuations
            of one prompt of their number: the rest of the batch plays no part in it.
        options: the fields of :class:`fastformer.models.GenerationConfig`: ``max_new_tokens``, ``do_sample``,
            ``temperature``, ``num_beams`` and others. What is passed goes before every configuration; None is off.

    Returns:
        ``(B * num_return_sequences, S + new)`` int64: the prompts (the decoder's, in an encoder-decoder model) and
        their continuations; with ``return_dict_in_generate`` a :class:`GenerateOutput`.

    Raises:
        TypeError: an argument that does not exist, or of the wrong type; named.
        ValueError: an argument that does not fit, or more positions than the model has; named.
    """
    if inputs is not None:
        if input_ids is not None:
            raise ValueError("inputs: is input_ids; give one of them")
        input_ids = inputs
    config = _options(model, generation_config, options)
    _check(config, streamer, generator, seed)
    ends = given.check_tokens("eos_token_id", config.eos_token_id)
    strings = check_stop_strings(config.stop_strings, tokenizer)
    read = given.inputs_for(model, input_ids, attention_mask, encoder_outputs, config, ends)
    prompts, mask, name = read.ids, read.attention_mask, "attention_mask"
    if read.has_encoder:
        start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
        prompts, mask = given.decoder_prompts(model, read.batch, start, decoder_input_ids, decoder_attention_mask)
        name = "decoder_attention_mask"
    elif decoder_input_ids is not None or encoder_outputs is not None:
        raise ValueError(f"decoder_input_ids, encoder_outputs: {type(model).__name__} has no encoder")
    given.check_left_padding(name, mask)
    length = prompts.shape[1]
    limit = given.length_limit(given.positions_of(model), length, config.max_new_tokens, config.max_length)
    if past_key_values is not None and not past_key_values.get_seq_length() < length:
        cached = past_key_values.get_seq_length()
        raise ValueError(f"past_key_values: holds {cached} tokens, but the prompts have no more than {length}")

    beams = config.num_beams or 1
    repeats = beams if beams > 1 else config.num_return_sequences or 1
    device = prompts.device
    noise = sampler = None
    if config.do_sample:
        sampler = _sampler(config, ends)
        if seed is None:
            noise = generator_noise(generator)
        else:
            keys = prompt_keys(seed, given.contents((read.ids, read.attention_mask), (prompts, mask)), repeats)
            noise = SeededNoise(torch.tensor(keys, device=device))
    every_row = None if mask is None else mask.repeat_interleave(repeats, 0)
    processors = processors_for(config, length, ends, every_row, logits_processor)
    stopping = Stopping(ends, strings, tokenizer, stopping_criteria, device)
    as_output = bool(config.return_dict_in_generate)
    keep_scores, keep_logits = (as_output and bool(keep) for keep in (config.output_scores, config.output_logits))
    pad_token = config.pad_token_id if config.pad_token_id is not None else ends[0] if ends else 0
    check_every = STEPS_BETWEEN_CHECKS.get(device.type, STEPS_BETWEEN_CHECKS_ELSEWHERE)
    if stopping.looks_back:  # at every step, on the CPU
        check_every = 1

    # Tensors made in inference mode are of no use to autograd later, nor is a cache.
    leaves = as_output or past_key_values is not None
    with torch.no_grad() if leaves else torch.inference_mode(), evaluating(model):
        encoded = encode(model, read.ids, read.attention_mask, encoder_outputs) if read.has_encoder else None
        decoder = decoder_for(
            model, len(prompts) * repeats, limit, config.use_cache is not False, past_key_values, encoded
        )
        if beams > 1:
            search: BeamSearch | TokenByToken = BeamSearch(
                num_beams=beams,
                num_return_sequences=config.num_return_sequences or 1,
                length_penalty=DEFAULTS["length_penalty"] if config.length_penalty is None else config.length_penalty,
                early_stopping=config.early_stopping or False,
                processors=[*processors, Warp(sampler)] if sampler is not None else processors,
                stopping=stopping,
                noise=noise,
                # As in transformers, where a padding token 0 counts as none.
                fill_token=ends[0] if ends and not pad_token else pad_token,
                keep_scores=keep_scores,
                keep_logits=keep_logits,
                check_every=check_every,
            )
        else:
            search = TokenByToken(
                repeats=repeats,
                processors=processors,
                sampler=sampler,
                stopping=stopping,
                noise=noise,
                fill_token=pad_token,
                streamer=streamer,
                keep_scores=keep_scores,
                keep_logits=keep_logits,
                check_every=check_every,
            )
        output = search(decoder, prompts, mask, limit)
    if not as_output:
        return output.sequences.clone()
    output.past_key_values = getattr(decoder, "past_key_values", None)
    return output


def _options(model: Any, passed: Any, options: dict[str, Any]) -> GenerationConfig:
    """What holds for this call: its arguments over ``passed`` over the model's configuration over the defaults."""
    # A model whose generation_config nobody has touched follows its configuration, which may still change.
    own = getattr(model, "_generation_config", None) or GenerationConfig.from_model_config(model.config)
    passed = None if passed is None else GenerationConfig.of(passed)
    for config in (passed, own):
        unavailable = config.unavailable() if config is not None else {}
        if unavailable:
            listed = ", ".join(f"{name}={value!r}" for name, value in unavailable.items())
            warnings.warn(f"generation_config: has no effect here: {listed}", UserWarning, stacklevel=4)
    return GenerationConfig.merged(options, passed, own)


def _check(config: GenerationConfig, streamer: Any, generator: Any, seed: int | None) -> None:
    """Raises ValueError, naming the option, where one is out of range or does not go with another."""
    beams, several = config.num_beams, config.num_return_sequences
    for name, least in (("num_beams", 1), ("num_return_sequences", 1), ("no_repeat_ngram_size", 0)):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{name}: {value!r} is not an integer of at least {least}")
    for name in ("min_length", "min_new_tokens"):
        if (getattr(config, name) or 0) < 0:
            raise ValueError(f"{name}: {getattr(config, name)} is negative")
    if config.repetition_penalty is not None and not config.repetition_penalty > 0:
        raise ValueError(f"repetition_penalty: {config.repetition_penalty} is not positive")
    if config.early_stopping not in (None, True, False, "never"):
        raise ValueError(f"early_stopping: {config.early_stopping!r} is not True, False or 'never'")
    if several is not None and several > 1:
        if (beams or 1) == 1 and not config.do_sample:
            raise ValueError(f"num_return_sequences: {several}; more than one needs do_sample=True or num_beams")
        if beams is not None and 1 < beams < several:
            raise ValueError(f"num_return_sequences: {several} is more than num_beams, {beams}")
    if beams is not None and beams > 1 and streamer is not None:
        raise ValueError("streamer: beam search changes its mind about tokens; use num_beams=1")
    if seed is not None and generator is not None:
        raise ValueError("seed: give either seed or generator, not both")
    if seed is not None and not isinstance(seed, int):
        raise TypeError(f"seed: expected an integer, got {type(seed).__name__}")


def _sampler(config: GenerationConfig, ends: Sequence[int]) -> Sampler:
    # With beams, something has to be left that does not end the text.
    min_tokens = 1 if (config.num_beams or 1) == 1 else max(2, 1 + len(ends))
    return Sampler(config.temperature, config.top_k, config.top_p, config.min_p, min_tokens)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Every module in evaluation mode; those that were training are so again at the end."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
