"""What every evaluation checks and converts before a model runs."""

from __future__ import annotations

from typing import Any


def check_causal(model: Any) -> None:
    """Raises ValueError for a model that does not predict the next token."""
    config = model.config
    one_way = getattr(config, "model_type", "") != "bert" or getattr(config, "is_decoder", False)
    if getattr(config, "is_encoder_decoder", False) or not one_way or model.get_output_embeddings() is None:
        raise ValueError(
            f"model: {type(model).__name__} does not predict the next token; expected a causal language model such as "
            "GPT2LMHeadModel or LlamaForCausalLM"
        )


def context_of(model: Any, context: int | None) -> int:
    """``context`` if the model has so many positions, else ValueError; None takes all."""
    available = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        if available is None:
            raise ValueError(
                "context: the model's configuration has no max_position_embeddings; give the tokens to use"
            )
        return int(available)
    if context < 1 or (available is not None and context > available):
        accepted = "1 or more" if available is None else f"1 to the model's {available} positions"
        raise ValueError(f"context: got {context}, expected {accepted}")
    return context
