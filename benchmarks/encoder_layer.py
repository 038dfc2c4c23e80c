"""An encoder layer of BERT's shape on a padded batch, beside torch.nn's: for inference, where torch takes its own fast
path, and for training (forward and backward); and "encoder", two layers in a TransformerEncoder, which for inference
leaves the padding out, as torch's does on nested tensors.

The shape is (batch, sequence length, width); a quarter of the positions is padding, at the end. Items are tokens, the
padding not counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastformer.nn
from benchmarks.runner import Call, Case, Cost, Problem, Unavailable

OP = "encoder_layer"
BERT = (8, 128, 768)
HEADS = {"heads": 12, "hidden": 3072}

CASES = {
    "cpu": [
        *(
            Case(BERT, d, b, "layer", HEADS, compiled=d == "float32")
            for d in ("float32", "bfloat16")
            for b in (False, True)
        ),
        Case(BERT, "float32", False, "encoder", HEADS),
        Case(BERT, "float32", True, "layer dropout 0.1", {**HEADS, "dropout": 0.1}),
    ],
    "cuda": [
        *(Case((32, 512, 768), "bfloat16", b, "layer", HEADS, compiled=True) for b in (False, True)),
        Case((32, 512, 768), "bfloat16", False, "encoder", HEADS, compiled=True),
        Case((32, 512, 768), "bfloat16", True, "layer dropout 0.1", {**HEADS, "dropout": 0.1}, compiled=True),
    ],
    "quick": [
        Case((3, 8, 16), "float32", False, "layer", {"heads": 2, "hidden": 32}),
        Case((3, 8, 16), "float32", True, "layer", {"heads": 2, "hidden": 32}),
        Case((3, 8, 16), "float32", False, "encoder", {"heads": 2, "hidden": 32}),
    ],
}


def _lengths(batch: int, length: int) -> Tensor:
    """From the whole length down to half of it."""
    return torch.linspace(length, length / 2, batch).long()


def _layers(case: Case) -> int:
    return 2 if case.variant == "encoder" else 1


def _module(package: Any, case: Case, device: str) -> nn.Module:
    _, _, width = case.shape
    layer = package.TransformerEncoderLayer(
        width,
        case.options["heads"],
        case.options["hidden"],
        case.options.get("dropout", 0.0),
        activation="gelu",
        batch_first=True,
        device=device,
        dtype=case.torch_dtype,
    )
    return package.TransformerEncoder(layer, _layers(case)) if case.variant == "encoder" else layer


def setup(case: Case, device: str) -> Problem:
    batch, length, width = case.shape
    x = torch.randn(batch, length, width, device=device, dtype=case.torch_dtype)
    padding = (torch.arange(length) >= _lengths(batch, length)[:, None]).to(device)
    args = (_module(nn, case, device), x, padding)
    return Problem(device, args, douts=(torch.randn_like(x),), random=case.options.get("dropout", 0.0) > 0)


def cost(case: Case) -> Cost:
    batch, length, width = case.shape
    tokens = int(_lengths(batch, length).sum())
    per_token = 2 * width * (4 * width + 2 * case.options["hidden"]) + 4 * length * width
    computed = tokens if case.variant == "encoder" else batch * length
    return Cost(flops=(3 if case.backward else 1) * _layers(case) * computed * per_token, items=tokens)


def _call(module: nn.Module, case: Case, problem: Problem) -> Call:
    _, x, padding = problem.args
    if not case.backward:
        module.eval()

        def infer() -> Tensor:
            with torch.no_grad():
                return module(x, src_key_padding_mask=padding)

        return infer
    leaf = x.detach().requires_grad_()
    wrt = (leaf, *module.parameters())
    return lambda: torch.autograd.grad(module(leaf, src_key_padding_mask=padding), wrt, problem.douts)


def ours(case: Case, problem: Problem) -> Call:
    module = _module(fastformer.nn, case, problem.device)
    module.load_state_dict(problem.args[0].state_dict())
    return _call(module, case, problem)


def eager(case: Case, problem: Problem) -> Call:
    return _call(problem.args[0], case, problem)


def compiled(case: Case, problem: Problem) -> Call:
    if not case.compiled:
        raise Unavailable("measured for the main cases only")
    return _call(torch.compile(problem.args[0]), case, problem)


PROVIDERS = {"ours": ours, "eager": eager, "compile": compiled}
