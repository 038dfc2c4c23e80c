"""Every test draws the same random numbers in every run, whatever ran before it; slow ones come first."""

import pytest
import torch

torch.manual_seed(0)  # for the numbers drawn while test files are imported


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    # So that none of pytest-xdist's workers is left alone with one at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
