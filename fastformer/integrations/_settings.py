"""What a model of transformers computes outside of its modules, through the settings it has for that: the attention of
all layers (``attn_implementation``), and the loss (``loss_function``)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ._proof import fingerprint, rebound

NAME = "fastformer"
_BEFORE = "_optimized_attention"  # on a model: the implementations its configurations had
_FIXED_CROSS_ENTROPY = "6313737d2e3ad1fc"

Setting = tuple[str, str, Callable[[], None], Callable[[], None]]
"""What, by which operation, and how to change it and to change it back."""


def changes(model: torch.nn.Module) -> Iterator[tuple[str, Setting | str]]:
    """The settings that can be changed, or why one cannot, of each model of transformers in a model, with its name."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if not _is_pretrained(module):
            continue
        if id(module) not in inside:  # the outermost speaks for all in it
            inside.update(map(id, module.modules()))
            setting = _attention(module)
            if setting is not None:
                yield name, setting
        if "_loss_function" not in module.__dict__ and (loss := _loss_of(module)) is not None:
            yield name, ("loss", "cross_entropy", partial(_set_loss, module, loss), partial(_restore_loss, module))


def restore(module: torch.nn.Module) -> None:
    _restore_loss(module)
    _restore_attention(module)


def _is_pretrained(module: torch.nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")  # a model of it has imported it
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


# ---- attention -------------------------------------------------------------------------------------------------------


def _attention(model: Any) -> Setting | str | None:
    found = {config._attn_implementation for config in _configurations(model)}
    if found == {NAME}:
        return None
    if found != {"sdpa"}:
        names = ", ".join(sorted(f'"{name}"' for name in found))
        return (
            f"its attn_implementation is {names}, by choice or because it has no other; to set it to"
            f' "{NAME}" see fastformer.integrations.transformers'
        )
    if not all(m._can_set_attn_implementation() for m in model.modules() if _is_pretrained(m)):
        return "it does not look at its attn_implementation"
    what = f'attn_implementation="{NAME}"'
    return "attention", what, partial(_set_attention, model), partial(_restore_attention, model)


def _configurations(model: Any) -> list[Any]:
    """The configurations of a model and of all models in it, each once."""
    waiting = [module.config for module in model.modules() if _is_pretrained(module)]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            parts = (getattr(config, key, None) for key in config.sub_configs)
            waiting.extend(part for part in parts if part is not None)
    return list(found.values())


class _Before:
    """The attention that each configuration had. Unpickled elsewhere, it makes the new one's name known there."""

    def __init__(self, configurations: list[Any]) -> None:
        self.implementations = [(config, config._attn_implementation) for config in configurations]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _register()


def _register() -> None:
    from . import transformers as integration

    integration.register()


def _set_attention(model: Any) -> None:
    _register()
    model.__dict__[_BEFORE] = _Before(_configurations(model))
    model.set_attn_implementation(NAME)


def _restore_attention(module: torch.nn.Module) -> None:
    before = module.__dict__.pop(_BEFORE, None)
    for config, implementation in () if before is None else before.implementations:
        if config._attn_implementation == NAME:  # and not another one that was chosen since
            config._attn_implementation_internal = implementation


# ---- loss ------------------------------------------------------------------------------------------------------------


class Loss:
    """A loss function of transformers whose cross-entropy is :func:`fastformer.functional.cross_entropy`."""

    def __init__(self, original: Callable[..., Tensor]) -> None:
        self.original = original
        self._fused = rebound(original, {"fixed_cross_entropy": _fixed_cross_entropy}) or original

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._fused(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Loss, (self.original,)


def _fixed_cross_entropy(
    source: Tensor,
    target: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """The mean over targets that count, or their sum over the number of them in all accumulated batches."""
    if num_items_in_batch is None:
        return functional.cross_entropy(source, target, ignore_index=ignore_index)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(source.device)
    return functional.cross_entropy(source, target, ignore_index=ignore_index, reduction="sum") / num_items_in_batch


def _loss_of(model: Any) -> Loss | None:
    """The model's loss with our cross-entropy in it, if it is a function that calls the one of transformers."""
    mapping = sys.modules["transformers.loss.loss_utils"].LOSS_MAPPING
    forward = inspect.unwrap(type(model).forward)
    if "loss_function" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    function = mapping.get(model.loss_type, mapping["ForCausalLM"])  # transformers' own default
    scope = getattr(function, "__globals__", {})
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    known = fingerprint(scope.get("fixed_cross_entropy")) == _FIXED_CROSS_ENTROPY
    if "fixed_cross_entropy" not in names or not known or hasattr(function, "__wrapped__"):
        return None
    return Loss(function)


def _set_loss(model: Any, loss: Loss) -> None:
    model.loss_function = loss


def _restore_loss(module: torch.nn.Module) -> None:
    if isinstance(module.__dict__.get("_loss_function"), Loss):
        del module.__dict__["_loss_function"]
