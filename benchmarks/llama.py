"""Llama: forward and backward of a batch, and greedy generation with a KV cache, ours beside transformers'.

Both have the same weights; "eager" is transformers' model, which runs PyTorch's own attention. The shape is (layers,
width, batch, tokens), for generation after a prompt of 16; items are tokens.
"""

from __future__ import annotations

import torch

from benchmarks.runner import Case, Cost, Problem, Unavailable
from fastformer.models import LlamaConfig, LlamaForCausalLM

OP = "llama"
PROMPT = 16
SMOLLM2 = {"heads": 9, "keys": 3, "inner": 1536, "vocab": 49152}
TINY = {"heads": 4, "keys": 2, "inner": 24, "vocab": 11}


def training(layers: int, batch: int, tokens: int, dtype: str) -> Case:
    return Case((layers, 576, batch, tokens), dtype, True, "SmolLM2-135M", SMOLLM2)


def decoding(layers: int, batch: int, tokens: int, dtype: str) -> Case:
    return Case((layers, 576, batch, tokens), dtype, False, "SmolLM2-135M generates", SMOLLM2)


# Without instructions for bfloat16 a step of PyTorch's takes minutes at 2 x 256 tokens.
BF16 = (2, 256) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (1, 32)
CASES = {
    "cpu": [
        training(6, 2, 256, "float32"),
        training(6, *BF16, "bfloat16"),
        decoding(30, 1, 32, "float32"),
        decoding(30, 1, 32, "bfloat16"),
        decoding(30, 8, 32, "float32"),
    ],
    "cuda": [
        training(30, 8, 1024, "bfloat16"),
        decoding(30, 1, 128, "bfloat16"),
        decoding(30, 8, 128, "bfloat16"),
    ],
    "quick": [
        Case((1, 16, 2, 8), "float32", True, "tiny", TINY),
        Case((1, 16, 1, 4), "float32", False, "tiny generates", TINY),
    ],
}


def setup(case: Case, device: str) -> Problem:
    layers, width, batch, tokens = case.shape
    config = LlamaConfig(
        vocab_size=case.options["vocab"],
        hidden_size=width,
        intermediate_size=case.options["inner"],
        num_hidden_layers=layers,
        num_attention_heads=case.options["heads"],
        num_key_value_heads=case.options["keys"],
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(device, case.torch_dtype)
    ids = torch.randint(config.vocab_size, (batch, tokens if case.backward else PROMPT), device=device)
    # Two near-equal logits are ordered by rounding in low precision, and all tokens after differ.
    return Problem(device, (model, ids), random=not case.backward and case.dtype != "float32")


def _weights(case: Case) -> int:
    layers, width, _, _ = case.shape
    attention = 2 * width**2 * (1 + case.options["keys"] / case.options["heads"])
    return int(layers * (attention + 3 * width * case.options["inner"]) + case.options["vocab"] * width)


def cost(case: Case) -> Cost:
    layers, width, batch, tokens = case.shape
    if case.backward:
        attention = layers * 2 * tokens * width // 2  # two matmuls over half the (causal) square
        return Cost(flops=6 * batch * tokens * (_weights(case) + attention), items=batch * tokens)
    # Every step has to read the weights, from memory if they are too large for a cache.
    weights = _weights(case) * case.torch_dtype.itemsize
    return Cost(bytes=tokens * weights if weights > 64 << 20 else 0, items=batch * tokens)


def _step(model: torch.nn.Module, ids: torch.Tensor):
    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return step


def ours(case: Case, problem: Problem):
    model, ids = problem.args
    if case.backward:
        return _step(model.train(), ids)
    model.eval()
    return lambda: model.generate(ids, max_new_tokens=case.shape[3], do_sample=False, eos_token_id=[])


def eager(case: Case, problem: Problem):
    try:
        from transformers import LlamaConfig as Config
        from transformers import LlamaForCausalLM as Model
    except ImportError as error:
        raise Unavailable(str(error)) from None
    model, ids = problem.args
    peer = Model(Config.from_dict(model.config.to_dict())).to(problem.device, case.torch_dtype)
    peer.load_state_dict(model.state_dict())
    if case.backward:
        return _step(peer.train(), ids)
    peer.eval()
    mask, new = torch.ones_like(ids), case.shape[3]
    return lambda: peer.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)


PROVIDERS = {"ours": ours, "eager": eager}
