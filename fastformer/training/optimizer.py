"""AdamW (Loshchilov & Hutter, arXiv:1711.05101), all parameters of a group updated by one kernel (``fused=True``).

    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
    w = w - lr (m^ / (sqrt(v^) + eps) + decay w)            ^ : divided by 1 - beta^step

Weight decay pulls matrices and embeddings towards zero. Biases and norm weights are left alone: they are few, they do
not overfit, and a norm's weight belongs near one.
"""

from __future__ import annotations

import torch
from torch import nn

from .config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters of ``model`` that require a gradient, in two groups: those of two dimensions or more
    with weight decay, the others without; and two more for each entry of ``config.rates``, whose ``multiple`` of the
    learning rate they have.

    Raises:
        ValueError: no parameter requires a gradient, or none begins as an entry of ``config.rates`` does.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("model: no parameter requires a gradient, so there is nothing to train")
    groups = []
    for beginning, multiple in {**config.multiples, "": 1.0}.items():
        chosen = [parameters.pop(name) for name in list(parameters) if name.startswith(beginning)]
        if beginning and not chosen:
            raise ValueError(f"optimizer.rates: no parameter that is trained begins with {beginning!r}")
        decayed = {"params": [p for p in chosen if p.dim() >= 2], "weight_decay": config.weight_decay}
        others = {"params": [p for p in chosen if p.dim() < 2], "weight_decay": 0.0}
        groups += [{**group, "multiple": multiple} for group in (decayed, others)]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
