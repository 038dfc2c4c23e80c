"""The configuration of a Llama, in the spellings of every version of ``transformers``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar

from ..nn.rotary_scaling import scaling_type, unknown_keys
from .activations import FUSED_ACTIVATIONS
from .labels import LabelledDecoderConfig


@dataclass
class LlamaConfig(LabelledDecoderConfig):
    """The fields, defaults and config.json of ``transformers.LlamaConfig``; other entries are kept in ``extra``.

    ``rope_parameters`` has ``rope_theta``, ``rope_type`` ("default", "linear", "dynamic", "yarn", "llama3", "longrope"
    or "proportional") and what that type needs; ``rope_theta`` and ``rope_scaling``, the names of older versions, are
    taken too and go into it. ``num_key_value_heads=None`` is one per query head, ``head_dim=None`` is hidden_size /
    num_attention_heads. ``pretraining_tp`` changes no result.
    """

    model_type: ClassVar[str] = "llama"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float | None = 0.0
    mlp_bias: bool = False
    head_dim: int | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False)
    rope_theta: InitVar[float | None] = None
    rope_scaling: InitVar[dict[str, Any] | None] = None

    def __post_init__(self, rope_theta: float | None, rope_scaling: dict[str, Any] | None) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "max_position_embeddings"):
            self._positive(name)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} does not divide hidden_size {self.hidden_size}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide num_attention_heads"
                f" {self.num_attention_heads}"
            )
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._positive("head_dim")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} is odd; rotary positions turn pairs")
        if not 0 <= (self.attention_dropout or 0) <= 1:
            raise ValueError(f"attention_dropout: {self.attention_dropout} is not in [0, 1]")
        if self.hidden_act not in FUSED_ACTIVATIONS:
            raise ValueError(f"hidden_act: {self.hidden_act!r} is not one of {', '.join(sorted(FUSED_ACTIVATIONS))}")
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id: {self.pad_token_id} is not in a vocabulary of {self.vocab_size}")
        self._name_labels()
        self._set_rope(_merged(self.rope_parameters, rope_scaling, rope_theta))

    def _positive(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {value!r} is not a positive integer")

    def _set_rope(self, parameters: dict[str, Any]) -> None:
        parameters.setdefault("rope_theta", 10000.0)
        kind = parameters.setdefault("rope_type", parameters.get("type", "default"))
        if kind in ("llama3", "yarn", "longrope"):
            parameters.setdefault("original_max_position_embeddings", self.max_position_embeddings)
            trained = self.extra.get("original_max_position_embeddings")
            if trained is not None:
                parameters["original_max_position_embeddings"] = trained
        self.rope_parameters = parameters
        if not isinstance(parameters["rope_theta"], int | float) or parameters["rope_theta"] <= 0:
            raise ValueError(f"rope_parameters: rope_theta {parameters['rope_theta']!r} is not a positive number")
        if kind not in ("default", "proportional") and parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"rope_parameters: {kind!r} with a partial_rotary_factor is not available in a Llama")
        try:
            scaling_type(self.rotary_scaling)
        except ValueError as error:
            raise ValueError(str(error).replace("scaling", "rope_parameters", 1)) from None
        unused = set(parameters) - set(self.rotary_scaling)
        if unused:
            warnings.warn(
                f"fastformer: rope_parameters of type {kind!r} have no use for {', '.join(sorted(unused))}",
                stacklevel=4,
            )

    @property
    def rotary_scaling(self) -> dict[str, Any]:
        """What :class:`fastformer.nn.RotaryEmbedding` takes as ``scaling``."""
        parameters = self.rope_parameters or {}
        try:
            unused = unknown_keys(parameters)
        except KeyError:  # a type there is not, which scaling_type names
            unused = []
        return {k: v for k, v in parameters.items() if k not in unused}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LlamaConfig:
        """A configuration from the contents of a config.json, of ``transformers`` 5 or older."""
        values = dict(values)
        theta, scaling = values.pop("rope_theta", None), values.pop("rope_scaling", None)
        values["rope_parameters"] = _merged(values.get("rope_parameters"), scaling, theta)
        return super().from_dict(values)


# Defaults of arguments, not of attributes: transformers' configurations have none of these names either.
del LlamaConfig.rope_theta, LlamaConfig.rope_scaling


def _merged(parameters: Mapping[str, Any] | None, scaling: Mapping[str, Any] | None, theta: float | None) -> dict:
    """``rope_parameters`` from themselves, else from the ``rope_scaling`` and ``rope_theta`` of older versions."""
    for name, given in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(f"{name}: expected a mapping, got {type(given).__name__}")
    merged = dict(scaling or parameters or {})
    if theta is not None:
        merged.setdefault("rope_theta", theta)
    return merged
