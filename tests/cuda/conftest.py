"""The device CUDA kernels are tested on: a GPU where there is one, and the emulator everywhere."""

import shutil

import pytest
import torch

from fastformer.backends import cuda
from fastformer.backends.cuda import emulation

on_gpu = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        not torch.cuda.is_available() or isinstance(cuda._load(False), str),
        reason="no GPU, or fastformer._cuda not built",
    ),
)


@pytest.fixture(params=["cpu", on_gpu])
def device(request, monkeypatch):
    """``"cpu"`` (emulated kernels) or ``"cuda"``."""
    if request.param == "cpu":
        if not shutil.which(emulation.compiler()[0]):
            pytest.skip("the emulator needs a C++ compiler")
        monkeypatch.setenv("FASTFORMER_EMULATE", "1")
        reason = cuda.unavailable("cpu")
        assert reason is None, reason
        emulation.set_order("forward")
    return request.param


@pytest.fixture
def hopper(device, monkeypatch):
    """Emulated only: the kernels for sm_90, such as clusters where a row is too long for one block."""
    if device != "cpu":
        pytest.skip("a GPU is what it is")
    monkeypatch.setenv("FASTFORMER_CUDA_FAMILY", "sm90")
    return device
