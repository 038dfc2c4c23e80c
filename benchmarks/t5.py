"""Forward, loss and backward of a T5, ours beside transformers': its explicit attention ("eager") and the one it
chooses by default, the same weights and batch.

The shape is (layers of each stack, width, batch, source tokens, target tokens); items are both kinds of tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.runner import Builder, Call, Case, Cost, Problem, Unavailable
from fastformer.models import T5Config, T5ForConditionalGeneration

OP = "t5"
SMALL = {"vocab_size": 32128, "num_heads": 8, "d_kv": 64, "d_ff": 2048}


def t5_small(dtype: str, dropout: float = 0.0, batch: tuple[int, int, int] = (8, 128, 64), **options: bool) -> Case:
    """T5-small (Raffel et al. 2020, section 3.7)."""
    variant = f"T5-small, dropout {dropout:g}" if dropout else "T5-small"
    return Case((6, 512, *batch), dtype, True, variant, {**SMALL, "dropout_rate": dropout}, **options)


# Without instructions for bfloat16 a step of PyTorch's takes minutes at the full size.
BF16 = (8, 128, 64) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (1, 32, 16)
CASES = {
    "cpu": [t5_small("float32"), t5_small("float32", 0.1), t5_small("bfloat16", batch=BF16)],
    "cuda": [t5_small("bfloat16", compiled=True), t5_small("bfloat16", 0.1)],
    "quick": [
        Case((1, 16, 2, 8, 5), "float32", True, "tiny", {"vocab_size": 11, "num_heads": 2, "d_kv": 8, "d_ff": 24})
    ],
}


def setup(case: Case, device: str) -> Problem:
    layers, width, batch, source, target = case.shape
    options = {"dropout_rate": 0.0, **case.options}
    config = T5Config(num_layers=layers, d_model=width, decoder_start_token_id=0, **options)
    model = T5ForConditionalGeneration(config).to(device)
    input_ids = torch.randint(config.vocab_size, (batch, source), device=device)
    labels = torch.randint(config.vocab_size, (batch, target), device=device)
    return Problem(device, (model, input_ids, labels), random=config.dropout_rate > 0)


def cost(case: Case) -> Cost:
    layers, width, batch, source, target = case.shape
    inner = case.options["num_heads"] * case.options["d_kv"]
    attention, ff = 4 * width * inner, 2 * width * case.options["d_ff"]
    encoder = source * (attention + ff)
    decoder = target * (attention + attention // 2 + ff) + source * attention // 2  # cross-attention's k and v
    scores = 2 * inner * (source * source + target * target // 2 + target * source)
    head = target * width * case.options["vocab_size"]
    return Cost(flops=6 * batch * (layers * (encoder + decoder + scores) + head), items=batch * (source + target))


def _step(model: nn.Module, case: Case, problem: Problem) -> Call:
    """The loss, and the gradient of the embedding, to which everything contributes."""
    _, input_ids, labels = problem.args
    model = model.to(problem.device, case.torch_dtype).train()
    embedding = model.get_input_embeddings().weight

    def step():
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        return loss.detach(), embedding.grad

    return step


def ours(case: Case, problem: Problem) -> Call:
    model = problem.args[0]
    twin = T5ForConditionalGeneration(model.config)
    twin.load_state_dict(model.state_dict())
    return _step(twin, case, problem)


def transformers(attention: str | None = None, compiled: bool = False) -> Builder:
    """transformers' model with one of its kinds of attention; None leaves the choice to it."""

    def build(case: Case, problem: Problem) -> Call:
        if compiled and not case.compiled:
            raise Unavailable("measured for the main cases only")
        try:
            from transformers import T5Config as Config
            from transformers import T5ForConditionalGeneration as Model
        except ImportError as error:
            raise Unavailable(str(error)) from None
        model = problem.args[0]
        options = {} if attention is None else {"attn_implementation": attention}
        peer = Model(Config(**model.config.to_dict(), **options))
        peer.load_state_dict(model.state_dict())
        return _step(torch.compile(peer) if compiled else peer, case, problem)

    return build


PROVIDERS = {
    "ours": ours,
    "eager": transformers("eager"),
    "transformers": transformers(),
    "compile": transformers(compiled=True),
}
