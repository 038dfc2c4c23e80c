"""Recomputed activations: the same losses and gradients to the bit, dropout included, in less memory."""

import pytest
import torch

from fastformer.models import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from fastformer.training import recompute_blocks
from fastformer.training.recompute import find_blocks
from tests.training.runs import losses, make_config, make_trainer

V = 19
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=16, n_embd=16, n_layer=3, n_head=2)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=16,
        )
    ),
    "bert": lambda: BertForMaskedLM(
        BertConfig(
            vocab_size=V, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16,
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=1,
        )
    ),
}  # fmt: skip
BLOCKS = {"gpt2": 3, "llama": 3, "bert": 3, "t5": 6}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_to_the_bit(name):
    ids = torch.randint(2, V, (2, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for recompute in (False, True):
        torch.manual_seed(3)
        model = MODELS[name]().train()
        keys = list(model.state_dict())
        if recompute:
            assert recompute_blocks(model) == BLOCKS[name] == recompute_blocks(model)
            assert list(model.state_dict()) == keys
        torch.manual_seed(4)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()], torch.get_rng_state()))
    (a, grads_a, random_a), (b, grads_b, random_b) = results
    assert torch.equal(a, b) and torch.equal(random_a, random_b)
    assert all(torch.equal(x, y) for x, y in zip(grads_a, grads_b, strict=True))
    assert any(float(g.abs().sum()) for g in grads_a)


def saved_bytes(model, ids):
    """What autograd keeps between forward and backward, parameters aside."""
    kept = {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = 0

    def pack(tensor):
        nonlocal total
        if tensor.untyped_storage().data_ptr() not in kept:
            kept.add(tensor.untyped_storage().data_ptr())
            total += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    del loss
    return total


def test_activations_of_a_block_are_not_kept():
    ids = torch.randint(V, (4, 16))
    plain, lean = MODELS["gpt2"]().train(), MODELS["gpt2"]().train()
    recompute_blocks(lean)
    assert saved_bytes(lean, ids) < 0.5 * saved_bytes(plain, ids)


def test_evaluation_and_generation_are_left_alone():
    model = MODELS["gpt2"]().eval()
    ids = torch.randint(V, (1, 4))
    before = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=[])
    recompute_blocks(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=[]), before)


def test_the_trainer_recomputes(tmp_path):
    for name, recompute in (("plain", False), ("lean", True)):
        make_trainer(make_config(tmp_path / name, dropout=0.2, recompute=recompute)).fit()
    assert losses(tmp_path / "plain") == losses(tmp_path / "lean")


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="model: Linear has no ModuleList of equal blocks"):
        find_blocks(torch.nn.Linear(2, 2))
