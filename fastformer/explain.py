"""``fastformer.explain``: which backend would run a call, without running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import linear_activation, matmul, registry
from .backends.attention_options import Options
from .functional.linear import refusal as linear_refusal


def explain(op: str, *args: object, **kwargs: object) -> registry.Explanation:
    """Which backend would run ``fastformer.functional.<op>(*args, **kwargs)``, and why not the others. ("embedding" is
    also ``transformer_embedding``, "rotary" ``rotary_embedding``; of "feed_forward" and "gated_feed_forward" it says
    what runs between the matmuls, and whose the first matmul is; of "linear", whose the matmul is.)

    Args:
        op: an operation's name, such as "attention".
        args, kwargs: the call's arguments; tensors may live on the "meta" device of any size.

    Returns:
        An :class:`Explanation`; ``print`` it for a table, read ``.backend`` for the name.

    >>> print(fastformer.explain("layer_norm", torch.zeros(8, 64), (64,)))
    """
    if op == "linear":
        return _linear(*args, **kwargs)  # type: ignore[arg-type]
    if op in _BLOCKS:
        return _feed_forward(op, *args, **kwargs)  # type: ignore[arg-type]
    if op not in registry.OPS:
        raise ValueError(f"op: {op!r} is not one of {', '.join(registry.OPS)}")
    tensors = [a for a in args if isinstance(a, Tensor)]
    if not tensors:
        raise ValueError(f"args: explain({op!r}, ...) needs the call's tensors")
    features = _attention_features(*args, **kwargs) if op == "attention" else _features(op, tensors, kwargs)
    data = next((t for t in tensors if t.is_floating_point()), tensors[0])
    found = registry.explain(op, data.device.type, data.dtype, features)
    name = next((a for a in (*args, kwargs.get("activation")) if isinstance(a, str)), op)
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if found.backend == "cpu" and not features and wants_gradient and registry.prefers_torch(name, data.numel()):
        reason = f"chosen: {data.numel()} elements with a gradient, less work than a node of autograd's graph in Python"
        return registry.Explanation(op, "torch", {**found.reasons, "cpu": "can run this call", "torch": reason})
    return found


# Optional parts, by the argument that asks for each; a number does so if it is above 0.
_ARGUMENTS = {"dropout": "dropout_p", "norm": "norm_eps"}
_FEATURES: dict[str, tuple[str, ...]] = {
    "add_layer_norm": ("dropout",),
    "add_rms_norm": ("dropout",),
    "embedding": ("norm", "dropout"),
    "softmax": ("mask", "bias", "causal"),
    "activation": ("bias", "gate", "dropout"),
    "cross_entropy": ("weight", "label_smoothing", "z_loss", "probabilities"),
    "linear_cross_entropy": ("weight", "label_smoothing", "z_loss"),
}


_BLOCKS = ("feed_forward", "gated_feed_forward")


def _feed_forward(
    op: str, x: Tensor, w1: Tensor, second: Tensor | None, w2: Tensor, *_: object, **kwargs: Any
) -> registry.Explanation:
    """The activation's explanation, and of the backends with a first matmul of their own, why it does not run."""
    gated = op == "gated_feed_forward"
    used = ("bias",) if (kwargs.get("b_gate") if gated else second) is not None else ()
    used += ("gate",) if gated else ()
    used += ("dropout",) if kwargs.get("dropout_p", 0) > 0 and kwargs.get("training", True) else ()
    explanation = registry.explain("activation", x.device.type, x.dtype, used)
    backend, reasons = explanation.backend, dict(explanation.reasons)
    for name in linear_activation.FUSED:
        reason = linear_activation.refusal(name, x, w1, second if gated else None, w2)
        if reason is None and name == linear_activation.chosen(x):
            backend, reasons[name] = name, "chosen, the first matmul with it"
        elif reason != reasons[name]:
            reasons[name] += f"; the library's matmul: {reason or 'its own has to be asked for by name'}"
    return registry.Explanation(op, backend, reasons)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> registry.Explanation:
    """PyTorch's matmul, or of half precision on a CPU, which of two ways goes instead."""
    reason = linear_refusal(input, weight, bias)
    if reason is not None:
        return registry.Explanation("linear", "torch", {"cpu": reason, "torch": "chosen"})
    if matmul.few(input.shape[:-1].numel(), weight):
        way = "a few rows, the weight is read once"
    else:
        way = f"float32 matmuls of converted pieces: this CPU has no instructions for {str(input.dtype)[6:]}"
    return registry.Explanation("linear", "cpu", {"cpu": f"chosen: {way}", "torch": "can run this call"})


def _features(op: str, tensors: list[Tensor], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The optional parts of a call of ``op`` in the table's order; ``tensors`` are its arguments by position."""
    values = dict(kwargs)
    if op == "cross_entropy":
        values["probabilities"] = len(tensors) > 1 and tensors[1].is_floating_point()
        values.setdefault("weight", tensors[2] if len(tensors) > 2 else None)
    if op == "softmax" and isinstance(kwargs.get("mask"), Tensor) and kwargs["mask"].dtype != torch.bool:
        values["bias"] = values.pop("mask")
    if op == "activation":
        values["gate"] = len(tensors) > 1 and tensors[0].dim() > 1 and tensors[1].shape == tensors[0].shape
        values["bias"] = any(isinstance(t, Tensor) and t.dim() == 1 for t in (*tensors[1:], *kwargs.values()))
    if not kwargs.get("training", True):
        values["dropout_p"] = 0.0
    used = []
    for feature in _FEATURES.get(op, ()):
        value = values.get(_ARGUMENTS.get(feature, feature))
        if value is not None and (feature == "norm" or not isinstance(value, (int, float)) or value > 0):
            used.append(feature)
    return tuple(used)


def _attention_features(q: Tensor, k: Tensor, v: Tensor | None = None, **kwargs: Any) -> tuple[str, ...]:
    """The optional parts of ``functional.attention(q, k, v, **kwargs)``."""
    left, right = kwargs.get("window", (-1, -1))
    used = Options(
        1.0,
        kwargs.get("causal", False),
        kwargs.get("key_padding_mask"),
        kwargs.get("attn_mask"),
        kwargs.get("bias"),
        kwargs["relative_bias"][0] if kwargs.get("relative_bias") is not None else None,
        kwargs.get("alibi_slopes"),
        window_left=left,
        window_right=right,
        softcap=kwargs.get("softcap", 0.0),
        dropout_p=kwargs.get("dropout_p", 0.0),
    )
    return used.features(q, k, k if v is None else v)
