"""Random models of transformers and ours with the same weights, and prompts for them."""

import torch
import transformers

from fastformer.models import GPT2Config, GPT2LMHeadModel

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB, PAD, END = 97, 3, 5


def models(seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    fields = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 4, "bos_token_id": 1}
    # A large initializer_range makes likely tokens differ from step to step, instead of one repeated for ever.
    config = transformers.GPT2Config(**{**fields, "eos_token_id": END, "initializer_range": 0.4, **changes})
    theirs = transformers.GPT2LMHeadModel(config).to(dtype).eval()
    ours = GPT2LMHeadModel(GPT2Config.from_dict(config.to_dict())).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def prompts(lengths=(9, 5, 9, 2), side="left", pad=PAD, vocab=VOCAB):
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(lengths), max(lengths)), pad)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(-length, None) if side == "left" else slice(length)
        ids[row, where] = torch.randint(6, vocab, (length,), generator=generator)
        mask[row, where] = 1
    return ids, mask


def some_end_tokens(count=25):
    """So many end tokens that texts do end."""
    return list(range(5, 5 + count))
