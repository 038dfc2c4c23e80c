"""``fastformer.explain``: which backend would run a call, without running it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .backends import registry
from .backends.attention_options import Options


def explain(op: str, *args: object, **kwargs: object) -> registry.Explanation:
    """Which backend would run ``fastformer.functional.<op>(*args, **kwargs)``, and why not the others.

    Args:
        op: an operation's name, such as "attention".
        args, kwargs: the call's arguments; tensors may live on the "meta" device of any size.

    Returns:
        An :class:`Explanation`; ``print`` it for a table, read ``.backend`` for the name.

    >>> print(fastformer.explain("layer_norm", torch.zeros(8, 64), (64,)))
    """
    if op not in registry.OPS:
        raise ValueError(f"op: {op!r} is not one of {', '.join(registry.OPS)}")
    tensors = [a for a in args if isinstance(a, Tensor)]
    if not tensors:
        raise ValueError(f"args: explain({op!r}, ...) needs the call's tensors")
    features: tuple[str, ...] = ()
    if op == "add_layer_norm" and float(kwargs.get("dropout_p", 0.0)) > 0 and kwargs.get("training", True):  # type: ignore[arg-type]
        features += ("dropout",)
    if op == "activation":
        dropped = float(kwargs.get("dropout_p", 0.0)) > 0 and kwargs.get("training", True)  # type: ignore[arg-type]
        gated = len(tensors) > 1 and tensors[1].shape == tensors[0].shape and tensors[0].dim() > 1
        biased = any(isinstance(t, Tensor) and t.dim() == 1 for t in (*tensors[1:], *kwargs.values()))
        features += tuple(f for f, used in (("bias", biased), ("gate", gated), ("dropout", dropped)) if used)
    if op == "attention":
        features += _attention_features(*args, **kwargs)
    if op == "cross_entropy":
        if kwargs.get("weight") is not None or len(tensors) > 2:
            features += ("weight",)
        if float(kwargs.get("label_smoothing", 0.0)) > 0:  # type: ignore[arg-type]
            features += ("label_smoothing",)
    return registry.explain(op, tensors[0].device.type, tensors[0].dtype, features)


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
