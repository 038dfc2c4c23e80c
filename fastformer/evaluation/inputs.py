"""What every evaluation checks and converts before a model runs."""

from __future__ import annotations

from typing import Any

from ..data.tokenizers import SubwordTokenizer


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Ids of ``text`` by a tokenizer of this package, of ``tokenizers`` or of ``transformers``."""
    if isinstance(tokenizer, SubwordTokenizer) or hasattr(tokenizer, "save_pretrained"):
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    ids = tokenizer.encode(text)  # one that knows no special tokens, or tokenizers' own
    return list(ids) if isinstance(ids, list) else tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def check_tokenizer(model: Any, tokenizer: Any) -> None:
    """Raises ValueError where the vocabularies of model and tokenizer cannot belong together.

    A model may have a few rows more than there are tokens, to round its table up.
    """
    rows = getattr(model.config, "vocab_size", None)
    size = getattr(tokenizer, "vocab_size", None)
    if callable(getattr(tokenizer, "get_vocab_size", None)):
        size = tokenizer.get_vocab_size()
    elif hasattr(tokenizer, "__len__"):
        size = len(tokenizer)  # transformers' vocab_size leaves out added tokens
    if rows is None or size is None or (size <= rows and rows - size < max(1024, rows // 10)):
        return
    raise ValueError(
        f"tokenizer: has {size} tokens, but the model's table has {rows} (vocab_size); it is another model's tokenizer"
    )


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
        raise ValueError(f"context: got {context}, expected 1 to the model's {available} positions")
    return context
