"""Random models of transformers and ours with the same weights, and prompts for them."""

import torch
import transformers

from fastformer.models import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

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


def llama_models(seed=0, **changes):
    torch.manual_seed(seed)
    fields = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    fields |= {"bos_token_id": 1, "eos_token_id": END, "initializer_range": 0.4}
    config = transformers.LlamaConfig(**{**fields, **changes})
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = LlamaForCausalLM(LlamaConfig.from_dict(config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def t5_models(seed=0, **changes):
    torch.manual_seed(seed)
    fields = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2}
    fields |= {"num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
    fields |= {"pad_token_id": 0, "eos_token_id": END, "decoder_start_token_id": 0, "initializer_factor": 3.0}
    config = transformers.T5Config(**{**fields, **changes})
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    ours = T5ForConditionalGeneration(T5Config.from_dict(config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs
