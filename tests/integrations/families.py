"""Small random models of transformers, and a float64 twin that says what is exact."""

from __future__ import annotations

import copy
import types

import torch
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB = 61
_DECODER = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
_DECODER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40}
_ENCODER = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
_T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4}
_T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}
_GPT2 = {"vocab_size": VOCAB, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
_BERT = {**_ENCODER, "vocab_size": VOCAB, "max_position_embeddings": 40}
_SEQ2SEQ = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 56}
_SEQ2SEQ |= {"decoder_ffn_dim": 56, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 1}
_SEQ2SEQ |= {"bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "max_position_embeddings": 40}

# name -> model class, configuration, and types of module that are expected to be swapped
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", {**_GPT2, **_TOKENS}, {"GPT2Block", "GPT2MLP", "LayerNorm", "Embedding"}),
    "bert": ("BertForMaskedLM", _BERT, {"BertLayer", "BertEmbeddings", "BertOutput", "BertSelfOutput", "LayerNorm"}),
    "t5": ("T5ForConditionalGeneration", _T5, {"T5LayerFF", "T5DenseActDense", "T5LayerNorm"}),
    "t5 gated": (
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"T5LayerFF", "T5DenseGatedActDense", "T5LayerNorm"},
    ),
    "llama": (
        "LlamaForCausalLM",
        {**_DECODER, **_TOKENS, "attention_bias": True, "mlp_bias": True},
        {"LlamaDecoderLayer", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm", "SiLUActivation"},
    ),
    "qwen2": ("Qwen2ForCausalLM", {**_DECODER, **_TOKENS}, {"Qwen2DecoderLayer", "Qwen2Attention", "Qwen2MLP"}),
    "gemma": ("GemmaForCausalLM", {**_DECODER, **_TOKENS, "head_dim": 8}, {"GemmaRMSNorm", "GemmaAttention"}),
    "phi3": (
        "Phi3ForCausalLM",
        {**_DECODER, **_TOKENS, "pad_token_id": 0},
        {"Phi3DecoderLayer", "Phi3MLP", "Phi3Attention"},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {**_DECODER, **_TOKENS, "rotary_pct": 0.5},
        {"GPTNeoXAttention", "GPTNeoXMLP"},
    ),
    "roberta": (
        "RobertaForMaskedLM",
        {**_BERT, "pad_token_id": 1, "type_vocab_size": 2},
        {"RobertaEmbeddings", "RobertaLayer", "RobertaOutput", "RobertaSelfOutput"},
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 56, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40},
        {"TransformerBlock", "FFN"},
    ),
    "bart": ("BartForConditionalGeneration", _SEQ2SEQ, {"BartEncoderLayer", "BartDecoderLayer"}),
    "mbart": ("MBartForConditionalGeneration", _SEQ2SEQ, {"MBartEncoderLayer", "MBartDecoderLayer"}),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 40},
        {"WhisperEncoderLayer", "WhisperDecoderLayer"},
    ),
    "vit": ("ViTForImageClassification", {**_ENCODER, "image_size": 8, "patch_size": 2}, {"ViTLayer", "ViTMLP"}),
    "clip": (
        "CLIPVisionModel",
        {**_ENCODER, "image_size": 8, "patch_size": 2, "hidden_act": "gelu"},
        {"CLIPEncoderLayer", "CLIPMLP"},
    ),
}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob")
_DROPOUTS += ("dropout_rate", "attention_dropout", "hidden_dropout", "dropout")
_DROPOUTS += ("activation_dropout",)


def make(family: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> torch.nn.Module:
    name, fields, _ = FAMILIES[family]
    cls = getattr(transformers, name)
    config = cls.config_class(**fields)
    for field in _DROPOUTS:
        if hasattr(config, field):
            setattr(config, field, dropout)
    torch.manual_seed(0)
    model = cls(config)
    for p in model.parameters():  # biases and norms start at 0 and 1, where an error in them would not show
        p.data.add_(0.1 * torch.randn_like(p))
    return model.to(dtype).eval()


def batch_of(family: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if family in ("vit", "clip"):
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator).to(dtype)}
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 16, generator=generator).to(dtype), "decoder_input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    more = {"decoder_input_ids": ids[:, :5]} if family in ("t5", "t5 gated", "bart", "mbart") else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def exact_of(model: torch.nn.Module) -> torch.nn.Module:
    """A float64 copy. transformers' RMS norms compute in float32 whatever they are given; these do not."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm") or kind == "T5LayerNorm":
            module.forward = types.MethodType(_rms_norm, module)
    return exact


def _rms_norm(self, x):
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    weight = self.weight + 1 if type(self).__name__ == "GemmaRMSNorm" else self.weight
    return torch.nn.functional.rms_norm(x, self.weight.shape, weight, eps)


def run(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first output and the gradient of every parameter."""
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    out = model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()})
    out = out.logits if "logits" in out else out.last_hidden_state
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    out.backward(upstream.to(out.dtype))
    found = {"output": out.detach()}
    return found | {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
