"""Models with the class names, parameters, arguments and outputs of ``transformers``, on fused layers.

Names load on first use, so ``import fastformer.models`` costs nothing for the models not needed.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .bert import BertConfig, BertModel
    from .bert_heads import (
        BertForMaskedLM,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
    )
    from .cache import EncoderDecoderCache, KVCache
    from .decoder_heads import (
        GPT2ForSequenceClassification,
        GPT2ForTokenClassification,
        LlamaForSequenceClassification,
        LlamaForTokenClassification,
    )
    from .gan import TransformerGAN, TransformerGANConfig
    from .generation_config import GenerationConfig
    from .gpt2 import GPT2Config, GPT2LMHeadModel, GPT2Model
    from .image_gpt import ImageGPT, ImageGPTConfig
    from .llama import LlamaConfig, LlamaForCausalLM, LlamaModel
    from .pretrained import PreTrainedConfig, PreTrainedModel
    from .t5 import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Model
    from .vae import TransformerVAE, TransformerVAEConfig
    from .vae_text import TransformerTextVAE, TransformerTextVAEConfig

# Where each public name lives.
_MODULES = {
    "BertConfig": "bert",
    "BertForMaskedLM": "bert_heads",
    "BertForQuestionAnswering": "bert_heads",
    "BertForSequenceClassification": "bert_heads",
    "BertForTokenClassification": "bert_heads",
    "BertModel": "bert",
    "EncoderDecoderCache": "cache",
    "GPT2Config": "gpt2",
    "GPT2ForSequenceClassification": "decoder_heads",
    "GPT2ForTokenClassification": "decoder_heads",
    "GPT2LMHeadModel": "gpt2",
    "GPT2Model": "gpt2",
    "GenerationConfig": "generation_config",
    "ImageGPT": "image_gpt",
    "ImageGPTConfig": "image_gpt",
    "KVCache": "cache",
    "LlamaConfig": "llama",
    "LlamaForCausalLM": "llama",
    "LlamaForSequenceClassification": "decoder_heads",
    "LlamaForTokenClassification": "decoder_heads",
    "LlamaModel": "llama",
    "PreTrainedConfig": "pretrained",
    "PreTrainedModel": "pretrained",
    "T5Config": "t5",
    "T5EncoderModel": "t5",
    "T5ForConditionalGeneration": "t5",
    "T5Model": "t5",
    "TransformerGAN": "gan",
    "TransformerGANConfig": "gan",
    "TransformerTextVAE": "vae_text",
    "TransformerTextVAEConfig": "vae_text",
    "TransformerVAE": "vae",
    "TransformerVAEConfig": "vae",
}
_ARCHITECTURES = (
    "BertForMaskedLM",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "ImageGPT",
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaModel",
    "T5EncoderModel",
    "T5ForConditionalGeneration",
    "T5Model",
    "TransformerGAN",
    "TransformerTextVAE",
    "TransformerVAE",
)
# config.json's model_type -> the class for a checkpoint that names no architecture.
_DEFAULTS = {
    "bert": "BertModel",
    "fastformer_image_gpt": "ImageGPT",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "transformer_gan": "TransformerGAN",
    "transformer_text_vae": "TransformerTextVAE",
    "transformer_vae": "TransformerVAE",
}

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "EncoderDecoderCache",
    "GPT2Config",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "GenerationConfig",
    "ImageGPT",
    "ImageGPTConfig",
    "KVCache",
    "LlamaConfig",
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaModel",
    "PreTrainedConfig",
    "PreTrainedModel",
    "T5Config",
    "T5EncoderModel",
    "T5ForConditionalGeneration",
    "T5Model",
    "TransformerGAN",
    "TransformerGANConfig",
    "TransformerTextVAE",
    "TransformerTextVAEConfig",
    "TransformerVAE",
    "TransformerVAEConfig",
    "from_pretrained",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **config: Any,
) -> PreTrainedModel:
    """Loads a Hugging Face model directory; config.json's ``architectures``, else ``model_type``, picks the class.

    Arguments and errors as in :meth:`PreTrainedModel.from_pretrained`.

    Raises:
        ValueError: a model this library does not have.
    """
    from .pretrained import read_config, resolve

    directory = resolve(path)
    values = read_config(directory)
    named = [a for a in values.get("architectures") or () if a in _ARCHITECTURES]
    name = named[0] if named else _DEFAULTS.get(values.get("model_type", ""))
    if name is None:
        raise ValueError(
            f"path: {directory} holds {values.get('architectures') or values.get('model_type')!r}; available are "
            + ", ".join(_ARCHITECTURES)
        )
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name).from_pretrained(
        directory, dtype=dtype, device=device, **config
    )
