"""Every test draws the same random numbers in every run, whatever ran before it, and tests our kernels at any size."""

import pytest
import torch

from fastformer.backends import registry

registry.TORCH_UP_TO.clear()  # tests/functional/test_small.py tests what PyTorch is left
torch.manual_seed(0)  # for the numbers drawn while test files are imported


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
