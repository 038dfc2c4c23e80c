"""What ``generate`` does when not told otherwise: generation_config.json, beside a model's config.json.

A field that is None is unset. What a call of ``generate`` passes goes first, then the ``generation_config`` it passes,
then the model's, then :data:`DEFAULTS`; the names and defaults are those of ``transformers``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "generation_config.json"

# What an option is where nobody sets it.
DEFAULTS: dict[str, Any] = {
    "min_length": 0,
    "do_sample": False,
    "num_beams": 1,
    "early_stopping": False,
    "length_penalty": 1.0,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "use_cache": True,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
}

# Entries of such files that change the text, are not available here, and the values that make no difference.
UNAVAILABLE: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "constraints": (),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1, 1.0),
    "max_time": (),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "sequence_bias": (),
    "suppress_tokens": (),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1.0,),
    "watermarking_config": (),
}


@dataclass
class GenerationConfig:
    """Options of :func:`fastformer.generation.generate`; the entries of a file that are none of them go to ``extra``.

    Args:
        max_new_tokens: how many tokens to add at most. Default 20.
        max_length: limit of prompt and new tokens together (decoder tokens, in an encoder-decoder model);
            max_new_tokens goes first where both are set.
        min_new_tokens: no end token before so many new tokens.
        min_length: the same for prompt and new tokens together.
        do_sample: draw from the distribution; False takes the likeliest.
        temperature: divides the logits.
        top_k: draw among the k likeliest tokens; 0 for all.
        top_p: of those, among the likeliest whose probabilities add up to top_p.
        min_p: of those, among tokens at least min_p times as likely as the likeliest.
        repetition_penalty: divides the positive logits of tokens already in the text (prompt included) and multiplies
            the negative ones (Keskar et al. 2019, arXiv:1909.05858).
        no_repeat_ngram_size: no sequence of so many tokens twice in a text; 0 for off.
        num_beams: beam search with so many hypotheses a prompt; 1 for off.
        length_penalty: a finished hypothesis scores its log-probability / length ** length_penalty: above 0 favours
            long ones, below 0 short ones.
        early_stopping: True stops at num_beams finished hypotheses, False when a better one is unlikely, "never" when
            there cannot be one.
        num_return_sequences: continuations per prompt; with beams the best so many, else drawn.
        stop_strings: texts that end a continuation; needs ``tokenizer``.
        eos_token_id: token or tokens that end a text.
        pad_token_id: fills texts that ended before the others.
        bos_token_id: begins a text where no prompt is given.
        decoder_start_token_id: begins the decoder's text in an encoder-decoder model.
        use_cache: keep keys and values; False computes the whole text again for every token.
        return_dict_in_generate: return a :class:`fastformer.generation.GenerateOutput` instead of the tokens alone.
        output_scores: with it, also the processed scores of every step.
        output_logits: with it, also the model's logits of every step.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    num_return_sequences: int | None = None
    stop_strings: str | list[str] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    use_cache: bool | None = None
    return_dict_in_generate: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GenerationConfig:
        """From the contents of a generation_config.json; unknown entries are kept and written back."""
        known = {name: value for name, value in values.items() if name in OPTIONS}
        return cls(**known, extra={name: value for name, value in values.items() if name not in OPTIONS})

    @classmethod
    def of(cls, value: Any) -> GenerationConfig:
        """``value``, or the same options if it is a configuration of ``transformers``."""
        if isinstance(value, cls):
            return value
        if not hasattr(value, "to_dict"):
            raise TypeError(f"generation_config: expected a GenerationConfig, got {type(value).__name__}")
        return cls.from_dict({name: entry for name, entry in value.to_dict().items() if entry is not None})

    @classmethod
    def from_model_config(cls, config: Any) -> GenerationConfig:
        """The options among the entries of a model's configuration: its special tokens, and in old files more."""
        values = config.to_dict() if hasattr(config, "to_dict") else vars(config)
        return cls(**{name: values[name] for name in OPTIONS if values.get(name) is not None})

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> GenerationConfig:
        """Reads generation_config.json in the directory ``path``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a JSON object.
        """
        file = Path(path, FILE)
        if not file.is_file():
            raise FileNotFoundError(f"path: no {FILE} in {path}")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file}: expected an object, got {type(values).__name__}")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """The contents of generation_config.json: what is set."""
        own = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}
        return dict(sorted({**self.extra, **own}.items()))

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Writes generation_config.json into the directory ``path``."""
        Path(path).mkdir(parents=True, exist_ok=True)
        Path(path, FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def unavailable(self) -> dict[str, Any]:
        """The entries of ``extra`` that would change the text and have no effect here."""
        return {
            name: value
            for name, value in self.extra.items()
            if name in UNAVAILABLE and value is not None and value not in UNAVAILABLE[name]
        }

    @classmethod
    def merged(cls, options: dict[str, Any], *configs: GenerationConfig | None) -> GenerationConfig:
        """``options`` over the first configuration that sets a field, over :data:`DEFAULTS`.

        An option that is given as None is off, whatever the configurations say.

        Raises:
            TypeError: an option that does not exist; the message names it.
        """
        for name in options:
            if name not in OPTIONS:
                close = difflib.get_close_matches(name, OPTIONS, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise TypeError(f"{name}: generate has no such argument{hint}")
        values = dict(DEFAULTS)
        for config in reversed(configs):
            if config is not None:
                values |= {name: getattr(config, name) for name in OPTIONS if getattr(config, name) is not None}
        # A limit that is passed is meant, whatever form of it a file sets.
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if options.get(total) is not None:
                values.pop(new, None)
        return cls(**{**values, **options})


OPTIONS = tuple(f.name for f in dataclasses.fields(GenerationConfig) if f.name != "extra")
