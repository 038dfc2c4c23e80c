"""LoRA (Hu et al. 2021, arXiv:2106.09685): a frozen layer learns a change of low rank beside it.

    y = x W + b + (alpha / rank) dropout(x) A B        A (in, rank) small and random, B (rank, out) zero at first

Only A and B are trained, so gradients and AdamW's two moments are held for them alone. The ``peft`` package makes the
adapters and reads and writes their files, the ones it has for ``transformers``: the models here have the same module
names. A layer with an adapter is called, never read around, by the fused paths; merged, A B is added to W and the model
is as fast as before.
"""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..extras import require
from ..models import PreTrainedModel
from ..models.conv1d import Conv1D
from .checkpoint import ADAPTER_CONFIG
from .config import _check
from .recompute import find_blocks

HEADS = ("pooler", "classifier", "qa_outputs", "score")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen layers (arXiv:2106.09685)."""

    rank: int = 0
    """Rank of the adapters, such as 8; 0: none, all weights are trained."""
    alpha: float = 16.0
    """The adapters' outputs are scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout of the adapters' inputs."""
    targets: tuple[str, ...] = ()
    """Ends of the names of the layers that get one; "all" for every linear layer of the blocks. Empty: the projections
    of queries and values, as in the paper."""

    def __post_init__(self) -> None:
        _check(
            "lora",
            self,
            ("rank", "at least 0", self.rank >= 0),
            ("alpha", "above 0", self.alpha > 0),
            ("dropout", "in [0, 1)", 0 <= self.dropout < 1),
        )


def add_lora(model: PreTrainedModel, config: LoraConfig, base: str | Path | None = None) -> Any:
    """A ``peft.PeftModel`` around ``model``, in which adapters and the heads of :data:`HEADS` can be trained.

    ``model`` itself is changed: its other parameters are frozen, and layers that get an adapter are replaced.

    Args:
        config: with a rank of 1 or more.
        base: directory of ``model``, kept in the adapter's configuration so that others find it.

    Raises:
        ValueError: no rank, or a target that no linear layer is named by; the message has the nearest.
    """
    if config.rank < 1:
        raise ValueError(f"lora.rank: got {config.rank}, expected at least 1")
    peft = _peft()
    if "all" in config.targets:
        # By their whole names: BERT's pooler and head have layers of the same last name.
        inside = {id(module) for block in find_blocks(model) for module in block.modules()}
        targets = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and id(m) in inside]
    else:
        targets = list(config.targets)
        _check_targets(model, targets)
    heads = [name for name in HEADS if any(n.rpartition(".")[2] == name for n, _ in model.named_modules())]
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets or None,
        modules_to_save=heads or None,
    )
    adapted = peft.get_peft_model(model, _with_conv1d(settings, model))
    settings.base_model_name_or_path = None if base is None else str(base)
    return adapted


def load_lora(model: PreTrainedModel, directory: str | Path, *, trainable: bool = False) -> Any:
    """``model`` with the adapter that ``save_pretrained`` of a ``PeftModel`` wrote into ``directory``.

    Args:
        trainable: the adapter and saved heads can be trained on; the rest is frozen either way.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError, RuntimeError: it is not for a model of this kind or shape.
    """
    if not Path(directory, ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"no adapter in {directory}: {ADAPTER_CONFIG} is not there")
    peft = _peft()
    settings = peft.PeftConfig.from_pretrained(str(directory))
    if settings.peft_type != peft.PeftType.LORA:
        raise ValueError(f"{directory} holds a {settings.peft_type}; expected LoRA")
    settings.inference_mode = not trainable
    adapted = peft.PeftModel.from_pretrained(
        model, str(directory), config=_with_conv1d(settings, model), is_trainable=trainable
    )
    return adapted.train(trainable)


def load_adapter(adapted: Any, directory: str | Path) -> None:
    """Gives the adapters and trained heads of ``adapted`` the values in ``directory``."""
    weights = require("safetensors.torch", "LoRA").load_file(str(Path(directory, "adapter_model.safetensors")))
    _peft().set_peft_model_state_dict(adapted, weights)


def merge_lora(adapted: Any) -> PreTrainedModel:
    """The model inside, adapters added to its weights, and all parameters to be trained again.

    Raises:
        ValueError: ``adapted`` has no adapters, or they hold numbers that are not finite.
    """
    if not isinstance(adapted, _peft().PeftModel):
        raise ValueError(f"adapted: expected a model with adapters, got {type(adapted).__name__}")
    return adapted.merge_and_unload(safe_merge=True).requires_grad_(True)


def _peft() -> Any:
    return require("peft", "LoRA", "finetune")


def _with_conv1d(settings: Any, model: nn.Module) -> Any:
    """peft knows transformers' Conv1D, whose weights lie as in ours."""
    if any(isinstance(module, Conv1D) for module in model.modules()):
        settings.fan_in_fan_out = True
        settings._register_custom_module({Conv1D: _adapted_conv1d()})
    return settings


@functools.cache
def _adapted_conv1d() -> type[nn.Module]:
    class AdaptedConv1D(require("peft.tuners.lora", "LoRA", "finetune").Linear):  # type: ignore[misc]
        def __init__(self, layer: Conv1D, name: str, **options: Any) -> None:
            super().__init__(layer, name, is_target_conv_1d_layer=True, **options)

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            return tuple(module.weight.shape)

    return AdaptedConv1D


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    adaptable = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding | Conv1D)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in adaptable):
            known = sorted({name.rpartition(".")[2] for name in adaptable})
            near = difflib.get_close_matches(target, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"lora.targets: no layer is named {target}{hint} There are {', '.join(known)}, and all")


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(numbers that are trained, all numbers), tied ones counted once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def freeze(model: nn.Module, prefixes: tuple[str, ...]) -> list[str]:
    """Freezes the parameters whose names begin with one of ``prefixes``; "body" is everything but the head.

    A prefix ends where a part of the name does: ``bert.encoder.layer.1`` is not ``bert.encoder.layer.10``.

    Returns:
        Names of the frozen parameters.

    Raises:
        ValueError: a prefix that no parameter has, or nothing is left to train.
    """
    body = getattr(model, "base_model_prefix", "")
    named = dict(model.named_parameters())
    frozen: set[str] = set()
    for prefix in prefixes:
        wanted = body if prefix == "body" else prefix
        found = {name for name in named if name == wanted or name.startswith(f"{wanted}.")}
        if prefix == "body":
            found = {name for name in found if not any(part in HEADS for part in name.split("."))}
        if not found:
            near = difflib.get_close_matches(prefix, [name for name, _ in model.named_modules() if name], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"freeze: no parameter's name begins with {prefix}{hint}")
        frozen |= found
    if frozen == set(named):
        raise ValueError(f"freeze: {', '.join(prefixes)} are all parameters; none is left to train")
    for name in frozen:
        parameter: torch.nn.Parameter = named[name]
        parameter.requires_grad_(False)
    return sorted(frozen)
