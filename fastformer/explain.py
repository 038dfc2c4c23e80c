"""``fastformer.explain``: which backend would run a call, without running it."""

from __future__ import annotations

from torch import Tensor

from .backends import registry


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
    if op == "attention":
        if kwargs.get("causal"):
            features += ("causal",)
        if kwargs.get("key_padding_mask") is not None:
            features += ("key_padding_mask",)
        if len(tensors) > 1 and tensors[0].shape[1] != tensors[1].shape[1]:
            features += ("grouped_heads",)
    if op == "cross_entropy":
        if kwargs.get("weight") is not None or len(tensors) > 2:
            features += ("weight",)
        if float(kwargs.get("label_smoothing", 0.0)) > 0:  # type: ignore[arg-type]
            features += ("label_smoothing",)
    return registry.explain(op, tensors[0].device.type, tensors[0].dtype, features)
