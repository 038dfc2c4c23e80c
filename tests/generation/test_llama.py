"""Generation with Llama: rotary positions, grouped heads, and its own way through the cache."""

import pytest
import torch

from tests.generation.pairs import PAD, llama_models, prompts, some_end_tokens


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 1}], ids=str)
@pytest.mark.parametrize("lengths", [(9,), (9, 5, 2)], ids=["one prompt", "left padding"])
def test_tokens_are_those_of_transformers(lengths, changes):
    ours, theirs = llama_models(**changes)
    ids, mask = prompts(lengths)
    for options in (
        {"num_beams": 1, "repetition_penalty": 1.2},
        {"num_beams": 1, "no_repeat_ngram_size": 2, "eos_token_id": some_end_tokens()},
        {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.3},
        {"num_beams": 3, "early_stopping": True, "eos_token_id": some_end_tokens()},
    ):
        arguments = {"attention_mask": mask, "max_new_tokens": 20, "pad_token_id": PAD, **options}
        wanted = theirs.generate(ids, do_sample=False, **arguments)
        assert torch.equal(ours.generate(ids, **arguments), wanted)
        assert torch.equal(ours.generate(ids, use_cache=False, **arguments), wanted)


def test_a_seed_gives_a_prompt_its_own_text_in_any_batch():
    ours, _ = llama_models()
    ids, mask = prompts((9, 5, 2))
    options = {"do_sample": True, "seed": 1, "max_new_tokens": 15, "eos_token_id": [], "top_p": 0.9}
    together = ours.generate(ids, attention_mask=mask, **options)
    for row, length in enumerate((9, 5, 2)):
        assert torch.equal(ours.generate(ids[row : row + 1, -length:], **options)[0, -15:], together[row, -15:])
