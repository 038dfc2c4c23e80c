"""A language model as a policy: log-probabilities of what it wrote, values, its reference, and a copy that samples.

Rows are a prompt and its completion, padded at the end. Attention is causal, so no token sees that padding and no mask
is needed. Log-probabilities come from the last hidden states of the completions alone, by ``linear_cross_entropy``:
the logits of a batch are never held.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ... import functional
from ...nn import Linear
from ...nn.submodules import is_plain
from ...training.config import resolve_dtype
from ...training.objectives import unwrap

VALUE_FILE = "value_head.safetensors"


def causal_lm_of(model: nn.Module) -> Any:
    """The model itself, inside a value head, adapters or both."""
    return unwrap(model.policy if isinstance(model, PolicyWithValue) else model)


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters are."""
    return next(model.parameters()).device


def precision(model: nn.Module, dtype: str) -> torch.autocast:
    """The precision of a run's forward passes (``run.dtype``), for those that its trainer does not do itself.

    In half precision a pass without gradients fuses more and rounds elsewhere than one with them: the ratio of equal
    policies is then 1 within some thousandths, and exactly 1 in float32.
    """
    device = device_of(model)
    chosen = resolve_dtype(dtype, device)
    return torch.autocast(device.type, dtype=chosen, enabled=chosen != torch.float32)


def hidden_states(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The last hidden states ``(B, S, E)`` of rows ``(B, S)`` padded at the end, without logits and without a cache."""
    inner = causal_lm_of(model)
    return getattr(inner, inner.base_model_prefix)(input_ids, use_cache=False).last_hidden_state


def token_log_probs(
    model: nn.Module, input_ids: Tensor, completion_mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each token of the completions, given what comes before it.

    Args:
        model: causal language model, with adapters or a value head or without.
        input_ids: ``(B, S)``, padded at the end.
        completion_mask: ``(B, S)``, 1 at the tokens of the completion, the end of text included; the first position
            cannot be one.
        temperature: divides the logits, as when they were sampled.

    Returns:
        (log-probabilities ``(B, S - 1)``, entry t of token t + 1, 0 outside of the mask; the values of the text before
        each, where the model has a value head, else None).
    """
    inner = causal_lm_of(model)
    head = inner.get_output_embeddings()
    scored = completion_mask[:, 1:].bool()
    hidden = hidden_states(model, input_ids)[:, :-1]
    rows, targets = hidden[scored], input_ids[:, 1:][scored]
    if is_plain(head, nn.Linear, Linear):
        bias = None if head.bias is None else head.bias / temperature
        losses = functional.linear_cross_entropy(
            rows if temperature == 1 else rows / temperature, head.weight, targets, linear_bias=bias, reduction="none"
        )
    else:  # an adapter, which has to be called
        losses = functional.cross_entropy(head(rows).float() / temperature, targets, reduction="none")
    log_probs = torch.zeros(scored.shape, dtype=torch.float32, device=rows.device)
    log_probs = log_probs.masked_scatter(scored, -losses.float())
    if not isinstance(model, PolicyWithValue):
        return log_probs, None
    values = model.value_head(hidden).squeeze(-1).float()
    return log_probs, values.masked_fill(~scored, 0.0)


def sequence_scores(model: nn.Module, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """A reward model's score ``(B,)`` of rows ``(B, S)`` padded at the end, of ``lengths (B,)`` tokens.

    Where a text ends is given, so no token has to be set apart as padding.
    """
    hidden = hidden_states(model, input_ids)
    last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    return causal_lm_of(model).score(last).squeeze(-1).float()


class PolicyWithValue(nn.Module):
    """A policy, and a linear layer from its hidden states to the value of the text so far, for PPO.

    Args:
        policy: a causal language model, with adapters or without.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        inner = causal_lm_of(self)
        self.value_head = nn.Linear(inner.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)  # a value of 0 everywhere, until there is something to go by
        nn.init.zeros_(self.value_head.bias)
        self.config = inner.config

    def save_pretrained(self, directory: str | Path, **options: Any) -> None:
        """The policy's files, and the value head beside them."""
        from safetensors.torch import save_file

        cast(Any, self.policy).save_pretrained(directory, **options)
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in self.value_head.state_dict().items()}, value_file(directory)
        )

    def load_value_head(self, directory: str | Path) -> None:
        """Reads what :meth:`save_pretrained` wrote."""
        from safetensors.torch import load_file

        self.value_head.load_state_dict(load_file(value_file(directory)))


def value_file(directory: str | Path) -> str:
    """The value head's file in a checkpoint."""
    return str(Path(directory, VALUE_FILE))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; afterwards the mode is what it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class Reference:
    """The model that the policy is not to stray from: the policy without its adapters, or a frozen copy.

    Args:
        policy: as it is in the beginning.
        frozen: the reference itself, for a policy without adapters that has been trained already.
    """

    def __init__(self, policy: nn.Module, frozen: nn.Module | None = None) -> None:
        self.policy: Any = policy.policy if isinstance(policy, PolicyWithValue) else policy
        self.adapted = hasattr(self.policy, "disable_adapter")
        self.frozen: nn.Module | None = None
        if not self.adapted:
            self.frozen = (copy.deepcopy(causal_lm_of(policy)) if frozen is None else frozen).eval()
            self.frozen.requires_grad_(False)

    def log_probs(self, input_ids: Tensor, completion_mask: Tensor, temperature: float = 1.0) -> Tensor:
        """As :func:`token_log_probs`, without gradients."""
        model = self.policy if self.frozen is None else self.frozen.to(input_ids.device)
        with evaluating(model), self.policy.disable_adapter() if self.adapted else nullcontext():
            return token_log_probs(model, input_ids, completion_mask, temperature)[0]


class SamplingModel:
    """The policy as the decoder wants it: plain layers, whose weights it may read.

    A model without adapters is that already. One with adapters is called layer by layer, which is slow for a token at a
    time; a plain copy holds W + A B instead, and is brought up to date before each rollout.

    Args:
        policy: the policy.
        plain: a model as it was before it got adapters, that may be written to. Without it such a policy samples as
            it is.
        dtype: of the copy; a smaller one samples faster, from a distribution that differs by rounding.
    """

    def __init__(self, policy: nn.Module, plain: nn.Module | None = None, dtype: torch.dtype | None = None) -> None:
        self.policy = policy
        self.plain = plain if dtype is None or plain is None else plain.to(dtype)
        if self.plain is not None:
            self.plain.eval().requires_grad_(False)

    def current(self) -> Any:
        """The model, as the policy is now."""
        inner = causal_lm_of(self.policy)
        if self.plain is None:
            return inner
        if device_of(self.plain) != device_of(inner):
            self.plain.to(device_of(inner))
        modules = dict(self.plain.named_modules())
        with torch.no_grad():
            for name, module in inner.named_modules():
                delta: Callable[[str], Tensor] | None = getattr(module, "get_delta_weight", None)
                if delta is not None:
                    weight = module.base_layer.weight
                    for adapter in module.active_adapters:
                        weight = weight + delta(adapter).to(weight.dtype)
                    modules[name].weight.copy_(weight)
        return self.plain
