"""``fastformer.optimize(model)``: the layers of any PyTorch or Hugging Face model on fused kernels, in place.

Only the *class* of a module changes (``module.__class__ = fastformer.nn.LayerNorm``), not the module. So whatever
refers to it stays right without being known here: parents and other holders, optimizers and DDP, which hold its
parameters, tied weights, hooks, device, dtype, mode and the keys of ``state_dict``. A new object in its place would
have to be given all that, and could not reach a reference kept in a list or a closure. :func:`restore` gives the class
back.

A class changes if it is proved to compute the same (_rules.py); the report says what was left and why. Besides modules,
a model of transformers gets attention and loss through its own settings (_settings.py). Nothing outside of the model
changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from . import _checked, _settings
from ._rules import Rule, rule_for, rules, unless_parameters

__all__ = ["Left", "Report", "Rule", "Swapped", "optimize", "restore", "rules"]

_MARK = "_optimized_from"  # on a module: the class it had


@dataclass(frozen=True)
class Swapped:
    """A module that runs fused kernels now."""

    name: str
    """Where it is in the model, "" for the model itself."""
    type: str
    operations: str
    """What computes it."""


@dataclass(frozen=True)
class Left:
    """A module that was left as it is."""

    name: str
    type: str
    reason: str


@dataclass
class _Change:
    done: Swapped
    apply: Callable[[], None]
    undo: Callable[[], None]


@dataclass
class Report:
    """What :func:`optimize` did to a model; ``print(report)`` shows it by type of module."""

    model: str
    swapped: list[Swapped] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    already: int = 0
    """Modules that an earlier call had swapped."""
    _changes: list[_Change] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Gives back what this call changed."""
        for change in reversed(self._changes):
            change.undo()

    def __str__(self) -> str:
        lines = [f"fastformer.optimize: {self.model}, {len(self.swapped)} swapped, {len(self.left)} left"]
        if self.already:
            lines[0] += f", {self.already} were swapped before"
        for title, entries in (("swapped", self.swapped), ("left", self.left)):
            groups: dict[tuple[str, str], list[str]] = {}
            for entry in entries:
                text = entry.operations if isinstance(entry, Swapped) else entry.reason
                groups.setdefault((entry.type, text), []).append(entry.name or "the model itself")
            if groups:
                lines.append(f"  {title}")
            for (kind, text), names in sorted(groups.items(), key=lambda item: -len(item[1])):
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                lines.append(f"    {len(names):4} {kind}: {text} ({names[0]}{more})")
        return "\n".join(lines)


def optimize(
    model: torch.nn.Module, *, check: Any = None, tolerance: float | None = None, verbose: bool = True
) -> Report:
    """Makes a model's layers run fastformer's kernels, in place, where that is proved to give the same numbers.

    Parameters, buffers, hooks, modes and the keys of ``state_dict`` stay; optimizers made before keep working. A layer
    that is left (a class nothing here knows, an adapter, a quantised or sharded layer) works as before. Calling it
    again changes nothing more. Call it before ``torch.compile`` and FSDP, before or after DDP.

    Args:
        model: any ``torch.nn.Module``, of torch.nn, of transformers or of your own.
        check: a sample batch: a mapping of keyword arguments, a list or tuple of arguments, or one argument. The model
            runs on it in eval mode before and after, and all tensors it returns are compared.
        tolerance: largest difference accepted there, relative to the largest element of each tensor; by default one
            that suits the tensor's dtype.
        verbose: print the report; False keeps quiet.

    Returns:
        A :class:`Report`: what was swapped, and what was left and why. ``report.undo()`` takes this call back,
        :func:`restore` all of them.

    Raises:
        TypeError: model is no module, or an entry of :data:`rules` names no subclass.
        ValueError: the outputs on ``check`` differ; everything is undone then, and the message names the type of module
            that is responsible.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    report = Report(type(model).__name__)
    before = None if check is None else _checked.outputs(model, check)
    report._changes = list(_plan(model, report))
    for change in report._changes:
        change.apply()
        report.swapped.append(change.done)
    if check is not None:
        problem = _problem(model, check, before, tolerance)
        if problem is not None:
            report.undo()
            raise ValueError(
                f"check: {_culprit(model, report, check, before, tolerance)}{problem}; nothing was changed"
            )
    if verbose:
        print(report)
    return report


def restore(model: torch.nn.Module) -> None:
    """Takes back every :func:`optimize` of a model, of a copy or of an unpickled one."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in list(model.modules()):
        _settings.restore(module)
        _give_back(module)


# ---- what to change --------------------------------------------------------------------------------------------------


def _plan(model: torch.nn.Module, report: Report) -> Iterator[_Change]:
    for name, setting in _settings.changes(model):
        kind = type(model.get_submodule(name)).__name__
        if isinstance(setting, str):
            report.left.append(Left(name, f"attention of {kind}", setting))
        else:
            what, operations, apply, undo = setting
            yield _Change(Swapped(name, f"{what} of {kind}", operations), apply, undo)
    for name, module, reason in _walk(model):
        kind = type(module).__name__
        if reason is not None:
            report.left.append(Left(name, kind, reason))
            continue
        if _MARK in module.__dict__:
            report.already += 1
            continue
        found = _replacement(module)
        if isinstance(found, Rule):
            change = partial(_take_class, module, found.replacement)
            yield _Change(Swapped(name, kind, found.operations), change, partial(_give_back, module))
        elif found:
            report.left.append(Left(name, kind, found))


def _walk(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str | None]]:
    """Every module once, with the reason why it and all in it are left, if there is one."""
    seen: set[int] = set()

    def visit(name: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str | None]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        reason = _whole(module)
        yield name, module, reason
        if reason is None:
            for key, child in module.named_children():
                yield from visit(f"{name}.{key}" if name else key, child)

    yield from visit("", model)


def _whole(module: torch.nn.Module) -> str | None:
    """Why a module and everything in it is left."""
    if isinstance(module, torch.jit.ScriptModule | torch.jit.TopLevelTracedModule):
        return "compiled by torch.jit"
    if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
        return "compiled: call optimize before torch.compile"
    if any(base.__module__.startswith("torch.distributed.fsdp") for base in type(module).__mro__):
        return "sharded by FSDP: call optimize before"
    if type(module).__module__.split(".")[0] == "fastformer" and _MARK not in module.__dict__:
        return "fastformer's own"
    return None


def _replacement(module: torch.nn.Module) -> Rule | str | None:
    """The rule for a module, or why it is left; "" and None without a word."""
    found = rule_for(type(module))
    if found is None:
        # Containers are not worth a line: what they hold has its own.
        return "" if next(module.children(), None) is not None else "no fused kernel for it"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if hasattr(module, "parametrizations"):
        return "it is parametrised"
    if isinstance(found, str):
        return found
    if not issubclass(found.replacement, type(module)):
        raise TypeError(f"rules: {found.replacement.__name__} is no subclass of {type(module).__name__}")
    reason = unless_parameters(module) or found.unless(module)
    return found if reason is None else reason


# ---- changing it -----------------------------------------------------------------------------------------------------


def _take_class(module: torch.nn.Module, replacement: type) -> None:
    module.__dict__[_MARK] = type(module)
    module.__class__ = replacement


def _give_back(module: torch.nn.Module) -> None:
    original = module.__dict__.get(_MARK)
    if original is None:
        return
    rule = rule_for(original)
    if not (isinstance(rule, Rule) and type(module) in (rule.replacement, original)):
        warnings.warn(
            f"fastformer.restore: {type(module).__name__} was changed by something else since, and is left",
            stacklevel=3,
        )
        return
    del module.__dict__[_MARK]
    module.__class__ = original


# ---- checking it -----------------------------------------------------------------------------------------------------


def _problem(model: torch.nn.Module, batch: Any, before: Any, tolerance: float | None) -> str | None:
    try:
        after = _checked.outputs(model, batch)
    except Exception as error:  # whatever it is, the original did not raise it
        return f"{type(error).__name__}: {error}"
    return _checked.difference(before, after, tolerance)


def _culprit(model: torch.nn.Module, report: Report, batch: Any, before: Any, tolerance: float | None) -> str:
    """The first type of module whose swap alone makes the outputs differ."""
    for kind in dict.fromkeys(swapped.type for swapped in report.swapped):
        changes = [change for change in report._changes if change.done.type == kind]
        for change in changes:
            change.apply()
        problem = _problem(model, batch, before, tolerance)
        for change in reversed(changes):
            change.undo()
        if problem is not None:
            return f"{kind} differs: "
    return "no type of module differs alone, all together do: "
