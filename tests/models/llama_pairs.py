"""Random Llamas of transformers, and ours with the same weights."""

import copy

import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastformer.models import LlamaForCausalLM
from tests.models.parity import randomised, twin_of

VOCAB = 97
LENGTH = 17
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 3.0, 4.0]}

# name -> fields that differ from a small Llama
CONFIGS = {
    "grouped heads": {},
    "one key head, untied": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "as many key heads": {"num_key_value_heads": None, "num_hidden_layers": 1},
    "wide heads": {"head_dim": 20},  # 80 in all, of a width of 48
    "odd sizes": {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 61},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "gelu": {"hidden_act": "gelu"},
    "gelu_new, other epsilon": {"hidden_act": "gelu_new", "rms_norm_eps": 1e-2},
    "relu": {"hidden_act": "relu"},
    "padding token": {"pad_token_id": 5},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 11},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}},
    "llama3": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 10}},
    "longrope, long": {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 10}, "head_dim": 8},
    "longrope, short": {"rope_parameters": LONGROPE, "head_dim": 8},
    "proportional": {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}},
}


class ExactNorm(LlamaRMSNorm):
    """transformers takes the mean square in float32 whatever the model; in float64 this is exact."""

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


def fields(**changes):
    small = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return {**small, "tie_word_embeddings": True, **changes}


def theirs_of(dtype=torch.float32, cls=transformers.LlamaForCausalLM, **changes):
    torch.manual_seed(0)
    theirs = cls(transformers.LlamaConfig(**fields(**copy.deepcopy(changes))))
    for module in theirs.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = ExactNorm
    return randomised(theirs).to(dtype)


def ours_of(theirs):
    return twin_of(theirs, LlamaForCausalLM)


def ids(batch=3, length=LENGTH):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
