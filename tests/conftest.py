"""Every test draws the same random numbers in every run, whatever ran before it."""

import pytest
import torch

torch.manual_seed(0)  # for the numbers drawn while test files are imported


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
