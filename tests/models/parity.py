"""A model of ours beside transformers': the same weights, the same inputs; outputs, losses and every gradient."""

from __future__ import annotations

import copy

import torch
import transformers
from torch import Tensor

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def randomised(model: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> torch.nn.Module:
    """Biases and norms start at 0 and 1, where an error in them would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model.eval()


def twin_of(theirs: torch.nn.Module, cls: type) -> torch.nn.Module:
    """``cls`` with the configuration, weights, dtype and mode of ``theirs``."""
    ours = cls(cls.config_class.from_dict(theirs.config.to_dict())).to(theirs.dtype).train(theirs.training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours


def labels_of(tokens: Tensor) -> Tensor:
    """The tokens, of which the first of one text are not counted."""
    labels = tokens.clone()
    labels[0, :5] = -100
    return labels


def gradients(model: torch.nn.Module, **inputs: Tensor):
    """The output, and by name the gradients of its loss."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run(model: torch.nn.Module, inputs: dict[str, Tensor], fields: tuple[str, ...], upstream: dict[str, Tensor]):
    """The output's fields, and the gradients of the parameters where ``loss`` (if among them) and the others, times
    fixed random numbers, are summed."""
    model.zero_grad()
    output = model(**inputs)
    found = {name: output[name] for name in fields}
    total = 0
    for name, value in found.items():
        if name != "loss" and name not in upstream:
            generator = torch.Generator().manual_seed(len(upstream))
            upstream[name] = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        total = total + (value if name == "loss" else (value * upstream[name].to(value.dtype)).sum())
    total.backward()
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().double() for name, value in found.items()}


def assert_equal(theirs, ours, inputs, fields=("logits",), tolerance=1e-10):
    """Both in float64. transformers computes losses in float32 whatever the model: see :func:`assert_equal_loss`."""
    upstream: dict[str, Tensor] = {}
    wanted, mine = (run(model, inputs, fields, upstream) for model in (theirs, ours))
    assert mine.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = max(value.abs().max().item(), 1.0)
        torch.testing.assert_close(
            mine[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_equal_loss(theirs, ours, inputs, rtol=1e-5):
    """The loss and its gradients, to float32's rounding."""
    wanted, mine = (run(model, inputs, ("loss",), {}) for model in (theirs, ours))
    assert mine.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            mine[name], value, rtol=0, atol=rtol * scale + 1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_as_accurate(theirs, cls, inputs, dtype, fields=("logits",)):
    """In ``dtype``: our distance from float64 (that of ``theirs``) is at most twice transformers', plus a rounding."""
    rounded = copy.deepcopy(theirs).to(dtype)
    exact = copy.deepcopy(rounded).double()
    ours = twin_of(rounded, cls)
    upstream: dict[str, Tensor] = {}
    wanted, peers, mine = (run(model, inputs, fields, upstream) for model in (exact, rounded, ours))
    assert mine.keys() == peers.keys() == wanted.keys()
    for name, value in wanted.items():
        error, peer_error = ((x[name] - value).norm().item() for x in (mine, peers))
        # A key's bias moves all scores of a query alike, so its gradient is 0: what is rounded is as large as query's.
        size = wanted[name.replace(".key.bias", ".query.bias")].norm().item()
        tiny = (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps * size
        assert error <= 2 * peer_error + tiny, f"{name}: error {error:.3g}, transformers' {peer_error:.3g}"
