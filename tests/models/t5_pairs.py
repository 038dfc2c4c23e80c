"""Random T5s of transformers, and ours with the same weights."""

import torch
import transformers
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fastformer.models import T5ForConditionalGeneration
from tests.models.parity import randomised, twin_of

VOCAB = 97

# name -> fields that differ from a small T5
CONFIGS = {
    "1.0": {},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "1.1, tied": {"feed_forward_proj": "gated-gelu"},
    "SwiGLU, untied": {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
    "no fused activation": {"feed_forward_proj": "tanh"},
    "no fused gate": {"feed_forward_proj": "gated-mish"},
    "decoder of another depth": {"num_layers": 1, "num_decoder_layers": 4},
    "odd sizes": {"d_model": 37, "d_kv": 7, "num_heads": 3, "d_ff": 61},  # rows that are no multiple of a vector
    "one head": {"num_heads": 1, "d_kv": 5},
    "many buckets": {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    "few buckets": {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 3},
    "other epsilon": {"layer_norm_epsilon": 1e-2},
}


class ExactNorm(T5LayerNorm):
    """transformers takes the mean square in float32 whatever the model; in float64 this is exact."""

    def forward(self, hidden_states):
        if hidden_states.dtype != torch.float64:
            return super().forward(hidden_states)
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def fields(**changes):
    small = {"vocab_size": VOCAB, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 3}
    small |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
    small |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
    return {**small, **changes}


def theirs_of(seed=0, dtype=torch.float32, cls=transformers.T5ForConditionalGeneration, **changes):
    """With an output embedding of its own for ``tie_word_embeddings=False``: transformers' constructor ties all."""
    torch.manual_seed(seed)
    theirs = cls(transformers.T5Config(**fields(attn_implementation="eager", **changes)))
    if changes.get("tie_word_embeddings") is False and hasattr(theirs, "lm_head"):
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(theirs.lm_head.weight.shape))
        theirs.config.tie_word_embeddings = False
    for module in theirs.modules():
        if isinstance(module, T5LayerNorm):
            module.__class__ = ExactNorm
    return randomised(theirs, seed).to(dtype)


def ours_of(theirs, cls=T5ForConditionalGeneration):
    return twin_of(theirs, cls)


def ids(batch=3, length=17, seed=1):
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def mask(side, batch=3, length=17, seed=3):
    """Sequences of several lengths, padded at one side."""
    kept = torch.randint(1, length, (batch,), generator=torch.Generator().manual_seed(seed))
    kept[0] = length
    right = (torch.arange(length) < kept[:, None]).long()
    return right.flip(1) if side == "left" else right


def inputs(**more):
    """A batch with padding, and labels of which some are not counted."""
    labels = ids(length=9, seed=2)
    labels[0, 6:] = -100
    return {"input_ids": ids(), "attention_mask": mask("right"), "labels": labels, **more}
