"""Every test draws the same random numbers in every run and tests our kernels at any size; slow tests come first."""

import contextlib

import pytest
import torch

from fastformer.backends import chunks, matmul, registry

with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401  # torch.testing imports it, which fails once something has looked for pip

registry.TORCH_UP_TO.clear()  # tests/functional/test_small.py tests what PyTorch is left
chunks.SMALL_LOGITS = 0  # and small tables of logits in one piece
matmul.SMALL = 0
torch.manual_seed(0)  # for the numbers drawn while test files are imported


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    # So that none of pytest-xdist's workers is left alone with one at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
