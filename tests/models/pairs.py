"""Random GPT-2s of transformers, and ours with the same weights."""

import torch
import transformers

from fastformer.models import GPT2Config, GPT2LMHeadModel

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB = 97


def fields(**changes):
    small = {"vocab_size": VOCAB, "n_positions": 40, "n_embd": 48, "n_layer": 2, "n_head": 4}
    small |= {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return {**small, **changes}


def theirs_of(seed=0, dtype=torch.float32, cls=transformers.GPT2LMHeadModel, **changes):
    torch.manual_seed(seed)
    model = cls(transformers.GPT2Config(**fields(**changes)))
    for p in model.parameters():  # biases and norms start at 0 and 1, where an error in them would not show
        p.data.add_(0.1 * torch.randn_like(p))
    return model.to(dtype).eval()


def ours_of(theirs):
    model = GPT2LMHeadModel(GPT2Config.from_dict(theirs.config.to_dict())).to(theirs.dtype).eval()
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model


def ids(batch=3, length=17, seed=1):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
