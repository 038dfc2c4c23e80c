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
    with weight decay, the others without.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: no parameter requires a gradient, so there is nothing to train")
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
