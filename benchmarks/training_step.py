"""One training step of a GPT-2, ours beside the same network on torch.nn layers, compiled too, and transformers'.

Forward, loss, backward, gradient clipping and a fused AdamW step, the same in all; the same initial weights and batch.
The shape is (layers, width, batch, block); items are tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.runner import Case, Cost, Problem, Unavailable, incomparable
from fastformer.data import Batch
from fastformer.demo import SIZES
from fastformer.demo_torch import TorchGPT2
from fastformer.models import GPT2Config, GPT2LMHeadModel
from fastformer.training.config import OptimizerConfig
from fastformer.training.objectives import model_loss
from fastformer.training.optimizer import make_optimizer

OP = "training_step"
CHARACTERS = 96  # about what the demo's corpus has


def demo_case(device: str, compiled: bool) -> Case:
    """The demo's network and batch on ``device``."""
    size = SIZES[device]
    shape = (size.model.n_layer, size.model.n_embd, size.batch_size, size.block_size)
    options = {"heads": size.model.n_head, "vocab": CHARACTERS}
    return Case(shape, "float32" if device == "cpu" else "bfloat16", True, "the demo's GPT-2", options, compiled)


def gpt2_case(batch: int, block: int, dtype: str) -> Case:
    """GPT-2 124M."""
    return Case((12, 768, batch, block), dtype, True, "GPT-2 124M", {"heads": 12, "vocab": 50257}, compiled=True)


# Without instructions for bfloat16 a step of PyTorch's takes minutes at 4 x 512 tokens: the peers are at 1 x 32.
FAST_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
CASES = {
    "cpu": [
        demo_case("cpu", compiled=True),
        gpt2_case(4, 512, "float32"),
        gpt2_case(4, 512, "bfloat16"),
        *([] if FAST_BF16 else [gpt2_case(1, 32, "bfloat16")]),
    ],
    "cuda": [gpt2_case(16, 1024, "bfloat16"), demo_case("cuda", compiled=True)],
    "quick": [Case((1, 16, 2, 8), "float32", True, "tiny", {"heads": 2, "vocab": 11})],
}


def setup(case: Case, device: str) -> Problem:
    layers, width, batch, block = case.shape
    config = GPT2Config(
        vocab_size=case.options["vocab"],
        n_positions=block,
        n_embd=width,
        n_layer=layers,
        n_head=case.options["heads"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config).to(device)
    ids = torch.randint(config.vocab_size, (batch, block + 1), device=device)
    return Problem(device, (model, {"input_ids": ids[:, :-1].contiguous(), "shift_labels": ids[:, 1:].contiguous()}))


def cost(case: Case) -> Cost:
    layers, width, batch, block = case.shape
    parameters = layers * 12 * width**2 + case.options.get("vocab", CHARACTERS) * width
    attention = layers * 2 * block * width // 2  # two matmuls over half the (causal) square
    return Cost(flops=6 * batch * block * (parameters + attention), items=batch * block)


def smaller(case: Case, device: str) -> Case | None:
    """The case to estimate a peer's time by, where it may be minutes."""
    layers, width, batch, block = case.shape
    quick = FAST_BF16 or device != "cpu" or case.dtype != "bfloat16" or batch * block <= 32
    return None if quick else replace(case, shape=(layers, width, 1, 32))


def _step(model: nn.Module, loss_of: Callable[[nn.Module, Batch], Tensor], case: Case, batch: Batch):
    """What the trainer does for a batch; returns the loss."""
    optimizer = make_optimizer(model.train(), OptimizerConfig())
    device, dtype = batch["input_ids"].device.type, case.torch_dtype

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def torch_loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["shift_labels"].flatten())


def ours(case: Case, problem: Problem):
    model, batch = problem.args
    twin = GPT2LMHeadModel(model.config).to(problem.device)
    twin.load_state_dict(model.state_dict())
    return _step(twin, model_loss, case, batch)


def eager(case: Case, problem: Problem):
    model, batch = problem.args
    return _step(TorchGPT2.like(model), torch_loss, case, batch)


def compiled(case: Case, problem: Problem):
    if not case.compiled:
        raise Unavailable("measured for the main cases only")
    model, batch = problem.args
    return _step(torch.compile(TorchGPT2.like(model)), torch_loss, case, batch)


@incomparable  # its own initial weights
def transformers(case: Case, problem: Problem):
    if not case.compiled:
        raise Unavailable("measured for the main cases only")
    try:
        from transformers import GPT2Config as Config
        from transformers import GPT2LMHeadModel as Model
    except ImportError as error:
        raise Unavailable(str(error)) from None
    model, batch = problem.args
    config = model.config
    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "resid_pdrop", "embd_pdrop", "attn_pdrop")
    peer = Model(Config(**{name: getattr(config, name) for name in names})).to(problem.device)
    loss = lambda model, batch: nn.functional.cross_entropy(  # noqa: E731
        model(batch["input_ids"], use_cache=False).logits.flatten(0, 1), batch["shift_labels"].flatten()
    )
    return _step(peer, loss, case, batch)


PROVIDERS = {"ours": ours, "eager": eager, "compile": compiled, "transformers": transformers}
