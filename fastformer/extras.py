"""Optional packages, imported when first used; a missing one is an error that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingPackageError(ModuleNotFoundError):
    """A package that this feature needs is not installed; the message says how to get it."""


def require(module: str, purpose: str, extra: str = "train") -> ModuleType:
    """Imports and returns ``module``.

    Args:
        module: dotted name, such as ``"rich.progress"``.
        purpose: what needs it, to begin the message with.
        extra: the optional dependency group it is in.

    Raises:
        MissingPackageError: it (or its parent) is not installed. Errors inside an installed package pass through.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is None or error.name.split(".")[0] != package:
            raise
        raise MissingPackageError(
            f"{purpose} needs the package {package!r}, which is not installed: pip install 'fastformer[{extra}]'",
            name=error.name,
        ) from None
