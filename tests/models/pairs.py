"""Random GPT-2s of transformers, and ours with the same weights."""

import torch
import transformers

from fastformer.models import GPT2LMHeadModel
from tests.models.parity import randomised, twin_of

VOCAB = 97


def fields(**changes):
    small = {"vocab_size": VOCAB, "n_positions": 40, "n_embd": 48, "n_layer": 2, "n_head": 4}
    small |= {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return {**small, **changes}


def theirs_of(seed=0, dtype=torch.float32, cls=transformers.GPT2LMHeadModel, **changes):
    torch.manual_seed(seed)
    return randomised(cls(transformers.GPT2Config(**fields(**changes))), seed).to(dtype)


def ours_of(theirs):
    return twin_of(theirs, GPT2LMHeadModel)


def ids(batch=3, length=17, seed=1):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
