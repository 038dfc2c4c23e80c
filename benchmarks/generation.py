"""Greedy generation with a KV cache, ours beside the same network on torch.nn layers, and transformers'.

The shape is (layers, width, batch, new tokens), after a prompt of 16; items are tokens.
"""

from __future__ import annotations

import torch

from benchmarks.runner import Case, Cost, Problem, Unavailable, incomparable
from fastformer.demo import SIZES
from fastformer.demo_torch import TorchGPT2
from fastformer.models import GPT2Config, GPT2LMHeadModel

OP = "generation"
PROMPT = 16


def demo_case(device: str, batch: int) -> Case:
    """The demo's network on ``device``, writing until its context is full."""
    size = SIZES[device]
    options = {"heads": size.model.n_head, "vocab": 96, "transformers": True}
    shape = (size.model.n_layer, size.model.n_embd, batch, size.block_size - PROMPT)
    return Case(shape, "float32", False, "the demo's GPT-2", options)


CASES = {
    "cpu": [demo_case("cpu", 1), demo_case("cpu", 8)],
    "cuda": [
        demo_case("cuda", 1),
        Case((12, 768, 1, 128), "bfloat16", False, "GPT-2 124M", {"heads": 12, "vocab": 50257, "transformers": True}),
        Case((12, 768, 8, 128), "bfloat16", False, "GPT-2 124M", {"heads": 12, "vocab": 50257, "transformers": True}),
    ],
    "quick": [Case((1, 16, 1, 4), "float32", False, "tiny", {"heads": 2, "vocab": 11})],
}


def setup(case: Case, device: str) -> Problem:
    layers, width, batch, new = case.shape
    config = GPT2Config(
        vocab_size=case.options["vocab"],
        n_positions=PROMPT + new,
        n_embd=width,
        n_layer=layers,
        n_head=case.options["heads"],
    )
    model = GPT2LMHeadModel(config).to(device).eval().to(case.torch_dtype)
    prompt = torch.randint(config.vocab_size, (batch, PROMPT), device=device)
    # Two near-equal logits are ordered by rounding in low precision, and all tokens after differ.
    return Problem(device, (model, prompt), random=case.dtype != "float32")


def cost(case: Case) -> Cost:
    layers, width, batch, new = case.shape
    weights = (layers * 12 * width**2 + case.options.get("vocab", 96) * width) * case.torch_dtype.itemsize
    # Every step has to read the weights, from memory if they are too large for a cache.
    return Cost(bytes=new * weights if weights > 64 << 20 else 0, items=batch * new)


def ours(case: Case, problem: Problem):
    model, prompt = problem.args
    return lambda: model.generate(prompt, max_new_tokens=case.shape[3], do_sample=False, eos_token_id=[])


def eager(case: Case, problem: Problem):
    model, prompt = problem.args
    twin = TorchGPT2.like(model).eval().to(case.torch_dtype)
    return lambda: twin.generate(prompt, case.shape[3])


@incomparable  # its own weights
def transformers(case: Case, problem: Problem):
    if not case.options.get("transformers"):
        raise Unavailable("measured for the main cases only")
    try:
        from transformers import GPT2Config as Config
        from transformers import GPT2LMHeadModel as Model
    except ImportError as error:
        raise Unavailable(str(error)) from None
    model, prompt = problem.args
    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    config = Config(**{name: getattr(model.config, name) for name in names}, bos_token_id=0, eos_token_id=None)
    peer = Model(config).to(problem.device).eval().to(case.torch_dtype)
    mask, new = torch.ones_like(prompt), case.shape[3]

    def run():
        return peer.generate(
            prompt, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )

    return run


PROVIDERS = {"ours": ours, "eager": eager, "transformers": transformers}
