"""Which code a function is: the proof that a class computes what a fused one does.

Model libraries copy their layers from family to family, so one source text stands for dozens of classes: 140 RMS norms
of transformers have the same ``forward``, whatever they are called. :func:`fingerprint` hashes a function's syntax tree
without comments, annotations and docstring, and only where the names it takes from its file are PyTorch's, Python's or
functions that have one, so equal fingerprints mean equal results. A class whose forward was edited, decorated or
replaced at run time has another one, or none.

:func:`rebound` is the other way round, for code that is right but calls something slow: the same code with one of those
names standing for something else, in a copy of its own. The original and its file stay as they are.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import math
import textwrap
import types
from collections.abc import Callable
from typing import Any

import torch

_KNOWN = (torch, torch.nn, torch.nn.functional, torch.Tensor, math)
# Decorators either left the function as it is, or it is not the one that is looked at.
_NO_MEANING = ("annotation", "returns", "type_comment", "kind", "ctx", "decorator_list")


@functools.cache
def fingerprint(function: object) -> str | None:
    """Sixteen hexadecimal digits, or None where the code cannot be read or depends on more than PyTorch."""
    # transformers wraps the forward of each subclass of its checkpointed layers, also of those made here.
    while getattr(function, "__globals__", {}).get("__name__") == "transformers.modeling_layers":
        function = getattr(function, "__wrapped__", None)
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        return None
    code = function.__code__
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if any(isinstance(constant, types.CodeType) for constant in code.co_consts):
        return None  # a function within, whose names are its own
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    helpers = []
    for name in code.co_names:  # attributes are among them
        value = function.__globals__.get(name) if name in read else None
        if value is None or any(value is known for known in _KNOWN):
            continue
        if not isinstance(value, types.FunctionType) or value is function or (found := fingerprint(value)) is None:
            return None
        helpers.append((name, found))
    return hashlib.sha256(repr((_canonical(tree), helpers)).encode()).hexdigest()[:16]


def _canonical(node: object) -> object:
    """Nested tuples, the same in every version of Python: fields that are empty or mean nothing are left out."""
    if isinstance(node, list):
        return tuple(map(_canonical, node))
    if not isinstance(node, ast.AST):
        return node
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in _NO_MEANING]
    if isinstance(node, ast.FunctionDef):
        body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
        fields = [(name, body if name == "body" else value) for name, value in fields if name != "name"]
    return type(node).__name__, *((n, _canonical(value)) for n, value in fields if value is not None and value != [])


def rebound(function: Callable[..., Any], names: dict[str, object]) -> Callable[..., Any] | None:
    """A copy of ``function``, and of what its decorators wrap, to which the globals ``names`` mean something else.

    None if it is no Python function, or wraps one in a way that cannot be followed.
    """
    if not isinstance(function, types.FunctionType):
        return None
    cells, inner = function.__closure__ or (), getattr(function, "__wrapped__", None)
    scope = function.__globals__
    if inner is not None:
        copy, at = rebound(inner, names), [i for i, cell in enumerate(cells) if cell.cell_contents is inner]
        if copy is None or len(at) != 1:
            return None
        cells = tuple(types.CellType(copy) if i == at[0] else cell for i, cell in enumerate(cells))
    else:
        scope = scope | names
        # With the name of its module torch.compile would look the globals up there, and find the original ones.
        scope.pop("__name__", None)
    made = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells or None)
    made.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(made, function, updated=("__dict__",))
    if inner is None:
        made.__dict__.pop("__wrapped__", None)
    else:
        made.__wrapped__ = copy  # type: ignore[attr-defined]
    return made
