"""Tiny random Hugging Face models of every kind of attention, and their exact results."""

from __future__ import annotations

import contextlib

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as TF

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB = 60
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB}
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40} | _TOKENS
_GROUPED = _SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 64}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0} | _TOKENS

# name -> (class, configuration, fields). Windows and chunks are shorter than the sequences of the tests.
DECODERS = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | _TOKENS),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),  # grouped heads
    "Qwen2, one layer with a window": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        _GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED | {"head_dim": 16}),  # head_dim is not hidden / heads
    "Mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED | {"sliding_window": 5}),
    "Gemma 2": (  # softcap, a scale of its own
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _GROUPED | {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 3},
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SMALL | {"max_position_embeddings": 64}),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 40}
        | {"max_position_embeddings": 64, "dropout": 0.0}
        | _TOKENS,
    ),
    "gpt-oss": (  # a sink per head
        "GptOssForCausalLM",
        "GptOssConfig",
        _GROUPED | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 5},
    ),
    "Llama 4": (  # chunks, a pattern that only a table expresses
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        _GROUPED
        | {
            "head_dim": 8,
            "attention_chunk_size": 4,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "intermediate_size_mlp": 40,
        },
    ),
}
OTHERS = {
    "BERT": ("BertForMaskedLM", "BertConfig", _SMALL | _NO_DROPOUT),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        {k: v for k, v in _SMALL.items() if k not in _TOKENS} | {"image_size": 12, "patch_size": 4} | _NO_DROPOUT,
    ),
    "T5": ("T5ForConditionalGeneration", "T5Config", _T5 | {"decoder_start_token_id": 0}),
    "T5, close buckets, gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5
        | {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 6, "decoder_start_token_id": 0}
        | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_source_positions": 8, "num_mel_bins": 6}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
        | {"dropout": 0.0, "decoder_start_token_id": 1, "max_target_positions": 64, "begin_suppress_tokens": None}
        | _TOKENS,
    ),
}
MODELS = DECODERS | OTHERS


def model_of(name: str, dtype: torch.dtype = torch.float64, **changes) -> nn.Module:
    """A model in evaluation whose attention is eager; biases, norms and sinks are not at 0 and 1."""
    cls, config, fields = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**{**fields, **changes})
    config._experts_implementation = "eager"
    model = getattr(transformers, cls)._from_config(config, attn_implementation="eager")
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.to(dtype).eval()


def tokens(batch: int = 3, length: int = 11, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side: str | None, batch: int = 3, length: int = 11) -> Tensor | None:
    """``(B, S)`` of 1 and 0: four tokens of the first sequence and one of the second are padding."""
    if side is None:
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    for row, n in enumerate((4, 1)):
        mask[row, slice(0, n) if side == "left" else slice(length - n, None)] = 0
    return mask


def inputs_of(name: str, side: str | None = None, dtype: torch.dtype = torch.float64) -> tuple[dict, Tensor]:
    """Arguments of a forward pass, and which positions of its logits are not padding."""
    g = torch.Generator().manual_seed(2)
    if name == "ViT":
        return {"pixel_values": torch.randn(3, 3, 12, 12, generator=g).to(dtype)}, torch.ones(3, dtype=torch.bool)
    if name == "Whisper":
        features = torch.randn(3, 6, 16, generator=g).to(dtype)
        mask = padding(side)
        real = torch.ones(3, 11, dtype=torch.bool) if mask is None else mask.bool()
        return {"input_features": features, "decoder_input_ids": tokens(), "decoder_attention_mask": mask}, real
    mask = padding(side)
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    if name.startswith("T5"):
        inputs |= {"decoder_input_ids": tokens(3, 7, seed=3), "decoder_attention_mask": padding(side, 3, 7)}
        mask = inputs["decoder_attention_mask"]
    length = 7 if name.startswith("T5") else 11
    return inputs, torch.ones(3, length, dtype=torch.bool) if mask is None else mask.bool()


def results(model: nn.Module, implementation: str, inputs: dict, real: Tensor) -> dict[str, Tensor]:
    """The logits of positions that are not padding, a loss of theirs, and the gradient of every parameter."""
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    model.zero_grad(set_to_none=True)
    logits = model(**inputs).logits[real]
    targets = torch.randint(logits.shape[-1], (len(logits),), generator=torch.Generator().manual_seed(4))
    loss = TF.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
    loss.backward()
    found = {"logits": logits.detach(), "loss": loss.detach()}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def exact_softmax():
    """transformers' eager attention computes its softmax in float32 whatever the model; here, float64 in float64."""
    softmax = TF.softmax

    def in_own_dtype(x, dim=None, _stacklevel=3, dtype=None):
        return softmax(x, dim, _stacklevel, None if x.dtype == torch.float64 else dtype)

    TF.softmax = in_own_dtype
    try:
        yield
    finally:
        TF.softmax = softmax
